#include "launch/picture/mask_facts.h"

#include <algorithm>

namespace longspan::launch {
namespace {

double Triangle(double n) { return n * (n + 1) / 2; }

// Pairs and blocks that plain attention of this kind has on all rows of the documents.
struct Whole {
  double pairs, blocks;
};
Whole WholeOf(const ops::BlockMask& mask) {
  const ops::Documents& documents = mask.documents();
  const double rows = static_cast<double>(documents.rows);
  const double n = static_cast<double>(documents.row_length);
  const double b = static_cast<double>(ops::BlocksPerRow(documents.row_length));
  const bool both_ways = mask.pattern().LooksAhead();
  return both_ways ? Whole{rows * n * n, rows * b * b}
                   : Whole{rows * Triangle(n), rows * Triangle(b)};
}

}  // namespace

MaskFacts FactsOfHead(const ops::BlockMask& mask, int64_t kv_head) {
  const Whole whole = WholeOf(mask);
  MaskFacts facts;
  facts.visible_pairs = mask.VisiblePairs(kv_head);
  facts.visible_fraction = static_cast<double>(facts.visible_pairs) / whole.pairs;
  facts.block_fraction = static_cast<double>(mask.entries(mask.pattern_of(kv_head))) / whole.blocks;
  return facts;
}

MaskFacts FactsOf(const ops::BlockMask& mask) {
  MaskFacts facts;
  const double share = 1.0 / static_cast<double>(mask.kv_heads());
  for (const auto& heads : HeadsByPattern(mask)) {
    const MaskFacts head = FactsOfHead(mask, heads.front());
    const auto n = static_cast<int64_t>(heads.size());
    facts.visible_pairs += n * head.visible_pairs;
    facts.visible_fraction += static_cast<double>(n) * share * head.visible_fraction;
    facts.block_fraction += static_cast<double>(n) * share * head.block_fraction;
  }
  return facts;
}

std::shared_ptr<const ops::BlockMask> WholeRowMask(const ops::AttentionPattern& pattern,
                                                   int64_t kv_heads, int64_t length) {
  const auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, length));
  const ops::BlockList blocks = ops::BlockList::All(*documents);
  return ops::BlockMask::Build(pattern, kv_heads, documents, blocks, blocks);
}

std::vector<std::vector<int64_t>> HeadsByPattern(const ops::BlockMask& mask) {
  std::vector<std::vector<int64_t>> heads(static_cast<size_t>(mask.patterns()));
  for (int64_t h = 0; h < mask.kv_heads(); ++h) {
    heads[static_cast<size_t>(mask.pattern_of(h))].push_back(h);
  }
  return heads;
}

namespace {

// What a picture has to show of a pattern: cells of at most `cell` tokens, and more than the last
// `local` tokens. 0 cells: anything goes.
struct Detail {
  int64_t cell = 0, local = 0;
};
Detail DetailOf(const ops::AttentionPattern& pattern) {
  switch (pattern.kind) {
    case ops::PatternKind::kS2: {
      const ops::S2Options& s2 = pattern.s2;
      if (s2.stride_blocks == 1) return {};
      return {s2.block_size, s2.local_blocks * s2.block_size};
    }
    case ops::PatternKind::kPower:
      return {pattern.power.block_size, pattern.power.local_blocks * pattern.power.block_size};
    case ops::PatternKind::kDilated:
      if (pattern.dilated.dilation == 1) return {};
      return {pattern.dilated.block_size, 0};
    case ops::PatternKind::kRandomBlocks:
      return {pattern.random.block_size * pattern.random.mean_blocks, 0};
    default:
      return {};
  }
}

}  // namespace

int64_t PictureLength(const ops::AttentionPattern& pattern, int64_t length, int64_t cells) {
  const Detail detail = DetailOf(pattern);
  if (detail.cell == 0) return length;
  const int64_t fine = cells * std::max(ops::kMaskBlock, detail.cell);
  return fine >= length || detail.local > fine / 2 ? length : fine;
}

MaskFacts FactsOf(const ops::MobaPlan& plan) {
  constexpr double kCell = static_cast<double>(ops::kMaskBlock * ops::kMaskBlock);
  const double pairs = static_cast<double>(plan.NominalPairs());
  const double own = static_cast<double>(plan.own->VisiblePairs(0));
  const Whole whole = WholeOf(*plan.own);
  MaskFacts facts;
  facts.visible_pairs = plan.own->kv_heads() * plan.NominalPairs();
  facts.visible_fraction = pairs / whole.pairs;
  facts.block_fraction =
      (static_cast<double>(plan.own->entries(0)) + (pairs - own) / kCell) / whole.blocks;
  return facts;
}

std::shared_ptr<const ops::MobaPlan> WholeRowPlan(const ops::MobaOptions& options, int64_t kv_heads,
                                                  int64_t length) {
  return ops::MobaPlan::Build(
      options, kv_heads,
      std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, length)));
}

std::string MobaAscii(const ops::MobaPlan& plan, int64_t max_size) {
  std::string picture = plan.own->Ascii(0, max_size);
  if (plan.width() == 0) return picture;
  bool before_own = true;
  for (char& mark : picture) {
    if (mark == '\n') {
      before_own = true;
    } else if (mark != '.') {
      before_own = false;
    } else if (before_own) {
      mark = '+';
    }
  }
  return picture;
}

int64_t MobaPictureLength(const ops::MobaOptions& options, int64_t length, int64_t cells) {
  return std::min(length, cells * options.block_size);
}

}  // namespace longspan::launch
