#include "tests/parallel/context/mask_families.h"

#include <algorithm>

#include "ops/core/rng.h"

namespace longspan::test {
namespace {

class Draw {
 public:
  explicit Draw(uint64_t seed) : rng_(seed, StreamOf("mask families")) {}
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng_.Below(next_++, static_cast<uint64_t>(high - low + 1)));
  }
  // Lengths of sum `tokens`, each from low() to high tokens but for the last.
  std::vector<int64_t> Lengths(int64_t tokens, int64_t low, int64_t high) {
    std::vector<int64_t> lengths;
    for (int64_t left = tokens; left > 0; left -= lengths.back()) {
      lengths.push_back(std::min(left, Between(low, high)));
    }
    return lengths;
  }

 private:
  Philox rng_;
  uint64_t next_ = 0;
};

std::vector<int64_t> Ends(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> ends;
  for (const int64_t length : lengths) ends.push_back((ends.empty() ? 0 : ends.back()) + length);
  return ends;
}

}  // namespace

std::vector<MaskFamily> MaskFamilies(int64_t tokens, uint64_t seed) {
  using ops::AttentionPattern;
  Draw draw(seed);
  const std::vector<int64_t> one = {tokens};
  // Most tokens in documents up to a quarter of the row, the others in short ones between them.
  std::vector<int64_t> lengths;
  for (int64_t left = tokens; left > 0; left -= lengths.back()) {
    const bool is_long = draw.Between(0, 2) == 0;
    const int64_t high = std::max<int64_t>(1, is_long ? tokens / 4 : tokens / 32);
    lengths.push_back(std::min(left, draw.Between(std::max<int64_t>(1, high / 4), high)));
  }
  const std::vector<int64_t> documents = Ends(lengths);
  const int64_t window = std::max<int64_t>(1, std::min<int64_t>(1024, tokens / 8));
  const int64_t block = tokens >= 32768 ? 1024 : 64;
  std::vector<int64_t> of_blocks;
  for (const int64_t n : draw.Lengths((tokens + block - 1) / block, 1, 8)) {
    of_blocks.push_back(n * block);
  }
  std::vector<int64_t> block_ends = Ends(of_blocks);
  block_ends.back() = tokens;
  const int64_t most = std::max<int64_t>(1, tokens / 8), least = std::max<int64_t>(1, most / 8);
  const int64_t global = draw.Between(1, std::max<int64_t>(1, tokens / 3 - 1));
  const auto random = [&](double density, int64_t mean, int64_t min) {
    return AttentionPattern::RandomBlocks({.density = density,
                                           .seed = static_cast<int64_t>(seed),
                                           .mean_blocks = mean,
                                           .min_blocks = min,
                                           .bidirectional = true,
                                           .own_block = false});
  };
  return {
      {"full", AttentionPattern::Full(), one},
      {"causal", AttentionPattern::Causal(), one},
      {"full documents", AttentionPattern::Full(), documents},
      {"causal documents", AttentionPattern::Causal(), documents},
      {"sliding window", AttentionPattern::Window(window, 0, true), one},
      {"causal sliding window", AttentionPattern::Window(window), one},
      {"shared question", AttentionPattern::SharedQuestion(draw.Lengths(tokens, least, most)), one},
      {"causal blockwise", AttentionPattern::CausalBlockwise(draw.Lengths(tokens, least, most)),
       one},
      {"prefix", AttentionPattern::Prefix(draw.Between(1, tokens)), one},
      {"prefix documents", AttentionPattern::Prefix(draw.Between(1, lengths.front())), documents},
      {"global sliding window", AttentionPattern::GlobalWindow(global, global, true), one},
      {"block-causal documents", AttentionPattern::BlockCausal(block), block_ends},
      {"uniform block sparse", random(0.1, 1, 1), one},
      {"variable block sparse", random(0.2, 8, 2), one},
  };
}

}  // namespace longspan::test
