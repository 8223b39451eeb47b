#include "trainer/model/options.h"

#include <charconv>

#include "ops/core/error.h"

namespace longspan::trainer {

ops::AttentionOptions MixerOptions::Attention() const {
  ops::AttentionOptions options;
  options.scale = scale;
  options.normalization = normalization;
  options.bias = bias;
  return options;
}

std::string MixerOptions::ToString() const {
  if (!IsSigmoid()) return PatternToString();
  if (!bias.has_value()) return Str("sigmoid ", PatternToString());
  char digits[32];  // as many as it takes to read the same number again
  const auto end = std::to_chars(digits, digits + sizeof digits, *bias).ptr;
  return Str("sigmoid bias ", std::string(digits, end), " ", PatternToString());
}

std::string MixerOptions::PatternToString() const {
  if (seer) {
    return Str("seer block ", seer->block_size, " gate_dim ", seer->gate_dim, " ",
               seer->selection.ToString());
  }
  if (duo) return Str("duo sinks ", duo->sinks, " recent ", duo->recent);
  if (moba) return moba->ToString();
  return pattern.ToString();
}

}  // namespace longspan::trainer
