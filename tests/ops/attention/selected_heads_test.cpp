// Masks of some of the kv heads, in any order and repeated: the same entries as in the mask of all
// heads, and attention that sees what those heads see, from every implementation.
#include <gtest/gtest.h>

#include <algorithm>

#include "ops/attention/block_rows.h"
#include "ops/core/error.h"
#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::BlockMask;
using ops::BlockRun;

const std::vector<std::vector<int32_t>> kSelections = {{2, 0, 2}, {3}, {1, 0, 3, 2}, {3, 3}};

std::vector<int> Flat(std::span<const BlockRun> runs) {
  std::vector<int> numbers;
  for (const BlockRun& run : runs) {
    numbers.insert(numbers.end(), {run.first, run.count, run.step, static_cast<int>(run.partial)});
  }
  return numbers;
}

// `selected` against the heads of `mask`: entries, pairs, needed keys and who sees whom.
void ExpectSelected(const BlockMask& mask, const BlockMask& selected,
                    const std::vector<int32_t>& heads) {
  ASSERT_EQ(selected.kv_heads(), static_cast<int64_t>(heads.size()));
  EXPECT_EQ(selected.queries(), mask.queries());
  EXPECT_EQ(selected.keys(), mask.keys());
  EXPECT_LE(selected.patterns(), std::min(selected.kv_heads(), mask.patterns()));
  int64_t total = 0;
  for (size_t i = 0; i < heads.size(); ++i) {
    const auto h = static_cast<int64_t>(i);
    const int64_t own = selected.pattern_of(h), other = mask.pattern_of(heads[i]);
    int64_t pairs = 0;
    for (int64_t row = 0; row < mask.queries().size(); ++row) {
      EXPECT_EQ(Flat(selected.row_runs().Row(own, row)), Flat(mask.row_runs().Row(other, row)));
      pairs += selected.PairsOfRow(own, row);
    }
    for (int64_t column = 0; column < mask.keys().size(); ++column) {
      EXPECT_EQ(Flat(selected.column_runs().Row(own, column)),
                Flat(mask.column_runs().Row(other, column)));
    }
    EXPECT_EQ(selected.VisiblePairs(h), mask.VisiblePairs(heads[i]));
    EXPECT_EQ(pairs, mask.VisiblePairs(heads[i]));
    EXPECT_EQ(selected.NeededKeys(h), mask.NeededKeys(heads[i]));
    EXPECT_EQ(selected.Ascii(h), mask.Ascii(heads[i]));
    total += pairs;
  }
  EXPECT_EQ(selected.TotalVisiblePairs(), total);
}

TEST(SelectedHeadsTest, MasksHoldTheEntriesOfTheirHeads) {
  for (const MaskCase& c : SampleMaskCases(120, 31)) {
    SCOPED_TRACE(c.Name());
    const auto mask = BuildMask(c);
    for (const std::vector<int32_t>& heads : kSelections) {
      ExpectSelected(*mask, *mask->SelectHeads(heads), heads);
      const auto built = BlockMask::Build(c.pattern.pattern, c.kv_heads, c.documents.documents,
                                          c.shard.queries, c.shard.keys, heads);
      ExpectSelected(*mask, *built, heads);
    }
    if (testing::Test::HasFailure()) return;  // one case tells enough
  }
}

TEST(SelectedHeadsTest, SelectionsAndChoicesOfSelections) {
  const auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::FromEnds(600, {{130, 600}}));
  const auto all = ops::BlockList::All(*documents);
  const auto mask = BlockMask::Build(AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 4}),
                                     4, documents, all, all);
  const std::vector<int32_t> first = {3, 1, 2}, second = {2, 2, 0}, both = {2, 2, 3};
  const auto chosen = mask->SelectHeads(first);
  ExpectSelected(*mask, *chosen->SelectHeads(second), both);
  const std::vector<int32_t> none;
  EXPECT_EQ(mask->SelectHeads(none)->kv_heads(), 0);
  EXPECT_EQ(mask->SelectHeads(none)->TotalVisiblePairs(), 0);
  EXPECT_TRUE(mask->SelectHeads(none)->empty());
  const std::vector<int32_t> missing = {0, 4}, negative = {-1};
  EXPECT_THROW(mask->SelectHeads(missing), InvalidArgument);
  EXPECT_THROW(mask->SelectHeads(negative), InvalidArgument);
  EXPECT_THROW(BlockMask::Build(mask->pattern(), 4, documents, all, all, missing), InvalidArgument);
  // A choice of all blocks leaves every pair of a selection, so Visible() is asked as before.
  ops::KeptBlocks kept;
  for (size_t row = 0; row < first.size() * all.ids.size(); ++row) {
    kept.blocks.insert(kept.blocks.end(), all.ids.begin(), all.ids.end());
    kept.offsets.push_back(static_cast<int64_t>(kept.blocks.size()));
  }
  const auto restricted = chosen->Restrict(kept);
  for (int64_t h = 0; h < 3; ++h) {
    EXPECT_EQ(restricted->VisiblePairs(h), mask->VisiblePairs(first[static_cast<size_t>(h)]));
    EXPECT_EQ(restricted->rule_head(h), chosen->rule_head(h));
  }
}

// Heads `heads` of a [rows, all, width] array.
Vec HeadsOf(const Vec& x, int64_t all, int64_t width, const std::vector<int64_t>& heads) {
  Vec picked;
  for (size_t row = 0; row * static_cast<size_t>(all * width) < x.size(); ++row) {
    for (const int64_t h : heads) {
      const auto first = x.begin() + (static_cast<int64_t>(row) * all + h) * width;
      picked.insert(picked.end(), first, first + width);
    }
  }
  return picked;
}

