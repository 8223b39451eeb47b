#include "data/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "data/permutation.h"
#include "data/sidecar.h"
#include "ops/core/error.h"
#include "tests/data/data_support.h"

namespace longspan::test {
namespace {

using data::KeyedPermutation;
using data::Mixture;
using data::PackRow;
using data::Row;
using data::RowSampler;
using data::RowSamplerOptions;
using Ids = std::vector<int32_t>;
using Offsets = std::vector<int64_t>;

TEST(PermutationTest, IsAPermutationAndDependsOnTheKey) {
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 65537}) {
    std::vector<int64_t> values;
    int64_t moved = 0;
    const KeyedPermutation a(n, 1), b(n, 2);
    for (int64_t i = 0; i < n; ++i) {
      values.push_back(a[i]);
      moved += a[i] != b[i];
    }
    std::sort(values.begin(), values.end());
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], i) << n;
    if (n >= 63) {
      EXPECT_GT(moved, n * 9 / 10) << n;
    }
  }
  EXPECT_THROW(KeyedPermutation(0, 1), InvalidArgument);
}

TEST(PermutationTest, EveryElementReachesEveryPlaceEquallyOften) {
  for (const int64_t n : {2, 3, 5, 13}) {
    const int keys = 20000;
    std::vector<std::vector<int>> count(static_cast<size_t>(n),
                                        std::vector<int>(static_cast<size_t>(n)));
    for (int key = 0; key < keys; ++key) {
      const KeyedPermutation permutation(n, static_cast<uint64_t>(key));
      for (int64_t i = 0; i < n; ++i) {
        ++count[static_cast<size_t>(i)][static_cast<size_t>(permutation[i])];
      }
    }
    const double expected = static_cast<double>(keys) / static_cast<double>(n);
    for (const auto& row : count) {
      for (const int c : row) EXPECT_NEAR(c, expected, 6 * std::sqrt(expected)) << n;
    }
  }
}

TEST(MixtureTest, ProportionsHoldAtEveryPrefix) {
  for (const std::vector<double>& weights : {std::vector<double>{1},
                                             {1, 1},
                                             {3, 1},
                                             {0.7, 0.2, 0.1},
                                             {1e-3, 1, 1e-2},
                                             {5, 5, 5, 5, 1}}) {
    const Mixture mixture(weights);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    const double bound = weights.size() == 2 ? 0.5 : static_cast<double>(weights.size()) / 2;
    std::vector<int64_t> taken(weights.size());
    for (int64_t i = 0; i < 20000; ++i) {
      const Mixture::Place place = mixture.Find(i);
      ASSERT_EQ(place.index, taken[static_cast<size_t>(place.source)]++) << i;
      for (size_t k = 0; k < weights.size(); ++k) {
        const double exact = static_cast<double>(i + 1) * weights[k] / total;
        ASSERT_NEAR(static_cast<double>(taken[k]), exact, bound + 1e-4) << i << " " << k;
      }
    }
  }
}

TEST(MixtureTest, FarSamplesNeedNoReplayAndKeepTheirShare) {
  const Mixture mixture({0.999999, 1e-6});
  int64_t rare = 0;
  const int64_t base = int64_t{1} << 42;
  for (int64_t i = 0; i < 3'000'000; ++i) rare += mixture.Find(base + i).source;
  EXPECT_NEAR(static_cast<double>(rare), 3, 1);
  const Mixture::Place a = mixture.Find(base), b = mixture.Find(base + 1);
  EXPECT_EQ(a.source == b.source, a.index + 1 == b.index);
}

TEST(MixtureTest, RefusesWeightsThatMeanNothing) {
  for (const double bad : {0.0, -1.0, std::nan(""), static_cast<double>(INFINITY)}) {
    ExpectContains(MessageOf<InvalidArgument>([&] { Mixture mixture({1, bad}); }), "source 1");
  }
  EXPECT_THROW(Mixture({}), InvalidArgument);
}

