#include "ops/attention/document_rule.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "ops/attention/block_mask.h"

namespace longspan::ops {
namespace {

constexpr int64_t FloorBlock(int64_t token) { return token / kMaskBlock; }
constexpr int64_t CeilBlock(int64_t token) { return (token + kMaskBlock - 1) / kMaskBlock; }

// Adds the blocks in which a range begins and ends, from a place near the end of an ascending list.
void AddBorders(TokenRange range, std::vector<int64_t>& borders) {
  for (const int64_t block : {FloorBlock(range.begin), CeilBlock(range.begin),
                              FloorBlock(range.end), CeilBlock(range.end)}) {
    size_t i = borders.size();
    while (i > 0 && borders[i - 1] > block) --i;
    if (i > 0 && borders[i - 1] == block) continue;
    borders.insert(borders.begin() + static_cast<int64_t>(i), block);
  }
}

// Adds the borders of a set, except those of the parts that `known` has too. Keeps its memory from
// call to call.
class BorderCollector {
 public:
  void Add(const TokenSet& set, const TokenSet* known, std::vector<int64_t>& borders) {
    own_.clear();
    if (!set.strided.range.empty()) AddBorders(set.strided.range, own_);
    size_t k = 0;
    for (const TokenRange& part : set.parts) {
      if (known != nullptr) {
        while (k < known->parts.size() && known->parts[k].begin < part.begin) ++k;
        if (k < known->parts.size() && known->parts[k] == part) continue;
      }
      AddBorders(part, own_);
    }
    if (own_.empty()) return;
    scratch_.clear();
    std::set_union(borders.begin(), borders.end(), own_.begin(), own_.end(),
                   std::back_inserter(scratch_));
    borders.swap(scratch_);
  }