void ExpectAttention(Context& ctx, AttentionCase c, const std::vector<int32_t>& selection) {
  SCOPED_TRACE(c.Name());
  const AttentionInputs whole = MakeInputs(c);
  const AttentionRun want = RunNaive(c, whole);
  const auto mask = BuildMask(c.mask_case)->SelectHeads(selection);
  const int64_t heads = c.heads(), kv_heads = c.mask_case.kv_heads;
  std::vector<int64_t> of_kv(selection.begin(), selection.end()), of_query;
  for (const int64_t h : of_kv) {
    for (int64_t g = 0; g < c.group; ++g) of_query.push_back(h * c.group + g);
  }
  AttentionInputs in = whole;
  for (Vec* x : {&in.q, &in.d_out}) *x = HeadsOf(*x, heads, c.dim, of_query);
  for (Vec* x : {&in.k, &in.v}) *x = HeadsOf(*x, kv_heads, c.dim, of_kv);
  in.dlse = HeadsOf(in.dlse, heads, 1, of_query);
  c.mask_case.kv_heads = static_cast<int64_t>(selection.size());
  for (const std::string& name : ImplementationsFor(ctx, c)) {
    SCOPED_TRACE(name);
    const AttentionRun run = RunAttention(ctx, c, in, name, mask);
    const double tolerance = Tolerance(name, c.dtype);
    EXPECT_LT(RelMax(run.o, HeadsOf(want.o, heads, c.dim, of_query)), tolerance);
    EXPECT_LT(RelMax(run.dq, HeadsOf(want.dq, heads, c.dim, of_query)), tolerance);
    EXPECT_LT(RelMax(run.dk, HeadsOf(want.dk, kv_heads, c.dim, of_kv)), tolerance);
    EXPECT_LT(RelMax(run.dv, HeadsOf(want.dv, kv_heads, c.dim, of_kv)), tolerance);
  }
}

TEST(SelectedHeadsTest, EveryImplementationSeesWhatTheHeadsSee) {
  Context ctx = OpContext(1);
  const auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::FromEnds(330, {{70, 330}}));
  const auto all = ops::BlockList::All(*documents);
  const std::vector<NamedPattern> patterns = {
      {"s2", AttentionPattern::S2({.block_size = 32, .local_blocks = 1, .stride_blocks = 4})},
      {"s2 dense", AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 3, .dense_heads = 1})},
      {"spans", AttentionPattern::Spans({{50, 3}, {}, {7, 0}, {120, 70}})},
      {"random",
       AttentionPattern::RandomBlocks({.block_size = 16, .density = 0.4, .per_head = true})}};
  uint64_t seed = 900;
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    if (dtype == DType::kF64 && OnCuda()) continue;
    for (size_t p = 0; p < patterns.size(); ++p) {
      const MaskCase mask{patterns[p], {"two", documents}, {"whole", all, all}, 4};
      AttentionCase c{.mask_case = mask, .dtype = dtype, .group = 1 + static_cast<int64_t>(p % 2)};
      c.seed = ++seed;
      ExpectAttention(ctx, c, kSelections[p]);
    }
  }
}

// The rows that a walk gives are those of the mask, in the order asked for, and so are the pairs.
TEST(BlockRowWalkTest, RowsAreThoseOfTheMask) {
  for (const MaskCase& c : SampleMaskCases(200, 32)) {
    SCOPED_TRACE(c.Name());
    const auto& documents = c.documents.documents;
    const auto all = ops::BlockList::All(*documents);
    const auto mask = BlockMask::Build(c.pattern.pattern, c.kv_heads, documents, all, all);
    const ops::BlockRowWalk walk(c.pattern.pattern, c.kv_heads, documents);
    ASSERT_EQ(walk.patterns(), mask->patterns());
    std::vector<int64_t> heads(static_cast<size_t>(mask->patterns()));
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      EXPECT_EQ(walk.pattern_of(h), mask->pattern_of(h));
      ++heads[static_cast<size_t>(mask->pattern_of(h))];
    }
    for (int64_t p = 0; p < mask->patterns(); ++p) {
      EXPECT_EQ(walk.heads_of(p), heads[static_cast<size_t>(p)]);
      const auto expect_row = [&](int32_t block, std::span<const BlockRun> runs) {
        EXPECT_EQ(Flat(runs), Flat(mask->row_runs().Row(p, block)));
        int64_t pairs = 0;
        for (const BlockRun& run : runs) pairs += walk.Pairs(p, block, run);
        EXPECT_EQ(pairs, mask->PairsOfRow(p, block));
      };
      std::vector<int32_t> visited;
      walk.ForEach(p, [&](int32_t block, std::span<const BlockRun> runs) {
        visited.push_back(block);
        expect_row(block, runs);
      });
      EXPECT_EQ(visited, all.ids);
      visited.clear();
      walk.ForEach(p, c.shard.queries.ids, [&](int32_t block, std::span<const BlockRun> runs) {
        visited.push_back(block);
        expect_row(block, runs);
      });
      EXPECT_EQ(visited, c.shard.queries.ids);
    }
    if (testing::Test::HasFailure()) return;  // one case tells enough
  }
  EXPECT_THROW(
      ops::BlockRowWalk(AttentionPattern::Window(0), 1,
                        std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, 64))),
      InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
