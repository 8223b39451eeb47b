#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "data/index_writer.h"
#include "data/token_dtype.h"
#include "ops/core/rng.h"
#include "trainer/options.h"

namespace longspan::test {

// A folder of its own that is removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "longspan_test_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw Error("cannot make " + name);
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Documents of uneven lengths (mean about `mean_length`) that a model can learn something about:
// mostly token -> 3 token + 1 mod (vocab - 1), sometimes random; the last id ends each document.
inline void WriteCorpus(const std::string& prefix, int64_t vocab, int64_t documents,
                        int64_t mean_length, uint64_t seed) {
  data::IndexWriter writer(prefix, data::TokenDTypeForVocabulary(vocab));
  const Philox rng(seed, StreamOf("test corpus"));
  uint64_t n = 0;
  const uint64_t v = static_cast<uint64_t>(vocab - 1);
  for (int64_t d = 0; d < documents; ++d) {
    const uint64_t length = 1 + rng.Below(n++, static_cast<uint64_t>(2 * mean_length));
    std::vector<int32_t> ids;
    uint64_t token = rng.Below(n++, v);
    for (uint64_t i = 0; i < length; ++i) {
      ids.push_back(static_cast<int32_t>(token));
      token = rng.Uniform(n++) < 0.8 ? (3 * token + 1) % v : rng.Below(n++, v);
    }
    ids.push_back(static_cast<int32_t>(vocab - 1));
    writer.Append(ids);
    writer.EndDocument();
  }
  writer.Commit();
}

// A model small enough for exact tests: GQA, a causal and an S2 mixer, two layers.
inline trainer::ModelOptions SmallModel(DType dtype) {
  trainer::ModelOptions m;
  m.vocab_size = 19;
  m.hidden_size = 16;
  m.num_heads = 4;
  m.num_kv_heads = 2;
  m.head_dim = 8;
  m.ffn_hidden_size = 24;
  m.embedding_init_std = 0.3;
  m.init_std = 0.3;  // large, so that attention is far from uniform
  m.mixers = {{"dense", ops::AttentionPattern::Causal()},
              {"s2", ops::AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 2})}};
  m.layers = {0, 1};
  m.compute = m.residual = dtype;
  return m;
}

}  // namespace longspan::test