 private:
  std::vector<int64_t> own_, scratch_;
};

}  // namespace

DocumentRule::DocumentRule(const VisibleRule& rule, int64_t kv_head, TokenRange document)
    : rule_(rule), kind_(rule.kind), document_(document) {
  switch (kind_) {
    case PatternKind::kFull:
    case PatternKind::kBlockCausal:
      causal_ = false;
      break;
    case PatternKind::kGlobalWindow:
      if (!rule.bidirectional) kind_ = PatternKind::kWindow;  // global queries see causally
      [[fallthrough]];
    case PatternKind::kWindow:
      causal_ = !rule.bidirectional;
      window_ = rule.window;
      first_end_ = document.begin + rule.sinks;
      break;
    case PatternKind::kSpans: {
      const HeadSpan span = rule.spans[kv_head];
      kind_ = span.window == 0 ? PatternKind::kCausal : PatternKind::kWindow;
      window_ = std::min(span.window, rule.row_length);
      first_end_ = document.begin + span.sinks;
      break;
    }
    case PatternKind::kPrefix:
      first_end_ = document.begin + rule.sinks;
      break;
    case PatternKind::kS2: {
      if (kv_head >= rule.first_dense || rule.stride == 1) {
        kind_ = PatternKind::kCausal;
        break;
      }
      const int64_t origin = rule.phase_row ? 0 : document.begin / rule.block;
      const int64_t shift = (kv_head * rule.head_step + rule.head_offset) % rule.stride;
      residue_ = (origin % rule.stride + rule.stride - shift) % rule.stride;
      break;
    }
    case PatternKind::kRandomBlocks:
      key_ = RandomKeyOf(rule.seed, rule.per_head, kv_head);
      [[fallthrough]];
    case PatternKind::kDilated:
      causal_ = !rule.bidirectional;
      [[fallthrough]];
    case PatternKind::kPower:
      first_block_ = document.begin / rule.block;
      origin_ = rule.phase_row ? 0 : first_block_;
      break;
    case PatternKind::kCausal:
    case PatternKind::kSharedQuestion:
    case PatternKind::kCausalBlockwise:
      break;
  }
}

TokenRange DocumentRule::SegmentOf(int64_t t) const {
  const Segment segment = SegmentAt(rule_, t - document_.begin);
  return Intersect({document_.begin + segment.begin, document_.begin + segment.end}, document_);
}

DocumentRule::Unit DocumentRule::KeysAt(int64_t t, TokenRange within, TokenSet& fixed) const {
  if (IsOfBlocks(kind_)) return BlockKeysAt(t, within, fixed);
  fixed.Clear();
  const auto [begin, end] = document_;
  switch (kind_) {
    case PatternKind::kWindow:
      fixed.Append({begin, std::min(first_end_, end)});
      return {end, causal_, window_};
    case PatternKind::kGlobalWindow:  // in both directions
      fixed.Append({begin, t < first_end_ ? end : std::min(first_end_, end)});
      if (t < first_end_) return {std::min(first_end_, end), false, 0};
      return {end, false, window_};
    case PatternKind::kPrefix:
      fixed.Append({begin, t < first_end_ ? std::min(first_end_, end) : end});
      if (t < first_end_) return {std::min(first_end_, end), false, 0};
      return {end, true, 0};
    case PatternKind::kSharedQuestion: {
      const TokenRange segment = SegmentOf(t);
      if (segment.begin > begin) fixed.Append(SegmentOf(begin));
      fixed.Append({segment.begin, end});
      return {segment.end, true, 0};
    }
    case PatternKind::kCausalBlockwise: {
      const TokenRange segment = SegmentOf(t);
      fixed.Append({segment.end == end ? begin : segment.begin, end});
      return {segment.end, true, 0};
    }
    case PatternKind::kBlockCausal: {
      const int64_t block_end = std::min(end, (t / rule_.block + 1) * rule_.block);
      fixed.Append({begin, block_end});
      return {block_end, false, 0};
    }
    default:
      break;
  }
  fixed.Append(document_);
  return {end, causal_, 0};
}

DocumentRule::Unit DocumentRule::QueriesAt(int64_t t, TokenRange within, TokenSet& fixed) const {
  if (IsOfBlocks(kind_)) return BlockQueriesAt(t, within, fixed);
  fixed.Clear();
  const auto [begin, end] = document_;
  switch (kind_) {
    case PatternKind::kWindow:
    case PatternKind::kGlobalWindow:
      if (t < first_end_) {
        fixed.Append(document_);
        return {std::min(first_end_, end), causal_, 0};
      }
      if (kind_ == PatternKind::kGlobalWindow) fixed.Append({begin, first_end_});
      return {end, causal_, window_};
    case PatternKind::kPrefix:
      fixed.Append(document_);
      if (t < first_end_) return {std::min(first_end_, end), false, 0};
      return {end, true, 0};
    case PatternKind::kSharedQuestion: {
      const TokenRange segment = SegmentOf(t);
      fixed.Append({begin, segment.begin == begin ? end : segment.end});
      return {segment.end, true, 0};
    }
    case PatternKind::kCausalBlockwise: {
      const TokenRange segment = SegmentOf(t);
      fixed.Append({begin, segment.end});
      fixed.Append(SegmentOf(end - 1));
      return {segment.end, true, 0};
    }
    case PatternKind::kBlockCausal: {
      const int64_t block = t / rule_.block;
      fixed.Append({std::max(begin, block * rule_.block), end});
      return {std::min(end, (block + 1) * rule_.block), false, 0};
    }
    default:
      break;
  }
  fixed.Append(document_);
  return {end, causal_, 0};
}

DocumentRule::Unit DocumentRule::BlockKeysAt(int64_t t, TokenRange within, TokenSet& fixed) const {
  fixed.Clear();
  const int64_t block = t / rule_.block;
  const Unit unit{std::min(document_.end, (block + 1) * rule_.block), causal_, 0};
  if (kind_ == PatternKind::kS2) {
    const int64_t local = std::max(document_.begin, (block - rule_.local + 1) * rule_.block);
    fixed.Append({local, document_.end});
    fixed.strided = {{document_.begin, local}, rule_.block, rule_.stride, residue_};
  } else if (kind_ == PatternKind::kPower) {
    AppendBlocks(first_block_, first_block_ + rule_.sink_blocks, fixed);
    const int64_t farthest = block - first_block_;
    for (auto apart = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(farthest)));
         apart >= rule_.local; apart /= 2) {
      AppendBlocks(block - apart, block - apart + 1, fixed);
    }
    AppendBlocks(std::max(first_block_, block - rule_.local + 1), block + 1, fixed);
  } else if (kind_ == PatternKind::kDilated) {
    AppendDilated(Axis::kKeys, block, within, fixed);
  } else {
    AppendRandom(Axis::kKeys, block, within, fixed);
  }
  return unit;
}

DocumentRule::Unit DocumentRule::BlockQueriesAt(int64_t t, TokenRange within,
                                                TokenSet& fixed) const {
  fixed.Clear();
  const int64_t block = t / rule_.block, last_block = (document_.end - 1) / rule_.block;
  const Unit unit{std::min(document_.end, (block + 1) * rule_.block), causal_, 0};
  if (kind_ == PatternKind::kS2) {
    if (block % rule_.stride == residue_) {
      fixed.Append(document_);
    } else {
      AppendBlocks(block, block + rule_.local, fixed);
    }
  } else if (kind_ == PatternKind::kPower) {
    if (block - first_block_ < rule_.sink_blocks) {
      fixed.Append(document_);
      return unit;
    }
    AppendBlocks(block, block + rule_.local, fixed);
    for (int64_t apart = 1; block + apart <= last_block; apart *= 2) {
      if (apart >= rule_.local) AppendBlocks(block + apart, block + apart + 1, fixed);
    }
  } else if (kind_ == PatternKind::kDilated) {
    AppendDilated(Axis::kQueries, block, within, fixed);
  } else {
    AppendRandom(Axis::kQueries, block, within, fixed);
  }
  return unit;
}

