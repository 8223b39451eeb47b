#include "configs/validate_patterns.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <set>

#include "configs/defaults.h"
#include "configs/fields.h"
#include "configs/mixer.h"
#include "ops/core/error.h"

namespace longspan::configs {
namespace {

using Problems = std::vector<Problem>;

// A power of two near `value`, at least 16.
int64_t NearestPowerOfTwo(int64_t value) {
  return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(16, value))));
}

void CheckBlockSize(int64_t size, const std::string& path, Problems& problems) {
  if (std::has_single_bit(static_cast<uint64_t>(size))) return;
  problems.push_back(
      {path + ".block_size", Str(size, " is not a power of two (use ", NearestPowerOfTwo(size),
                                 " or ", 2 * NearestPowerOfTwo(size), ")")});
}

void CheckS2(const S2Pattern& s2, int64_t num_kv_heads, const std::string& path,
             Problems& problems) {
  CheckBlockSize(s2.block_size(), path, problems);
  if (s2.homogeneous()) {
    if (s2.dense_heads() > 0) {
      problems.push_back(
          {path + ".dense_heads", Str(s2.dense_heads(), " contradicts homogeneous: true (use 0)")});
    }
    if (s2.has_head_step()) {
      problems.push_back(
          {path + ".head_step", "has no effect with homogeneous: true (remove one of them)"});
    }
    return;
  }
  if (s2.dense_heads() > num_kv_heads) {
    problems.push_back({path + ".dense_heads", Str(s2.dense_heads(), " exceeds model.num_kv_heads ",
                                                   num_kv_heads, " (use at most that)")});
    return;
  }
  const double coverage = S2Coverage(s2, num_kv_heads);
  if (coverage < 1 && !s2.allow_incomplete_coverage()) {
    problems.push_back(
        {path + ".stride_blocks",
         Str("the ", num_kv_heads, " kv heads together see only ",
             std::llround(coverage * static_cast<double>(s2.stride_blocks())), " of every ",
             s2.stride_blocks(), " far blocks, with head_step ", HeadStep(s2, num_kv_heads),
             " (use stride_blocks of at most ", num_kv_heads,
             " with head_step 1, or a dense head, or allow_incomplete_coverage: true)")});
  }
}

void CheckRandomBlocks(const RandomBlocksPattern& random, const std::string& path,
                       Problems& problems) {
  CheckBlockSize(random.block_size(), path, problems);
  if (random.min_blocks() > random.mean_blocks()) {
    problems.push_back({path + ".min_blocks", Str(random.min_blocks(), " exceeds mean_blocks ",
                                                  random.mean_blocks(), " (use at most that)")});
  }
}

void CheckSpans(const SpansPattern& spans, int64_t num_kv_heads, const std::string& path,
                Problems& problems) {
  if (spans.head_size() != num_kv_heads) {
    problems.push_back(
        {path + ".head",
         Str("has ", spans.head_size(), " entries for model.num_kv_heads ", num_kv_heads,
             " (give one for each kv head: what only some of its query heads left out would still "
             "be fetched for the others)")});
  }
  for (int h = 0; h < spans.head_size(); ++h) {
    const HeadSpan& head = spans.head(h);
    if (head.has_window() || head.sinks() == 0) continue;
    problems.push_back({ElementPath(path + ".head", h) + ".sinks",
                        Str(head.sinks(),
                            " has no effect without a window, where all earlier "
                            "tokens are seen (give a window or leave it out)")});
  }
}

}  // namespace

double S2Coverage(const S2Pattern& s2, int64_t num_kv_heads) {
  if (s2.dense_heads() > 0) return 1;
  const int64_t stride = s2.stride_blocks();
  const int64_t step = HeadStep(s2, num_kv_heads);
  std::set<int64_t> residues;
  for (int64_t h = 0; h < num_kv_heads; ++h) {
    // head_offset moves all residues alike and leaves their number as it is.
    residues.insert((s2.homogeneous() ? 0 : h * step) % stride);
  }
  return static_cast<double>(residues.size()) / static_cast<double>(stride);
}

void CheckPattern(const Attention& attention, int64_t num_kv_heads, const std::string& path,
                  std::vector<Problem>& problems) {
  switch (attention.pattern_case()) {
    case Attention::kS2:
      return CheckS2(attention.s2(), num_kv_heads, path + ".s2", problems);
    case Attention::kPower:
      return CheckBlockSize(attention.power().block_size(), path + ".power", problems);
    case Attention::kDilated:
      return CheckBlockSize(attention.dilated().block_size(), path + ".dilated", problems);
    case Attention::kBlockCausal:
      return CheckBlockSize(attention.block_causal().block_size(), path + ".block_causal",
                            problems);
    case Attention::kRandomBlocks:
      return CheckRandomBlocks(attention.random_blocks(), path + ".random_blocks", problems);
    case Attention::kSpans:
      return CheckSpans(attention.spans(), num_kv_heads, path + ".spans", problems);
    default:
      return;
  }
}

void CheckNormalization(const Mixer& mixer, const std::string& path,
                        std::vector<Problem>& problems) {
  const Attention& attention = AttentionOf(mixer);
  if (!mixer.has_sigmoid()) {
    if (!attention.has_bias()) return;
    problems.push_back(
        {path + ".bias",
         "has no effect on softmax, which does not change when all scores move alike "
         "(leave it out, or use sigmoid)"});
    return;
  }
  if (!attention.has_duo() && !attention.has_seer() && !attention.has_moba()) return;
  const std::string pattern = PatternOf(mixer);
  problems.push_back({Str(path, ".", pattern), Str("is built for softmax only (use softmax { ",
                                                   pattern, " { ... } }, or another pattern)")});
}

}  // namespace longspan::configs
