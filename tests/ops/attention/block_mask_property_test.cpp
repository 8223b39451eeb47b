// BlockMask against brute force over Visible(): the token pairs of every pair of blocks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <set>

#include "ops/attention/block_mask.h"
#include "ops/attention/token_sets.h"
#include "ops/core/error.h"
#include "ops/core/rng.h"
#include "tests/ops/attention/mask_cases.h"

namespace longspan::test {
namespace {

using ops::BlockKind;
using ops::BlockList;
using ops::BlockMask;
using ops::BlockRun;
using ops::BlockRuns;

using Entries = std::map<int32_t, BlockKind>;

// What one (head, query block) should hold, from Visible() alone.
struct Brute {
  std::vector<Entries> rows;     // by position in queries()
  std::vector<Entries> columns;  // by position in keys()
  int64_t pairs = 0;
};

Brute BruteForce(const MaskCase& c, const BlockMask& mask, int64_t head) {
  const ops::Documents& documents = *c.documents.documents;
  const int64_t length = documents.row_length;
  Brute brute{.rows = std::vector<Entries>(c.shard.queries.ids.size()),
              .columns = std::vector<Entries>(c.shard.keys.ids.size())};
  for (size_t i = 0; i < brute.rows.size(); ++i) {
    const int32_t q = c.shard.queries.ids[i];
    const int64_t q0 = ops::BlockFirstToken(length, q), nq = ops::BlockTokens(length, q);
    for (size_t j = 0; j < brute.columns.size(); ++j) {
      const int32_t k = c.shard.keys.ids[j];
      const int64_t k0 = ops::BlockFirstToken(length, k), nk = ops::BlockTokens(length, k);
      int64_t seen = 0;
      for (int64_t a = q0; a < q0 + nq; ++a) {
        for (int64_t b = k0; b < k0 + nk; ++b) seen += ops::Visible(mask.rule(), head, a, b);
      }
      if (seen == 0) continue;
      brute.pairs += seen;
      const BlockKind kind = seen == nq * nk ? BlockKind::kFull : BlockKind::kPartial;
      brute.rows[i][k] = kind;
      brute.columns[j][q] = kind;
    }
  }
  return brute;
}

// The entries of one row, checking the canonical order and that none occurs twice.
Entries Expand(std::span<const BlockRun> runs) {
  Entries entries;
  for (size_t i = 0; i < runs.size(); ++i) {
    EXPECT_GT(runs[i].count, 0);
    EXPECT_GE(runs[i].step, 1);
    if (i > 0) {
      EXPECT_TRUE(runs[i - 1].partial < runs[i].partial ||
                  (runs[i - 1].partial == runs[i].partial && runs[i - 1].first < runs[i].first));
    }
    for (int32_t n = 0; n < runs[i].count; ++n) {
      EXPECT_TRUE(entries.emplace(runs[i].block(n), runs[i].kind()).second) << "overlap";
    }
  }
  return entries;
}

void ExpectBits(const MaskCase& c, const BlockMask& mask, int64_t head, int32_t q, int32_t k) {
  const ops::Documents& documents = *c.documents.documents;
  const int64_t q0 = ops::BlockFirstToken(documents.row_length, q);
  const int64_t k0 = ops::BlockFirstToken(documents.row_length, k);
  const int64_t nq = ops::BlockTokens(documents.row_length, q);
  const int64_t nk = ops::BlockTokens(documents.row_length, k);
  uint64_t of_keys[64], of_queries[64];
  ops::VisibleBitsOfKeys(mask.rule(), documents, head, q, k, of_keys);
  ops::VisibleBitsOfQueries(mask.rule(), documents, head, q, k, of_queries);
  for (int64_t a = 0; a < 64; ++a) {
    for (int64_t b = 0; b < 64; ++b) {
      const bool want = a < nq && b < nk && ops::Visible(mask.rule(), head, q0 + a, k0 + b);
      ASSERT_EQ(of_keys[b] >> a & 1, want) << "query " << q0 + a << " key " << k0 + b;
      ASSERT_EQ(of_queries[a] >> b & 1, want) << "query " << q0 + a << " key " << k0 + b;
    }
  }
}

void ExpectAscii(const MaskCase& c, const BlockMask& mask, int64_t head, const Brute& brute) {
  std::string want;
  for (const Entries& row : brute.rows) {
    for (const int32_t k : c.shard.keys.ids) {
      const auto found = row.find(k);
      want += found == row.end() ? '.' : found->second == BlockKind::kFull ? '#' : '+';
    }
    want += '\n';
  }
  EXPECT_EQ(mask.Ascii(head, 1000), want);
}

void Check(const MaskCase& c) {
  SCOPED_TRACE(c.Name());
  const auto mask = BlockMask::Build(c.pattern.pattern, c.kv_heads, c.documents.documents,
                                     c.shard.queries, c.shard.keys);
  int64_t total = 0;
  for (int64_t head = 0; head < c.kv_heads; ++head) {
    SCOPED_TRACE("head " + std::to_string(head));
    const Brute brute = BruteForce(c, *mask, head);
    const int64_t p = mask->pattern_of(head);
    int64_t entries = 0;
    for (size_t i = 0; i < brute.rows.size(); ++i) {
      const Entries row = Expand(mask->row_runs().Row(p, static_cast<int64_t>(i)));
      ASSERT_EQ(row, brute.rows[i]) << "query block " << c.shard.queries.ids[i];
      entries += static_cast<int64_t>(row.size());
    }
    std::vector<int32_t> needed;
    for (size_t j = 0; j < brute.columns.size(); ++j) {
      ASSERT_EQ(Expand(mask->column_runs().Row(p, static_cast<int64_t>(j))), brute.columns[j])
          << "key block " << c.shard.keys.ids[j];
      if (!brute.columns[j].empty()) needed.push_back(c.shard.keys.ids[j]);
    }
    std::sort(needed.begin(), needed.end());
    EXPECT_EQ(mask->NeededKeys(head), needed);
    EXPECT_EQ(mask->entries(p), entries);
    EXPECT_EQ(mask->VisiblePairs(head), brute.pairs);
    total += brute.pairs;
    ExpectAscii(c, *mask, head, brute);
    for (size_t i = 0; i < brute.rows.size(); ++i) {  // one bit mask per row keeps this quick
      if (!brute.rows[i].empty()) {
        const auto entry =
            std::next(brute.rows[i].begin(), static_cast<int64_t>(i % brute.rows[i].size()));
        ExpectBits(c, *mask, head, c.shard.queries.ids[i], entry->first);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
  EXPECT_EQ(mask->TotalVisiblePairs(), total);
  EXPECT_EQ(mask->empty(), total == 0);
}

// As many cases as the ci label allows hold every pair of a kind, documents and a shard.
TEST(BlockMaskPropertyTest, TheSampleHoldsAllPairs) {
  std::set<std::string> want, got;
  const auto pairs = [](const MaskCase& c, std::set<std::string>& out) {
    const std::string kind = Str(static_cast<int>(c.pattern.pattern.kind));
    out.insert({kind + " & " + c.documents.name, kind + " & " + c.shard.name,
                c.documents.name + " & " + c.shard.name, c.pattern.name});
  };
  for (const MaskCase& c : AllMaskCases()) pairs(c, want);
  for (const MaskCase& c : SampleMaskCases(300, 11)) pairs(c, got);
  std::vector<std::string> missing;
  std::set_difference(want.begin(), want.end(), got.begin(), got.end(),
                      std::back_inserter(missing));
  EXPECT_EQ(missing, std::vector<std::string>{});
  EXPECT_GT(want.size(), 400u);
}

void CheckAll(const std::vector<MaskCase>& cases) {
  for (const MaskCase& c : cases) {
    Check(c);
    if (testing::Test::HasFailure()) return;  // one case tells enough
  }
}

TEST(BlockMaskPropertyTest, SampledCases) { CheckAll(SampleMaskCases(300, 11)); }

// Draws for a case of its own.
class Dice {
 public:
  explicit Dice(uint64_t seed) : rng_(seed, StreamOf("random patterns")) {}
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng_.Below(next_++, static_cast<uint64_t>(high - low + 1)));
  }
  bool Coin() { return Between(0, 1) == 1; }
  int64_t BlockSize() { return int64_t{16} << Between(0, 4); }

 private:
  Philox rng_;
  uint64_t next_ = 0;
};

ops::AttentionPattern RandomPattern(Dice& dice, int64_t kv_heads) {
  using ops::AttentionPattern;
  const auto lengths = [&] {
    std::vector<int64_t> list;
    for (int64_t n = dice.Between(1, 5); n > 0; --n) list.push_back(dice.Between(1, 150));
    return list;
  };
  const auto phase = [&] {
    return dice.Coin() ? ops::StridePhase::kRow : ops::StridePhase::kDocument;
  };
  switch (dice.Between(0, 11)) {
    case 0:
      return AttentionPattern::Window(dice.Between(1, 300), dice.Between(0, 150), dice.Coin());
    case 1:
      return AttentionPattern::GlobalWindow(dice.Between(1, 300), dice.Between(0, 150),
                                            dice.Coin());
    case 2:
      return AttentionPattern::S2({.block_size = dice.BlockSize(),
                                   .local_blocks = dice.Between(1, 6),
                                   .stride_blocks = dice.Between(1, 12),
                                   .head_step = dice.Between(0, 5),
                                   .head_offset = dice.Between(0, 20),
                                   .dense_heads = dice.Between(0, 1),
                                   .allow_incomplete_coverage = true,
                                   .phase = phase()});
    case 3:
      return AttentionPattern::Power({dice.BlockSize(), dice.Between(1, 9), dice.Between(0, 3)});
    case 4:
      return AttentionPattern::Dilated(
          {dice.BlockSize(), dice.Between(1, 9), dice.Between(1, 9), dice.Coin()});
    case 5:
      return AttentionPattern::Prefix(dice.Between(0, 400));
    case 6:
      return AttentionPattern::SharedQuestion(lengths());
    case 7:
      return AttentionPattern::CausalBlockwise(lengths());
    case 8:
      return AttentionPattern::BlockCausal(dice.BlockSize());
    case 9: {
      std::vector<ops::HeadSpan> spans;
      for (int64_t h = 0; h < kv_heads; ++h) {
        if (dice.Coin()) {
          spans.push_back({});
        } else {
          spans.push_back({dice.Between(1, 200), dice.Between(0, 100)});
        }
      }
      return AttentionPattern::Spans(spans);
    }
    default: {
      const int64_t mean = dice.Between(1, 9);
      return AttentionPattern::RandomBlocks(
          {.block_size = dice.BlockSize(),
           .density = static_cast<double>(dice.Between(1, 100)) / 100,
           .seed = dice.Between(0, 1000000),
           .mean_blocks = mean,
           .min_blocks = dice.Between(1, mean),
           .bidirectional = dice.Coin(),
           .per_head = dice.Coin(),
           .own_block = dice.Coin(),
           .phase = phase()});
    }
  }
}

MaskCase RandomCase(Dice& dice) {
  const int64_t length = dice.Between(1, 700), rows = dice.Between(1, 2);
  const int64_t longest = dice.Coin() ? length : dice.Between(1, 300);
  std::vector<std::vector<int64_t>> ends(static_cast<size_t>(rows));
  for (auto& row : ends) {
    for (int64_t at = 0; at < length;) {
      at = std::min(length, at + dice.Between(1, longest));
      row.push_back(at);
    }
  }
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::FromEnds(length, ends));
  const auto some_blocks = [&] {
    std::vector<int32_t> ids;
    const bool all = dice.Coin();
    for (const int32_t id : BlockList::All(*documents).ids) {
      if (all || dice.Coin()) ids.push_back(id);
    }
    for (size_t i = ids.size(); i > 1; --i) {
      std::swap(ids[i - 1], ids[static_cast<size_t>(dice.Between(0, static_cast<int64_t>(i) - 1))]);
    }
    return BlockList::FromIds(*documents, ids);
  };
  const ops::AttentionPattern pattern = RandomPattern(dice, 3);
  const BlockList queries = some_blocks(), keys = some_blocks();
  return {.pattern = {pattern.ToString(), pattern},
          .documents = {Str("rows of ", length), documents},
          .shard = {Str(queries.size(), " against ", keys.size(), " blocks"), queries, keys},
          .kv_heads = 3};
}

// Other cases in every run; --gtest_random_seed=N repeats one.
TEST(BlockMaskPropertyTest, RandomCases) {
  const auto seed = static_cast<uint64_t>(testing::UnitTest::GetInstance()->random_seed());
  std::printf("--gtest_random_seed=%d\n", static_cast<int>(seed));
  for (uint64_t i = 0; i < 200; ++i) {
    Dice dice(seed * 1000 + i);
    Check(RandomCase(dice));
    ASSERT_FALSE(testing::Test::HasFailure()) << "case " << i << " of seed " << seed;
  }
}

TEST(BlockMaskPropertyTest, ExhaustiveCases) {
  const std::vector<MaskCase> cases = AllMaskCases();
  RecordProperty("cases", static_cast<int>(cases.size()));
  CheckAll(cases);
}

}  // namespace
}  // namespace longspan::test