TEST(PackRowTest, DocumentMaskByHand) {
  // | 1 2 E | 3 E | 4 5 6 .. cut, the extra token is 7
  const Ids tokens = {1, 2, 99, 3, 99, 4, 5, 6, 7};
  const Row row = PackRow(tokens, Offsets{3, 5}, true);
  EXPECT_EQ(row.tokens, (Ids{1, 2, 99, 3, 99, 4, 5, 6}));
  EXPECT_EQ(row.labels, (Ids{2, 99, -1, 99, -1, 5, 6, 7}));
  EXPECT_EQ(row.positions, (Offsets{0, 1, 2, 0, 1, 0, 1, 2}));
  EXPECT_EQ(row.doc_ends, (Offsets{3, 5, 8}));
  const Row plain = PackRow(tokens, Offsets{3, 5}, false);
  EXPECT_EQ(plain.tokens, row.tokens);
  EXPECT_EQ(plain.labels, (Ids{2, 99, 3, 99, 4, 5, 6, 7}));
  EXPECT_EQ(plain.positions, (Offsets{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(plain.doc_ends, (Offsets{8}));
}

TEST(PackRowTest, DocumentsThatEndAtTheRowsEnd) {
  const Ids tokens = {1, 2, 99, 3};
  const Row at_end = PackRow(tokens, Offsets{3}, true);  // the extra token starts another document
  EXPECT_EQ(at_end.labels, (Ids{2, 99, -1}));
  EXPECT_EQ(at_end.doc_ends, (Offsets{3}));
  const Row behind = PackRow(tokens, Offsets{4}, true);  // the extra token is the document's last
  EXPECT_EQ(behind.labels, (Ids{2, 99, 3}));
  EXPECT_EQ(behind.doc_ends, (Offsets{3}));
  const Row single = PackRow(tokens, Offsets{1, 2, 3, 4}, true);  // documents of one token
  EXPECT_EQ(single.labels, (Ids{-1, -1, -1}));
  EXPECT_EQ(single.positions, (Offsets{0, 0, 0}));
  EXPECT_EQ(single.doc_ends, (Offsets{1, 2, 3}));
  EXPECT_THROW(PackRow(Ids{1}, Offsets{}, true), InvalidArgument);
}

TEST(PackRowTest, PaddingByHand) {
  // | 1 2 E . | 3 E . . | 4 (5), with . for padding
  const int32_t p = data::kPadding;
  const Row row = PackRow(Ids{1, 2, 99, p, 3, 99, p, p, 4, 5}, Offsets{3, 4, 6, 8}, true);
  EXPECT_EQ(row.tokens, (Ids{1, 2, 99, 0, 3, 99, 0, 0, 4}));
  EXPECT_EQ(row.labels, (Ids{2, 99, -1, -1, 99, -1, -1, -1, 5}));
  EXPECT_EQ(row.positions, (Offsets{0, 1, 2, 0, 0, 1, 0, 1, 0}));
  EXPECT_EQ(row.doc_ends, (Offsets{3, 4, 6, 8, 9}));
}

class RowSamplerTest : public testing::Test {
 protected:
  // Documents of 1..9 tokens; token ids count up through the dataset, so an id tells its place.
  Documents WriteCounting(const std::string& name, int documents, int32_t first = 0) const {
    Documents result;
    for (int d = 0; d < documents; ++d) {
      Ids ids(static_cast<size_t>(1 + d * 5 % 9));
      std::iota(ids.begin(), ids.end(), first);
      first += static_cast<int32_t>(ids.size());
      result.push_back(ids);
    }
    WriteDataset(temp_ / name, result);
    return result;
  }
  RowSamplerOptions Options(int64_t length, const std::vector<data::Source>& sources = {}) const {
    RowSamplerOptions options;
    options.sources = sources;
    if (sources.empty()) options.sources = {{temp_ / "set", 1}};
    options.context_length = length;
    return options;
  }
  const TempFolder temp_;
};

void ExpectSame(const Row& a, const Row& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.labels, b.labels);
  EXPECT_EQ(a.positions, b.positions);
  EXPECT_EQ(a.doc_ends, b.doc_ends);
}

TEST_F(RowSamplerTest, UnshuffledRowsFollowTheFile) {
  WriteDataset(temp_ / "set", {{1, 2, 99}, {3, 4, 5, 6, 7, 99}, {8, 99}});
  RowSamplerOptions options = Options(4);
  options.shuffle = false;
  const RowSampler sampler(options);
  EXPECT_EQ(sampler.RowsAvailable(), 2);  // 11 tokens: 0..4, 4..8, and 2 are left
  EXPECT_EQ(sampler.TokensAvailable(), 11);
  ExpectSame(sampler.Get(0), {{1, 2, 99, 3}, {2, 99, -1, 4}, {0, 1, 2, 0}, {3, 4}});
  ExpectSame(sampler.Get(1), {{4, 5, 6, 7}, {5, 6, 7, 99}, {0, 1, 2, 3}, {4}});
  for (const int64_t bad : {-1, 2, 3}) {
    ExpectContains(MessageOf<InvalidArgument>([&] { sampler.Get(bad); }), "hold 2 rows");
  }
}

TEST_F(RowSamplerTest, RowCountsAtTheEdges) {
  RowSamplerOptions options = Options(4);
  options.shuffle = false;
  for (int tokens = 5; tokens < 14; ++tokens) {
    WriteDataset(temp_ / "set", {Ids(static_cast<size_t>(tokens), 1)});
    EXPECT_EQ(RowSampler(options).RowsAvailable(), (tokens - 1) / 4) << tokens;
  }
  WriteDataset(temp_ / "set", {{1, 2}, {3, 4}});
  const std::string message = MessageOf<DataError>([&] { RowSampler sampler(options); });
  ExpectContains(message, "set.bin has 4 tokens in 2 documents");
  ExpectContains(message, "context_length 4 needs 5");
}

TEST_F(RowSamplerTest, UnshuffledSourcesFollowOneAnother) {
  WriteDataset(temp_ / "a", {Ids(9, 1)});
  WriteDataset(temp_ / "b", {Ids(5, 2)});
  RowSamplerOptions options = Options(4, {{temp_ / "a", 1}, {temp_ / "b", 1}});
  options.shuffle = false;
  const RowSampler sampler(options);
  EXPECT_EQ(sampler.RowsAvailable(), 3);
  EXPECT_EQ(sampler.Get(1).tokens, Ids(4, 1));
  EXPECT_EQ(sampler.Get(2).tokens, Ids(4, 2));
  options.sources[1].weight = 2;
  ExpectContains(MessageOf<InvalidArgument>([&] { RowSampler bad(options); }), "weighted");
}

// What an epoch must be: rows that chain to one stream, in which every document is whole (but for
// the stream's end) and occurs once, labelled by the rules.
void CheckEpoch(const RowSampler& sampler, int64_t epoch, int64_t length, bool mask,
                const Documents& documents) {
  std::map<int32_t, size_t> document_of, length_of;
  for (size_t d = 0; d < documents.size(); ++d) {
    for (const int32_t id : documents[d]) document_of[id] = d;
    length_of[documents[d].back()] = documents[d].size();
  }
  std::set<int32_t> seen;
  const int64_t rows = sampler.RowsAvailable();
  for (int64_t r = 0; r < rows; ++r) {
    const Row row = sampler.Get(epoch * rows + r);
    ASSERT_EQ(static_cast<int64_t>(row.tokens.size()), length);
    ASSERT_EQ(row.doc_ends.back(), length);
    ASSERT_TRUE(std::adjacent_find(row.doc_ends.begin(), row.doc_ends.end(),
                                   std::greater_equal<>()) == row.doc_ends.end());
    int64_t position = 0;
    for (size_t i = 0; i < row.tokens.size(); ++i) {
      const int32_t id = row.tokens[i];
      ASSERT_TRUE(seen.insert(id).second) << "token " << id << " occurs twice in an epoch";
      const bool last = length_of.contains(id);
      if (!last) {
        ASSERT_EQ(row.labels[i], id + 1);
      } else if (mask) {
        ASSERT_EQ(row.labels[i], data::kNoLabel);
      } else {
        ASSERT_EQ(documents[document_of.at(row.labels[i])].front(), row.labels[i]);
      }
      ASSERT_EQ(row.positions[i], mask ? position : static_cast<int64_t>(i));
      const auto end = static_cast<int64_t>(i) + 1;
      const bool is_end = std::count(row.doc_ends.begin(), row.doc_ends.end(), end) > 0;
      ASSERT_EQ(is_end, end == length || (mask && last));
      position = last ? 0 : position + 1;
    }
  }
  EXPECT_EQ(static_cast<int64_t>(seen.size()), rows * length);
}

TEST_F(RowSamplerTest, EveryTokenOccursOnceInEachEpoch) {
  const Documents documents = WriteCounting("set", 200);
  for (const bool mask : {true, false}) {
    for (const int64_t length : {1, 7, 64}) {
      RowSamplerOptions options = Options(length);
      options.document_mask = mask;
      const RowSampler sampler(options);
      for (int64_t epoch = 0; epoch < 3; ++epoch) {
        CheckEpoch(sampler, epoch, length, mask, documents);
      }
    }
  }
}

// With one document there is nothing to shuffle that could move the stream's ends.
TEST_F(RowSamplerTest, SingleDocumentsAreTrainedFromEndToEnd) {
  const int64_t length = 5;
  for (const int32_t size : {11, 12, 15}) {  // 0, 1 and 4 tokens behind the last row
    Ids ids(static_cast<size_t>(size));
    std::iota(ids.begin(), ids.end(), 0);
    WriteDataset(temp_ / "set", {ids});
    const RowSampler sampler(Options(length));
    const int64_t rows = sampler.RowsAvailable();
    std::map<int32_t, int> begins;  // first token of an epoch -> epochs
    std::set<int32_t> inputs, labels;
    for (int64_t epoch = 0; epoch < 100; ++epoch) {
      CheckEpoch(sampler, epoch, length, true, {ids});
      int32_t begin = size;
      for (int64_t r = 0; r < rows; ++r) {
        const Row row = sampler.Get(epoch * rows + r);
        begin = std::min(begin, row.tokens.front());
        inputs.insert(row.tokens.begin(), row.tokens.end());
        labels.insert(row.labels.begin(), row.labels.end());
        // A resumed run asks for this row first.
        EXPECT_EQ(RowSampler(Options(length)).Get(epoch * rows + r).tokens, row.tokens);
      }
      ++begins[begin];
    }
    const int64_t places = size - rows * length;
    EXPECT_EQ(static_cast<int64_t>(begins.size()), places);
    for (const auto& [begin, count] : begins) {
      EXPECT_LT(begin, places);
      EXPECT_GT(count, 50 / places) << begin;
    }
    EXPECT_EQ(inputs.size(), ids.size() - 1);
    EXPECT_EQ(labels.size(), ids.size() - 1);
  }
}

TEST_F(RowSamplerTest, EmptyDocumentsAreStepsOfNoLength) {
  HandMadeIndex index;
  index.dtype = 4;
  index.lengths = {0, 3, 0, 0, 4, 2, 0};
  index.offsets = {0, 0, 12, 12, 12, 28, 36};
  index.documents = {0, 1, 2, 3, 4, 5, 5, 6, 7};
  WriteText(temp_ / "set.idx", index.Bytes());
  std::string tokens;
  for (const int32_t id : {0, 1, 2, 10, 11, 12, 13, 20, 21}) Put(tokens, id);
  WriteText(temp_ / "set.bin", tokens);
  const Documents documents = {{0, 1, 2}, {10, 11, 12, 13}, {20, 21}};
  for (const int64_t length : {2, 4, 8}) {
    const RowSampler sampler(Options(length));
    for (int64_t epoch = 0; epoch < 20; ++epoch) {
      CheckEpoch(sampler, epoch, length, true, documents);
    }
    RowSamplerOptions in_order = Options(length);
    in_order.shuffle = false;
    CheckEpoch(RowSampler(in_order), 0, length, true, documents);
  }
}

TEST_F(RowSamplerTest, AlignedRowsByHand) {
  WriteDataset(temp_ / "set", {{1, 2, 99}, {3, 4, 5, 6, 7, 99}, {8, 9, 10, 99}, {11}});
  RowSamplerOptions options = Options(8);
  options.shuffle = false;
  options.alignment = 4;
  const RowSampler sampler(options);
  // | 1 2 99 . 3 4 5 6 | 7 99 . . 8 9 10 99 | and 11 . . . are left
  EXPECT_EQ(sampler.RowsAvailable(), 2);
  EXPECT_EQ(sampler.TokensAvailable(), 14);
  // The document that the row cuts goes on with the next row's first token.
  ExpectSame(sampler.Get(0), {{1, 2, 99, 0, 3, 4, 5, 6},
                              {2, 99, -1, -1, 4, 5, 6, 7},
                              {0, 1, 2, 0, 0, 1, 2, 3},
                              {3, 4, 8}});
  ExpectSame(sampler.Get(1), {{7, 99, 0, 0, 8, 9, 10, 99},
                              {99, -1, -1, -1, 9, 10, 99, -1},
                              {0, 1, 0, 1, 0, 1, 2, 3},
                              {2, 4, 8}});
  // A row may be the whole stream, and end in padding.
  options.context_length = 16;
  options.sources = {{temp_ / "whole", 1}};
  WriteDataset(temp_ / "whole", {{1, 2, 99}, {3, 4, 5, 6, 7, 99}, {11}});
  const Row row = RowSampler(options).Get(0);
  EXPECT_EQ(row.tokens, (Ids{1, 2, 99, 0, 3, 4, 5, 6, 7, 99, 0, 0, 11, 0, 0, 0}));
  EXPECT_EQ(row.doc_ends, (Offsets{3, 4, 10, 12, 13, 16}));
  EXPECT_EQ(row.labels.back(), data::kNoLabel);
}

// Rows of one epoch: every document begins on a border and is whole but for what rows cut or the
// ends of the stream leave out.
TEST_F(RowSamplerTest, AlignedEpochsKeepEveryToken) {
  const Documents documents = WriteCounting("set", 200);
  std::map<int32_t, size_t> document_of;
  int64_t tokens = 0;
  for (size_t d = 0; d < documents.size(); ++d) {
    for (const int32_t id : documents[d]) document_of[id] = d;
    tokens += static_cast<int64_t>(documents[d].size());
  }
  for (const int64_t alignment : {2, 4, 16}) {
    RowSamplerOptions options = Options(48);
    options.alignment = alignment;
    const RowSampler sampler(options), again(options);
    const int64_t rows = sampler.RowsAvailable();
    std::set<int32_t> ever;
    for (int64_t epoch = 0; epoch < 40; ++epoch) {
      std::set<int32_t> seen;
      for (int64_t r = 0; r < rows; ++r) {
        const Row row = sampler.Get(epoch * rows + r);
        if (r % 7 == 3) ExpectSame(row, again.Get(epoch * rows + r));  // as a resumed run does
        ASSERT_EQ(row.doc_ends.back(), 48);
        int64_t begin = 0;
        for (const int64_t end : row.doc_ends) {
          const auto first = static_cast<size_t>(begin);
          const bool padding = begin % alignment != 0;
          ASSERT_TRUE(!padding || end % alignment == 0) << "padding ends on a border";
          ASSERT_LT(padding ? end - begin : 0, alignment);
          for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
            ASSERT_EQ(row.positions[i], static_cast<int64_t>(i - first));
            if (padding) {
              ASSERT_EQ(row.labels[i], data::kNoLabel);
              continue;
            }
            const Ids& document = documents[document_of.at(row.tokens[i])];
            ASSERT_EQ(row.tokens[i], row.tokens[first] + static_cast<int32_t>(i - first));
            ASSERT_TRUE(seen.insert(row.tokens[i]).second) << "occurs twice in an epoch";
            const bool last = row.tokens[i] == document.back();
            ASSERT_EQ(row.labels[i], last ? data::kNoLabel : row.tokens[i] + 1);
            ASSERT_EQ(document_of.at(row.tokens[i]), document_of.at(row.tokens[first]));
          }
          // Only a row's first document may lack its beginning, only one at the row's end its end.
          if (!padding && begin > 0) {
            ASSERT_EQ(row.tokens[first], documents[document_of.at(row.tokens[first])].front());
          }
          begin = end;
        }
      }
      EXPECT_GT(static_cast<int64_t>(seen.size()), tokens - 48);
      ever.insert(seen.begin(), seen.end());
    }
    EXPECT_EQ(static_cast<int64_t>(ever.size()), tokens) << "some token is never trained on";
  }
}

TEST_F(RowSamplerTest, WhatAlignmentCannotDoIsRefused) {
  WriteDataset(temp_ / "set", {{1, 2, 3}, {4, 5}});
  RowSamplerOptions options = Options(8);
  options.alignment = 4;
  EXPECT_EQ(RowSampler(options).RowsAvailable(), 1) << "8 tokens with padding";
  options.context_length = 12;
  const std::string few = MessageOf<DataError>([&] { RowSampler sampler(options); });
  ExpectContains(few, "5 tokens in 2 documents (8 with data.align_documents)");
  ExpectContains(few, "context_length 12 needs 12");
  options.context_length = 6;
  ExpectContains(MessageOf<InvalidArgument>([&] { RowSampler sampler(options); }),
                 "context_length 6 must be a multiple of 4");
  options.context_length = 8;
  options.document_mask = false;
  ExpectContains(MessageOf<InvalidArgument>([&] { RowSampler sampler(options); }),
                 "data.align_documents needs data.document_mask");
}

std::vector<Ids> TokensOf(const RowSampler& sampler, int64_t begin, int64_t end) {
  std::vector<Ids> rows;
  for (int64_t i = begin; i < end; ++i) rows.push_back(sampler.Get(i).tokens);
  return rows;
}

TEST_F(RowSamplerTest, OrderIsAFunctionOfSeedAndEpoch) {
  WriteCounting("set", 100);
  const RowSampler sampler(Options(8)), again(Options(8));
  const int64_t rows = sampler.RowsAvailable();
  const auto first = TokensOf(sampler, 0, rows), second = TokensOf(sampler, rows, 2 * rows);
  EXPECT_NE(first, second);
  // Documents are shuffled as well as rows: other rows, not the same ones in another order.
  EXPECT_NE(std::set(first.begin(), first.end()), std::set(second.begin(), second.end()));
  // Random access, backwards and after other epochs, gives what reading in order gave.
  for (int64_t i = 2 * rows - 1; i >= 0; --i) {
    const auto& expected =
        i < rows ? first[static_cast<size_t>(i)] : second[static_cast<size_t>(i - rows)];
    ASSERT_EQ(again.Get(i).tokens, expected);
    if (i % 7 == 0) again.Get(i * 1000);
  }
  RowSamplerOptions other = Options(8);
  other.seed = 2;
  EXPECT_NE(TokensOf(RowSampler(other), 0, rows), first);
  // Rows do not come in the order of the stream.
  int64_t chained = 0;
  for (int64_t i = 0; i + 1 < rows; ++i) {
    chained += sampler.Get(i).labels.back() == first[static_cast<size_t>(i) + 1].front();
  }
  EXPECT_LT(chained, rows / 4);
  EXPECT_EQ(sampler.Get(rows * 1'000'000'000'000).tokens.size(), 8u) << "epochs go on for ever";
}

TEST_F(RowSamplerTest, SameContentInTwoSourcesIsShuffledDifferently) {
  WriteCounting("set", 100);
  const RowSampler sampler(Options(8, {{temp_ / "set", 1}, {temp_ / "set", 1}}));
  std::vector<Ids> sides[2];
  const Mixture mixture({1, 1});
  for (int64_t i = 0; i < sampler.RowsAvailable(); ++i) {
    sides[mixture.Find(i).source].push_back(sampler.Get(i).tokens);
  }
  ASSERT_EQ(sides[0].size(), sides[1].size());
  // Not only in another order: other documents meet in a row.
  for (auto& side : sides) std::sort(side.begin(), side.end());
  EXPECT_NE(sides[0], sides[1]);
}

TEST_F(RowSamplerTest, MixtureFollowsTheWeights) {
  WriteCounting("a", 50);
  WriteCounting("b", 300, 100000);
  const RowSampler mixed(Options(4, {{temp_ / "a", 3}, {temp_ / "b", 1}}));
  const RowSampler alone(Options(4, {{temp_ / "a", 1}}));
  int64_t from_a = 0;
  for (int64_t i = 0; i < 1000; ++i) {
    const Ids tokens = mixed.Get(i).tokens;
    if (tokens.front() >= 100000) continue;
    // The samples of a source in a mixture are those of the source alone.
    ASSERT_EQ(tokens, alone.Get(from_a++).tokens);
  }
  EXPECT_EQ(from_a, 750);
}

TEST_F(RowSamplerTest, IdsOutsideTheVocabularyAreNamed) {
  WriteDataset(temp_ / "set", {{1, 2, 300, 4, 5}});
  RowSamplerOptions options = Options(4);
  options.vocab_size = 300;
  const std::string message = MessageOf<DataError>([&] { RowSampler(options).Get(0); });
  ExpectContains(message, "set.bin holds token id 300");
  ExpectContains(message, "model.vocab_size 300");
  options.vocab_size = 301;
  EXPECT_NO_THROW(RowSampler(options).Get(0));
  EXPECT_EQ(RowSampler(options).MaxTokenId(), 300);
  // Also the extra token, which is a label only.
  WriteDataset(temp_ / "set", {{1, 2, 3, 4, 301}});
  EXPECT_THROW(RowSampler(options).Get(0), DataError);
  WriteDataset(temp_ / "set", {{1, -2, 3, 4, 5}});
  options.vocab_size = 0;
  const std::string negative = MessageOf<DataError>([&] { RowSampler(options).Get(0); });
  ExpectContains(negative, "token id -2, which is negative: damaged or foreign data");
  EXPECT_EQ(negative.find("vocab_size"), std::string::npos) << negative;
  ExpectContains(MessageOf<DataError>([&] { RowSampler(options).MaxTokenId(); }), "token id -2");
}

TEST_F(RowSamplerTest, FingerprintCoversContentOrderAndWeights) {
  WriteCounting("a", 50);
  WriteCounting("b", 60);
  fs::copy(temp_ / "a.idx", temp_ / "copy.idx");
  fs::copy(temp_ / "a.bin", temp_ / "copy.bin");
  const auto fingerprint = [&](const std::vector<data::Source>& sources) {
    return RowSampler(Options(4, sources)).Fingerprint();
  };
  const data::Source a{temp_ / "a", 1}, b{temp_ / "b", 1};
  const uint64_t both = fingerprint({a, b});
  EXPECT_EQ(fingerprint({{temp_ / "copy", 1}, b}), both);
  EXPECT_NE(fingerprint({b, a}), both);
  EXPECT_NE(fingerprint({a}), both);
  EXPECT_NE(fingerprint({a, {temp_ / "b", 2}}), both);
  std::string tokens = ReadText(temp_ / "b.bin");
  tokens[0] ^= 1;
  WriteText(temp_ / "b.bin", tokens);
  EXPECT_NE(fingerprint({a, b}), both);
}

TEST_F(RowSamplerTest, BadOptionsAreNamed) {
  RowSamplerOptions options = Options(0);
  ExpectContains(MessageOf<InvalidArgument>([&] { RowSampler sampler(options); }),
                 "context_length 0");
  options = Options(4, {});
  options.sources.clear();
  EXPECT_THROW(RowSampler sampler(options), InvalidArgument);
  ExpectContains(MessageOf<DataError>([&] { RowSampler sampler(Options(4)); }), "set.idx");
}

TEST_F(RowSamplerTest, ThreadsMayReadAtTheSameTime) {
  WriteCounting("set", 60);
  const RowSampler sampler(Options(8)), reference(Options(8));
  const int64_t count = 5 * sampler.RowsAvailable();
  const auto expected = TokensOf(reference, 0, count);
  std::vector<int64_t> wrong(4);
  {
    std::vector<std::jthread> threads;
    for (size_t t = 0; t < wrong.size(); ++t) {
      threads.emplace_back([&, t] {
        for (int64_t i = 0; i < count; ++i) {  // each thread in an order of its own
          const int64_t at = (i * 7 + static_cast<int64_t>(t) * count / 4) % count;
          wrong[t] += sampler.Get(at).tokens != expected[static_cast<size_t>(at)];
        }
      });
    }
  }
  EXPECT_EQ(wrong, std::vector<int64_t>(4));
}

}  // namespace
}  // namespace longspan::test
