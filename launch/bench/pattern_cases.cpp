#include "launch/bench/pattern_cases.h"

#include <algorithm>
#include <functional>
#include <map>
#include <utility>
#include <vector>

namespace longspan::launch {
namespace {

using ops::AttentionPattern;
using ops::PatternKind;

AttentionPattern ReadS2(CaseName& name, bool same) {
  ops::S2Options s2;
  s2.block_size = name.Take("B", 1);
  s2.local_blocks = name.Take("L", 1);
  s2.stride_blocks = name.Take("V", 1);
  s2.homogeneous = same;
  if (!same) s2.dense_heads = name.Take("N", 0, 0);
  return AttentionPattern::S2(s2);
}

AttentionPattern ReadPower(CaseName& name) {
  ops::PowerOptions power;
  power.block_size = name.Take("B", 1);
  power.local_blocks = name.Take("L", 1);
  power.sink_blocks = name.Take("S", 0, 1);
  return AttentionPattern::Power(power);
}

AttentionPattern ReadDilated(CaseName& name, bool ahead) {
  ops::DilatedOptions dilated;
  dilated.block_size = name.Take("B", 1);
  dilated.neighbours = name.Take("L", 1);
  dilated.dilation = name.Take("V", 1);
  dilated.bidirectional = ahead;
  return AttentionPattern::Dilated(dilated);
}

AttentionPattern ReadRandom(CaseName& name, bool ahead) {
  ops::RandomBlocksOptions random;
  random.block_size = name.Take("B", 1);
  random.density = static_cast<double>(name.Take("R", 1)) / 1000;
  random.mean_blocks = name.Take("M", 1, 1);
  random.min_blocks = name.Take("I", 1, 1);
  random.seed = name.Take("E", 0, 0);
  random.per_head = name.Take("H", 0, 0) != 0;
  random.bidirectional = ahead;
  return AttentionPattern::RandomBlocks(random);
}

AttentionPattern ReadSpans(CaseName& name, int64_t kv_heads) {
  const int64_t full = name.Take("F", 0), window = name.Take("W", 1), sinks = name.Take("S", 0, 0);
  if (full > kv_heads) name.Fail(Str("F", full, " is more than Hkv", kv_heads));
  std::vector<ops::HeadSpan> spans(static_cast<size_t>(kv_heads));
  for (size_t h = static_cast<size_t>(full); h < spans.size(); ++h) spans[h] = {window, sinks};
  return AttentionPattern::Spans(std::move(spans));
}

// In one expression the order in which sizes are taken would be open.
AttentionPattern ReadWindow(CaseName& name, bool ahead) {
  const int64_t window = name.Take("W", 1);
  return AttentionPattern::Window(window, name.Take("S", 0, 0), ahead);
}
AttentionPattern ReadGlobal(CaseName& name, bool ahead) {
  const int64_t window = name.Take("W", 1);
  return AttentionPattern::GlobalWindow(window, name.Take("S", 0), ahead);
}
AttentionPattern ReadLongGen(CaseName& name) {
  const int64_t window = name.Take("W", 1, 1984);
  return AttentionPattern::Window(window, name.Take("S", 0, 64));
}
AttentionPattern ReadSharedQuestion(CaseName& name) {
  const int64_t question = name.Take("Q", 1);
  return AttentionPattern::SharedQuestion({question, name.Take("A", 1)});
}

using Reader = std::function<AttentionPattern(CaseName&, int64_t kv_heads)>;

const std::map<std::string, Reader>& Readers() {
  static const std::map<std::string, Reader> readers = {
      {"full", [](CaseName&, int64_t) { return AttentionPattern::Full(); }},
      {"causal", [](CaseName&, int64_t) { return AttentionPattern::Causal(); }},
      {"window", [](CaseName& n, int64_t) { return ReadWindow(n, false); }},
      {"bwindow", [](CaseName& n, int64_t) { return ReadWindow(n, true); }},
      {"s2", [](CaseName& n, int64_t) { return ReadS2(n, false); }},
      {"s2same", [](CaseName& n, int64_t) { return ReadS2(n, true); }},
      {"global", [](CaseName& n, int64_t) { return ReadGlobal(n, false); }},
      {"bglobal", [](CaseName& n, int64_t) { return ReadGlobal(n, true); }},
      {"power", [](CaseName& n, int64_t) { return ReadPower(n); }},
      {"dilated", [](CaseName& n, int64_t) { return ReadDilated(n, false); }},
      {"bdilated", [](CaseName& n, int64_t) { return ReadDilated(n, true); }},
      {"prefix", [](CaseName& n, int64_t) { return AttentionPattern::Prefix(n.Take("S", 0)); }},
      {"sharedquestion", [](CaseName& n, int64_t) { return ReadSharedQuestion(n); }},
      {"causalblockwise",
       [](CaseName& n, int64_t) { return AttentionPattern::CausalBlockwise({n.Take("A", 1)}); }},
      {"blockcausal",
       [](CaseName& n, int64_t) { return AttentionPattern::BlockCausal(n.Take("B", 1)); }},
      {"random", [](CaseName& n, int64_t) { return ReadRandom(n, false); }},
      {"brandom", [](CaseName& n, int64_t) { return ReadRandom(n, true); }},
      {"spans", ReadSpans},
      {"longgen", [](CaseName& n, int64_t) { return ReadLongGen(n); }},
  };
  return readers;
}

void Cap(int64_t& value, int64_t largest) { value = std::min(value, largest); }

}  // namespace

bool IsPatternKind(const std::string& kind) { return Readers().contains(kind); }

AttentionPattern ReadPattern(const std::string& kind, int64_t kv_heads, CaseName& name) {
  return Readers().at(kind)(name, kv_heads);
}

SmallPattern SmallVersion(const AttentionPattern& pattern) {
  // A window of more than two blocks has fully visible ones.
  constexpr int64_t kWindow = 200, kSinks = 70, kBlock = 64;
  AttentionPattern p = pattern;
  int64_t tokens = 583;
  switch (p.kind) {
    case PatternKind::kFull:
    case PatternKind::kCausal:
      tokens = 203;
      break;
    case PatternKind::kWindow:
    case PatternKind::kGlobalWindow:
      Cap(p.window, kWindow);
      Cap(p.sinks, kSinks);
      Cap(p.global_tokens, kSinks);
      break;
    case PatternKind::kS2:
      Cap(p.s2.block_size, kBlock);
      Cap(p.s2.local_blocks, 2);
      // At least one period of the stride beyond the local blocks.
      tokens = p.s2.block_size * (p.s2.local_blocks + p.s2.stride_blocks + 2) + 11;
      break;
    case PatternKind::kPower:
      Cap(p.power.block_size, kBlock);
      Cap(p.power.local_blocks, 2);
      Cap(p.power.sink_blocks, 1);
      break;
    case PatternKind::kDilated:
      Cap(p.dilated.block_size, kBlock);
      Cap(p.dilated.neighbours, 2);
      Cap(p.dilated.dilation, 3);
      break;
    case PatternKind::kPrefix:
      Cap(p.prefix, 140);
      break;
    case PatternKind::kSharedQuestion:
    case PatternKind::kCausalBlockwise:
      for (size_t i = 0; i < p.segment_ends.size(); ++i) {
        Cap(p.segment_ends[i], 150 * (static_cast<int64_t>(i) + 1));
      }
      break;
    case PatternKind::kBlockCausal:
      Cap(p.block_size, 2 * kBlock);
      break;
    case PatternKind::kRandomBlocks:
      Cap(p.random.block_size, kBlock);
      Cap(p.random.mean_blocks, 2);
      Cap(p.random.min_blocks, p.random.mean_blocks);
      p.random.density = std::max(p.random.density, 0.3);
      break;
    case PatternKind::kSpans:
      for (ops::HeadSpan& span : p.spans) {
        Cap(span.window, kWindow);
        Cap(span.sinks, kSinks);
      }
      break;
  }
  return {std::move(p), tokens};
}

}  // namespace longspan::launch
