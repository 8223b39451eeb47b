#pragma once
#include <string>
#include <vector>

#include "configs/load.h"
#include "ops/core/error.h"

namespace longspan::test {

// A small config without problems. The tests rely on its line numbers.
inline const char kSample[] = R"(run {
  steps: 100
  context_length: 1024
  global_batch_tokens: 4096
  precision: F32
}
model {
  vocab_size: 320
  hidden_size: 64
  num_layers: 4
  num_heads: 8
  num_kv_heads: 4
  ffn_hidden_size: 96
  mixer { name: "dense" softmax { causal {} } }
  mixer {
    name: "s2"
    softmax {
      s2 {
        local_blocks: 2
        stride_blocks: 4
      }
    }
  }
  layers: "dense s2"
}
data {
  train { path: "a" }
  validation { path: "b" }
}
parallel { dp: 2 cp: 2 }
optimizer { adamw { lr: 1e-3 } }
schedule { cosine { warmup_steps: 10 } }
checkpoint { every_steps: 20 }
evaluation { every_steps: 10 }
)";

// The message of the ConfigError that loading throws; empty when it loads.
inline std::string ErrorOf(const std::string& text, const std::vector<std::string>& sets = {}) {
  try {
    configs::LoadText(text, "c.textproto", sets);
    return "";
  } catch (const ConfigError& error) {
    return error.what();
  }
}

// kSample with the first occurrence of `from` replaced; fails the caller's comparison when absent.
inline std::string SampleWith(const std::string& from, const std::string& to) {
  std::string text = kSample;
  const size_t at = text.find(from);
  if (at == std::string::npos) return "sample has no '" + from + "'";
  return text.replace(at, from.size(), to);
}

}  // namespace longspan::test
