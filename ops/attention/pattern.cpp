#include "ops/attention/pattern.h"

#include <algorithm>
#include <set>

#include "ops/core/error.h"

namespace longspan::ops {
namespace {

// Bounds every product of S2 fields by 2^60.
constexpr int64_t kMaxBlocks = int64_t{1} << 24;

std::string Percent(double share) { return Str(static_cast<int64_t>(share * 100 + 0.5), " %"); }

void CheckRange(const char* field, int64_t value, int64_t low, int64_t high,
                std::vector<std::string>& problems) {
  if (value >= low && value <= high) return;
  problems.push_back(
      Str(field, ": ", value, " is not between ", low, " and ", high, "; choose a value there"));
}

std::vector<std::string> S2Problems(const AttentionPattern& pattern, int64_t kv_heads) {
  const S2Options& s2 = pattern.s2;
  std::vector<std::string> problems;
  const bool power_of_two = s2.block_size > 0 && (s2.block_size & (s2.block_size - 1)) == 0;
  if (!power_of_two || s2.block_size < 16 || s2.block_size > kMaxBlocks) {
    problems.push_back(Str("s2.block_size: ", s2.block_size, " is not a power of two from 16 to ",
                           kMaxBlocks, "; use 16, 32, 64, 128, ..."));
  }
  CheckRange("s2.local_blocks", s2.local_blocks, 1, kMaxBlocks, problems);
  CheckRange("s2.stride_blocks", s2.stride_blocks, 1, kMaxBlocks, problems);
  CheckRange("s2.head_step", s2.head_step, 0, kMaxBlocks, problems);
  CheckRange("s2.head_offset", s2.head_offset, 0, kMaxBlocks, problems);
  CheckRange("s2.dense_heads", s2.dense_heads, 0, kv_heads, problems);
  if (s2.homogeneous && s2.dense_heads > 0) {
    problems.push_back(Str("s2.dense_heads: ", s2.dense_heads,
                           " with s2.homogeneous: true, which gives all heads one pattern; set "
                           "one of the two back to its default"));
  }
  if (s2.homogeneous && s2.head_step > 0) {
    problems.push_back(Str("s2.head_step: ", s2.head_step,
                           " has no effect with s2.homogeneous: true; remove one of the two"));
  }
  if (!problems.empty() || s2.homogeneous || s2.allow_incomplete_coverage) return problems;
  const double coverage = pattern.Coverage(kv_heads);
  if (coverage < 1) {
    problems.push_back(
        Str("s2.stride_blocks: ", s2.stride_blocks, " with ", kv_heads, " kv heads and head_step ",
            pattern.HeadStep(kv_heads), " lets all heads together reach only ", Percent(coverage),
            " of the distant blocks; use head_step 1 with stride_blocks <= ", kv_heads,
            ", or dense_heads: 1, or allow_incomplete_coverage: true"));
  }
  return problems;
}

}  // namespace

std::vector<std::string> AttentionPattern::Problems(int64_t kv_heads) const {
  std::vector<std::string> problems;
  if (kv_heads < 1) {
    problems.push_back(Str("kv heads: ", kv_heads, " is not at least 1; use 1 or more"));
    return problems;
  }
  if (kind == PatternKind::kWindow) {
    if (window < 1) {
      problems.push_back(
          Str("window: ", window, " is not at least 1; it counts tokens, the query included"));
    }
    if (sinks < 0) problems.push_back(Str("sinks: ", sinks, " is negative; use 0 for no sinks"));
  }
  if (kind == PatternKind::kS2) return S2Problems(*this, kv_heads);
  return problems;
}

int64_t AttentionPattern::HeadStep(int64_t kv_heads) const {
  if (s2.homogeneous) return 0;
  if (s2.head_step > 0) return s2.head_step;
  return std::max<int64_t>(1, s2.stride_blocks / std::max<int64_t>(1, kv_heads));
}

double AttentionPattern::Coverage(int64_t kv_heads) const {
  if (kind != PatternKind::kS2 || s2.dense_heads > 0) return 1;
  std::set<int64_t> residues;
  for (int64_t h = 0; h < kv_heads; ++h) {
    residues.insert((h * HeadStep(kv_heads) + s2.head_offset) % s2.stride_blocks);
  }
  return static_cast<double>(residues.size()) / static_cast<double>(s2.stride_blocks);
}

std::string AttentionPattern::ToString() const {
  switch (kind) {
    case PatternKind::kFull:
      return "full";
    case PatternKind::kCausal:
      return "causal";
    case PatternKind::kWindow:
      return sinks > 0 ? Str("window ", window, " sinks ", sinks) : Str("window ", window);
    case PatternKind::kS2:
      break;
  }
  std::string text =
      Str("s2 block ", s2.block_size, " local ", s2.local_blocks, " stride ", s2.stride_blocks);
  if (s2.homogeneous) text += " homogeneous";
  if (s2.head_step > 0) text += Str(" step ", s2.head_step);
  if (s2.head_offset > 0) text += Str(" offset ", s2.head_offset);
  if (s2.dense_heads > 0) text += Str(" dense ", s2.dense_heads);
  if (s2.phase == StridePhase::kRow) text += " phase row";
  return text;
}

}  // namespace longspan::ops
