// BlockMask against brute force over Visible(): the token pairs of every pair of blocks.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "ops/attention/block_mask.h"
#include "ops/attention/token_sets.h"
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

void CheckAll(const std::vector<MaskCase>& cases) {
  for (const MaskCase& c : cases) {
    Check(c);
    if (testing::Test::HasFailure()) return;  // one case tells enough
  }
}

TEST(BlockMaskPropertyTest, SampledCases) { CheckAll(SampleMaskCases(300, 11)); }

TEST(BlockMaskPropertyTest, ExhaustiveCases) {
  const std::vector<MaskCase> cases = AllMaskCases();
  RecordProperty("cases", static_cast<int>(cases.size()));
  CheckAll(cases);
}

}  // namespace
}  // namespace longspan::test