// Blocks block + i * dilation with |i| < neighbours: before the block (keys), after it (queries),
// or both. The relation is symmetric.
void DocumentRule::AppendDilated(Axis axis, int64_t block, TokenRange within,
                                 TokenSet& fixed) const {
  const int64_t reach = (rule_.local - 1) * rule_.stride;
  const int64_t low = std::max(within.begin / rule_.block,
                               causal_ && axis == Axis::kQueries ? block : block - reach);
  const int64_t high = std::min((within.end - 1) / rule_.block,
                                causal_ && axis == Axis::kKeys ? block : block + reach);
  if (rule_.stride == 1) return AppendBlocks(low, high + 1, fixed);
  int64_t rest = (block - low) % rule_.stride;
  if (rest < 0) rest += rule_.stride;
  for (int64_t b = low + rest; b <= high; b += rule_.stride) AppendBlocks(b, b + 1, fixed);
}

void DocumentRule::AppendRandom(Axis axis, int64_t block, TokenRange within,
                                TokenSet& fixed) const {
  const bool keys = axis == Axis::kKeys;
  const uint32_t side = keys ? 1 : 0;  // that of the tiles that are listed
  int64_t low = within.begin / rule_.block, high = (within.end - 1) / rule_.block;
  if (causal_ && keys) high = std::min(high, block);
  if (causal_ && !keys) low = std::max(low, block);
  if (low > high) return;
  const auto own = static_cast<uint32_t>(TileOf(rule_, key_, 1 - side, block - origin_));
  const int64_t end = TileOf(rule_, key_, side, high - origin_) + 1;
  const auto append = [&](int64_t tile) {
    AppendBlocks(origin_ + TileBegin(rule_, key_, side, tile),
                 origin_ + TileBegin(rule_, key_, side, tile + 1), fixed);
  };
  constexpr int kChunk = 256;
  alignas(64) uint8_t hits[kChunk];
  const uint32_t own_row = Mix(own ^ key_.low), own_column = own * 0x9e3779b1u + key_.high;
  for (int64_t first = TileOf(rule_, key_, side, low - origin_); first < end; first += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - first));
    const auto tile = static_cast<uint32_t>(first);
    // PairHash of a whole chunk, in loops that the compiler vectorises.
    if (keys) {
      for (uint32_t i = 0; i < kChunk; ++i) {
        hits[i] = Mix(own_row ^ ((tile + i) * 0x9e3779b1u + key_.high)) <= rule_.limit;
      }
    } else {
      for (uint32_t i = 0; i < kChunk; ++i) {
        hits[i] = Mix(Mix((tile + i) ^ key_.low) ^ own_column) <= rule_.limit;
      }
    }
    for (int i = 0; i < n; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, hits + i, sizeof eight);
      for (; eight != 0; eight &= eight - 1) {
        const int at = i + std::countr_zero(eight) / 8;
        if (at < n) append(first + at);
      }
    }
  }
  if (rule_.own_block) {
    const TokenRange own_tokens =
        Intersect({block * rule_.block, (block + 1) * rule_.block}, document_);
    fixed.Unite({&own_tokens, 1});
  }
}

// The blocks of S2 see nested sets: the first one the most, the last one the least.
void DocumentRule::CollectStrided(TokenRange tokens, TokenRange within, VisibleSets& out) const {
  KeysAt(tokens.begin, within, out.any);
  KeysAt(tokens.end - 1, within, out.all);
  out.any.Clip(InOrder(Axis::kKeys, tokens.end - 1));
  out.all.Clip(InOrder(Axis::kKeys, tokens.begin));
}

void DocumentRule::Collect(Axis axis, TokenRange tokens, TokenRange within,
                           VisibleSets& out) const {
  thread_local TokenSet some, every;  // of one unit
  thread_local BorderCollector borders;
  out.borders.assign({FloorBlock(tokens.begin), FloorBlock(tokens.begin) + 1});
  if (kind_ == PatternKind::kS2 && axis == Axis::kKeys) {
    CollectStrided(tokens, within, out);
    borders.Add(out.any, nullptr, out.borders);
    borders.Add(out.all, &out.any, out.borders);
    return;
  }
  for (int64_t t = tokens.begin; t < tokens.end;) {
    const bool first_unit = t == tokens.begin;
    TokenSet& any = first_unit ? out.any : some;
    TokenSet& all = first_unit ? out.all : every;
    const Unit unit = At(axis, t, within, any);
    const int64_t last = std::min(unit.end, tokens.end) - 1;
    all = any;
    if (unit.window > 0) {
      const TokenRange near_some = Intersect({t - unit.window + 1, last + unit.window}, document_);
      const TokenRange near_all = Intersect({last - unit.window + 1, t + unit.window}, document_);
      any.Unite({&near_some, 1});
      if (!near_all.empty()) all.Unite({&near_all, 1});
    }
    if (unit.causal) {
      any.Clip(InOrder(axis, axis == Axis::kKeys ? last : t));
      all.Clip(InOrder(axis, axis == Axis::kKeys ? t : last));
    }
    borders.Add(any, nullptr, out.borders);
    borders.Add(all, &any, out.borders);
    if (!first_unit) {
      out.any.Unite(some.parts);
      out.all.IntersectWith(every.parts);
    }
    t = last + 1;
  }
}

}  // namespace longspan::ops
