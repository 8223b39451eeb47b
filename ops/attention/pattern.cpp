#include "ops/attention/pattern.h"

#include <algorithm>
#include <charconv>
#include <set>
#include <utility>

#include "ops/core/error.h"

namespace longspan::ops {
namespace {

// Bound every product and sum of fields far below 2^63.
constexpr int64_t kMaxBlocks = int64_t{1} << 24;
constexpr int64_t kMaxTokens = int64_t{1} << 31;

std::string Percent(double share) { return Str(static_cast<int64_t>(share * 100 + 0.5), " %"); }

// The problems found so far of one pattern, with the checks that several patterns share.
class Checks {
 public:
  std::vector<std::string> problems;

  void Range(const std::string& field, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return;
    problems.push_back(
        Str(field, ": ", value, " is not between ", low, " and ", high, "; choose a value there"));
  }
  void BlockSize(const char* field, int64_t size) {
    const bool power_of_two = size > 0 && (size & (size - 1)) == 0;
    if (power_of_two && size >= 16 && size <= kMaxBlocks) return;
    problems.push_back(Str(field, ": ", size, " is not a power of two from 16 to ", kMaxBlocks,
                           "; use 16, 32, 64, 128, ..."));
  }
  void Window(int64_t window) {
    if (window >= 1) return;
    problems.push_back(
        Str("window: ", window, " is not at least 1; it counts tokens, the query included"));
  }
  void Sinks(int64_t sinks) {
    if (sinks >= 0) return;
    problems.push_back(Str("sinks: ", sinks, " is negative; use 0 for no sinks"));
  }
};

void CheckS2(const AttentionPattern& pattern, int64_t kv_heads, Checks& checks) {
  const S2Options& s2 = pattern.s2;
  checks.BlockSize("s2.block_size", s2.block_size);
  checks.Range("s2.local_blocks", s2.local_blocks, 1, kMaxBlocks);
  checks.Range("s2.stride_blocks", s2.stride_blocks, 1, kMaxBlocks);
  checks.Range("s2.head_step", s2.head_step, 0, kMaxBlocks);
  checks.Range("s2.head_offset", s2.head_offset, 0, kMaxBlocks);
  checks.Range("s2.dense_heads", s2.dense_heads, 0, kv_heads);
  std::vector<std::string>& problems = checks.problems;
  if (s2.homogeneous && s2.dense_heads > 0) {
    problems.push_back(Str("s2.dense_heads: ", s2.dense_heads,
                           " with s2.homogeneous: true, which gives all heads one pattern; set "
                           "one of the two back to its default"));
  }
  if (s2.homogeneous && s2.head_step > 0) {
    problems.push_back(Str("s2.head_step: ", s2.head_step,
                           " has no effect with s2.homogeneous: true; remove one of the two"));
  }
  if (!problems.empty() || s2.homogeneous || s2.allow_incomplete_coverage) return;
  const double coverage = pattern.Coverage(kv_heads);
  if (coverage < 1) {
    problems.push_back(
        Str("s2.stride_blocks: ", s2.stride_blocks, " with ", kv_heads, " kv heads and head_step ",
            pattern.HeadStep(kv_heads), " lets all heads together reach only ", Percent(coverage),
            " of the distant blocks; use head_step 1 with stride_blocks <= ", kv_heads,
            ", or dense_heads: 1, or allow_incomplete_coverage: true"));
  }
}

void CheckRandom(const RandomBlocksOptions& random, Checks& checks) {
  checks.BlockSize("random_blocks.block_size", random.block_size);
  if (!(random.density > 0 && random.density <= 1)) {
    checks.problems.push_back(Str("random_blocks.density: ", random.density,
                                  " is not above 0 and at most 1; it is the share of tiles that "
                                  "are visible"));
  }
  if (random.seed < 0) {
    checks.problems.push_back(
        Str("random_blocks.seed: ", random.seed, " is negative; use 0 or more"));
  }
  checks.Range("random_blocks.mean_blocks", random.mean_blocks, 1, kMaxBlocks);
  if (random.mean_blocks >= 1) {
    checks.Range("random_blocks.min_blocks", random.min_blocks, 1, random.mean_blocks);
  }
}

// end - begin and begin + length in the arithmetic modulo 2^64, so that lengths come back as they
// were given however large they are.
int64_t LengthOf(int64_t begin, int64_t end) {
  return static_cast<int64_t>(static_cast<uint64_t>(end) - static_cast<uint64_t>(begin));
}
int64_t EndOf(int64_t begin, int64_t length) {
  return static_cast<int64_t>(static_cast<uint64_t>(begin) + static_cast<uint64_t>(length));
}

void CheckSegments(const char* field, const std::vector<int64_t>& ends, Checks& checks) {
  if (ends.empty()) {
    checks.problems.push_back(
        Str(field, ": is missing; give the length of at least one segment, in tokens"));
  }
  int64_t begin = 0;
  for (const int64_t end : ends) {
    const int64_t length = LengthOf(begin, end);
    if (length < 1 || length > kMaxTokens) {
      checks.problems.push_back(Str(field, ": ", length, " is not between 1 and ", kMaxTokens,
                                    "; each one is a number of tokens"));
      return;
    }
    begin = end;
  }
}

void CheckSpans(const std::vector<HeadSpan>& spans, int64_t kv_heads, Checks& checks) {
  if (static_cast<int64_t>(spans.size()) != kv_heads) {
    checks.problems.push_back(
        Str("spans.head: ", spans.size(), " entries for ", kv_heads,
            " kv heads; give one for each kv head, which its query heads share"));
  }
  for (size_t h = 0; h < spans.size(); ++h) {
    const std::string field = Str("spans.head[", h, "].");
    const HeadSpan& span = spans[h];
    if (span.window == 0 && span.sinks != 0) {
      checks.problems.push_back(Str(field, "sinks: ", span.sinks,
                                    " has no effect on a head without a window, which sees all "
                                    "earlier tokens; give a window or leave it out"));
    } else if (span.window != 0) {
      checks.Range(field + "window", span.window, 1, kMaxTokens);
      checks.Range(field + "sinks", span.sinks, 0, kMaxTokens);
    }
  }
}

std::string WindowText(int64_t window, int64_t sinks) {
  return sinks > 0 ? Str("window ", window, " sinks ", sinks) : Str("window ", window);
}

std::string S2Text(const S2Options& s2) {
  std::string text =
      Str("s2 block ", s2.block_size, " local ", s2.local_blocks, " stride ", s2.stride_blocks);
  if (s2.homogeneous) text += " homogeneous";
  if (s2.head_step > 0) text += Str(" step ", s2.head_step);
  if (s2.head_offset > 0) text += Str(" offset ", s2.head_offset);
  if (s2.dense_heads > 0) text += Str(" dense ", s2.dense_heads);
  if (s2.phase == StridePhase::kRow) text += " phase row";
  return text;
}

// Checkpoints compare this text: "draw 2" says that tiles are drawn otherwise than they once were.
std::string RandomText(const RandomBlocksOptions& random) {
  char density[32];  // the shortest text that reads back as the same number
  const auto end = std::to_chars(density, density + sizeof density, random.density).ptr;
  std::string text =
      Str("random blocks ", random.block_size, " draw 2 density ", std::string(density, end));
  if (random.mean_blocks > 1) {
    text += Str(" tiles mean ", random.mean_blocks, " min ", random.min_blocks);
  }
  text += Str(" seed ", random.seed);
  if (random.bidirectional) text += " bidirectional";
  if (random.per_head) text += " per head";
  if (!random.own_block) text += " without own block";
  if (random.phase == StridePhase::kRow) text += " phase row";
  return text;
}

std::string SegmentsText(std::string text, const std::vector<int64_t>& ends) {
  int64_t begin = 0;
  for (const int64_t end : ends) text += Str(" ", LengthOf(std::exchange(begin, end), end));
  return text;
}

std::vector<int64_t> Ends(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> ends;
  int64_t end = 0;
  for (const int64_t length : lengths) ends.push_back(end = EndOf(end, length));
  return ends;
}

std::string SpansText(const std::vector<HeadSpan>& spans) {
  std::string text = "spans";
  for (size_t h = 0; h < spans.size(); ++h) {
    text += h == 0 ? " " : ", ";
    text += spans[h].window == 0 ? "causal" : WindowText(spans[h].window, spans[h].sinks);
  }
  return text;
}

}  // namespace

AttentionPattern AttentionPattern::Full() { return {.kind = PatternKind::kFull}; }

AttentionPattern AttentionPattern::Causal() { return {}; }

AttentionPattern AttentionPattern::Window(int64_t window, int64_t sinks, bool bidirectional) {
  return {.kind = PatternKind::kWindow,
          .window = window,
          .sinks = sinks,
          .bidirectional = bidirectional};
}

AttentionPattern AttentionPattern::S2(const S2Options& s2) {
  return {.kind = PatternKind::kS2, .s2 = s2};
}

AttentionPattern AttentionPattern::GlobalWindow(int64_t window, int64_t global_tokens,
                                                bool bidirectional) {
  return {.kind = PatternKind::kGlobalWindow,
          .window = window,
          .bidirectional = bidirectional,
          .global_tokens = global_tokens};
}

AttentionPattern AttentionPattern::Power(const PowerOptions& power) {
  return {.kind = PatternKind::kPower, .power = power};
}

AttentionPattern AttentionPattern::Dilated(const DilatedOptions& dilated) {
  return {.kind = PatternKind::kDilated, .dilated = dilated};
}

AttentionPattern AttentionPattern::Prefix(int64_t prefix) {
  return {.kind = PatternKind::kPrefix, .prefix = prefix};
}

AttentionPattern AttentionPattern::SharedQuestion(const std::vector<int64_t>& lengths) {
  return {.kind = PatternKind::kSharedQuestion, .segment_ends = Ends(lengths)};
}

AttentionPattern AttentionPattern::CausalBlockwise(const std::vector<int64_t>& lengths) {
  return {.kind = PatternKind::kCausalBlockwise, .segment_ends = Ends(lengths)};
}

AttentionPattern AttentionPattern::BlockCausal(int64_t block_size) {
  return {.kind = PatternKind::kBlockCausal, .block_size = block_size};
}

AttentionPattern AttentionPattern::RandomBlocks(const RandomBlocksOptions& random) {
  return {.kind = PatternKind::kRandomBlocks, .random = random};
}

AttentionPattern AttentionPattern::Spans(std::vector<HeadSpan> spans) {
  return {.kind = PatternKind::kSpans, .spans = std::move(spans)};
}

std::vector<std::string> AttentionPattern::Problems(int64_t kv_heads) const {
  Checks checks;
  if (kv_heads < 1) {
    return {Str("kv heads: ", kv_heads, " is not at least 1; use 1 or more")};
  }
  switch (kind) {
    case PatternKind::kFull:
    case PatternKind::kCausal:
      break;
    case PatternKind::kWindow:
      checks.Window(window);
      checks.Sinks(sinks);
      break;
    case PatternKind::kS2:
      CheckS2(*this, kv_heads, checks);
      break;
    case PatternKind::kGlobalWindow:
      checks.Window(window);
      checks.Range("global_tokens", global_tokens, 0, kMaxTokens);
      break;
    case PatternKind::kPower:
      checks.BlockSize("power.block_size", power.block_size);
      checks.Range("power.local_blocks", power.local_blocks, 1, kMaxBlocks);
      checks.Range("power.sink_blocks", power.sink_blocks, 0, kMaxBlocks);
      break;
    case PatternKind::kDilated:
      checks.BlockSize("dilated.block_size", dilated.block_size);
      checks.Range("dilated.neighbours", dilated.neighbours, 1, kMaxBlocks);
      checks.Range("dilated.dilation", dilated.dilation, 1, kMaxBlocks);
      break;
    case PatternKind::kPrefix:
      checks.Range("prefix", prefix, 0, kMaxTokens);
      break;
    case PatternKind::kSharedQuestion:
      CheckSegments("shared_question.segment", segment_ends, checks);
      break;
    case PatternKind::kCausalBlockwise:
      CheckSegments("causal_blockwise.segment", segment_ends, checks);
      break;
    case PatternKind::kBlockCausal:
      checks.BlockSize("block_causal.block_size", block_size);
      break;
    case PatternKind::kRandomBlocks:
      CheckRandom(random, checks);
      break;
    case PatternKind::kSpans:
      CheckSpans(spans, kv_heads, checks);
      break;
  }
  return checks.problems;
}

bool AttentionPattern::LooksAhead() const {
  switch (kind) {
    case PatternKind::kFull:
    case PatternKind::kBlockCausal:
      return true;
    case PatternKind::kPrefix:
      return prefix > 1;
    case PatternKind::kWindow:
    case PatternKind::kGlobalWindow:
      return bidirectional;
    case PatternKind::kDilated:
      return dilated.bidirectional;
    case PatternKind::kRandomBlocks:
      return random.bidirectional;
    case PatternKind::kCausal:
    case PatternKind::kS2:
    case PatternKind::kPower:
    case PatternKind::kSharedQuestion:
    case PatternKind::kCausalBlockwise:
    case PatternKind::kSpans:
      break;
  }
  return false;
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
  const auto both = [](std::string text, bool bidirectional) {
    return bidirectional ? text + " bidirectional" : text;
  };
  switch (kind) {
    case PatternKind::kFull:
      return "full";
    case PatternKind::kCausal:
      return "causal";
    case PatternKind::kWindow:
      return both(WindowText(window, sinks), bidirectional);
    case PatternKind::kS2:
      return S2Text(s2);
    case PatternKind::kGlobalWindow:
      return both(Str("global window ", window, " global ", global_tokens), bidirectional);
    case PatternKind::kPower:
      return Str("power block ", power.block_size, " local ", power.local_blocks, " sinks ",
                 power.sink_blocks);
    case PatternKind::kDilated:
      return both(Str("dilated block ", dilated.block_size, " neighbours ", dilated.neighbours,
                      " dilation ", dilated.dilation),
                  dilated.bidirectional);
    case PatternKind::kPrefix:
      return Str("prefix ", prefix);
    case PatternKind::kSharedQuestion:
      return SegmentsText("shared question", segment_ends);
    case PatternKind::kCausalBlockwise:
      return SegmentsText("causal blockwise", segment_ends);
    case PatternKind::kBlockCausal:
      return Str("block causal ", block_size);
    case PatternKind::kRandomBlocks:
      return RandomText(random);
    case PatternKind::kSpans:
      break;
  }
  return SpansText(spans);
}

}  // namespace longspan::ops
