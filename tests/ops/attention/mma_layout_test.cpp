// Index arithmetic and masks of the tensor-core kernels, on the host.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string_view>

#include "ops/attention/attention.h"
#include "ops/attention/cuda/mma_shape.h"
#include "ops/attention/cuda/mma_visible.h"
#include "ops/core/rng.h"
#include "tests/ops/attention/mask_cases.h"

namespace longspan::test {
namespace {

using namespace ops::mma;

template <class F>
void ForEachDim(F f) {
  f.template operator()<32>();
  f.template operator()<64>();
  f.template operator()<96>();
  f.template operator()<128>();
  f.template operator()<192>();
  f.template operator()<256>();
}

TEST(MmaLayoutTest, EveryChunkOfATileHasItsPlace) {
  ForEachDim([]<int kDim>() {
    std::set<int> places;
    for (int row = 0; row < kBlock; ++row) {
      for (int chunk = 0; chunk < kDim / 8; ++chunk) {
        const int at = ChunkOffset<kDim>(row, chunk);
        EXPECT_EQ(at % 16, 0);
        EXPECT_GE(at, row * kDim * 2);  // rows stay where they are: warps address 16 of them
        EXPECT_LT(at, (row + 1) * kDim * 2);
        places.insert(at);
      }
    }
    EXPECT_EQ(places.size(), static_cast<size_t>(TileBytes<kDim>() / 16)) << kDim;
  });
}

// ldmatrix reads 8 rows at a time; shared memory delivers 128 bytes, each bank once.
TEST(MmaLayoutTest, FragmentsAreWhereTheyWereCopiedWithoutBankConflicts) {
  ForEachDim([]<int kDim>() {
    for (const auto place_of : {PlaceInRows, PlaceInColumns}) {
      for (const int tile : {0, TileBytes<kDim>(), 3 * TileBytes<kDim>() + 32 * kDim * 2}) {
        for (int n = 0; n < kBlock / 16; ++n) {
          for (int p = 0; p < kDim / 16; ++p) {
            for (int matrix = 0; matrix < 4; ++matrix) {
              std::set<int> groups;  // of four banks
              for (int i = 0; i < 8; ++i) {
                const FragmentPlace place = place_of(8 * matrix + i);
                const int lane = ChunkOffset<kDim>(place.row, place.chunk);
                const int at = FragmentOffset<kDim>(lane, tile, n, p);
                ASSERT_EQ(at, tile + ChunkOffset<kDim>(16 * n + place.row, 2 * p + place.chunk));
                groups.insert(at / 16 % 8);
              }
              ASSERT_EQ(groups.size(), 8u) << kDim << " matrix " << matrix << " pair " << p;
            }
          }
        }
      }
    }
  });
}

// The order of the matrices that mma.sync expects: operand A and the transposing load take rows
// first, operand B by columns takes the inner dimension first.
TEST(MmaLayoutTest, PlacesFollowTheFragments) {
  for (int i = 0; i < 8; ++i) {
    const FragmentPlace rows[] = {PlaceInRows(i), PlaceInRows(8 + i), PlaceInRows(16 + i),
                                  PlaceInRows(24 + i)};
    const FragmentPlace columns[] = {PlaceInColumns(i), PlaceInColumns(8 + i),
                                     PlaceInColumns(16 + i), PlaceInColumns(24 + i)};
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int low = matrix % 2, high = matrix / 2;
      EXPECT_EQ(rows[matrix].row, 8 * low + i);
      EXPECT_EQ(rows[matrix].chunk, high);
      EXPECT_EQ(columns[matrix].row, 8 * high + i);
      EXPECT_EQ(columns[matrix].chunk, low);
    }
  }
}

// Limits of a block of threads, and how many of them share a multiprocessor of an H100, which has
// 228 KiB of which each block costs another one.
constexpr int kAmpere = 163 * 1024, kHopper = 227 * 1024;
constexpr int HopperBlocks(int bytes) { return 228 * 1024 / (bytes + 1024); }

template <class Shape>
void ExpectFits() {
  EXPECT_LE(Shape::kBytes, kAmpere);
  EXPECT_LE(Shape::kBytes, kHopper);
  EXPECT_EQ(Shape::kMask % 16, 0);
  EXPECT_EQ(Shape::kTask % 16, 0);
}

TEST(MmaLayoutTest, SharedMemoryFits) {
  ForEachDim([]<int kDim>() {
    ExpectFits<ForwardShape<kDim, 1>>();
    ExpectFits<QueryGradientShape<kDim, 1>>();
    ExpectFits<KeyGradientShape<kDim>>();
    EXPECT_EQ(KeyGradientShape<kDim>::kStatistics % 16, 0);
    EXPECT_EQ(KeyGradientShape<kDim>::kColumns % 32, 0);  // pieces of 16, none of them split
    if constexpr (kDim <= kMaxPairedDim) {
      ExpectFits<ForwardShape<kDim, 2>>();
      ExpectFits<QueryGradientShape<kDim, 2>>();
      EXPECT_GE(HopperBlocks(ForwardShape<kDim, 2>::kBytes), 2);
      EXPECT_GE(HopperBlocks(QueryGradientShape<kDim, 2>::kBytes), 2);
      EXPECT_GE(HopperBlocks(KeyGradientShape<kDim>::kBytes), KeyGradientShape<kDim>::kResident);
    }
  });
  EXPECT_LE(2 * (ForwardShape<128, 2>::kBytes + 1024), 164 * 1024);  // two on an A100
}

TEST(MmaLayoutTest, SmallestHeadSizeThatHoldsIt) {
  for (int dim = 1; dim <= kMaxDim; ++dim) {
    const int padded = PaddedDim(dim);
    EXPECT_GE(padded, dim);
    for (const int other : kPaddedDims) EXPECT_FALSE(dim <= other && other < padded) << dim;
  }
  EXPECT_EQ(PaddedDim(64), 64);
  EXPECT_EQ(PaddedDim(128), 128);
  EXPECT_EQ(PaddedDim(kMaxDim + 1), 0);
}

// What a block may have on sm_86, sm_89 and sm_120.
constexpr int kSmall = 99 * 1024;

TEST(MmaLayoutTest, TilesTakeEveryHeadOfAGroupOnce) {
  ForEachDim([]<int kDim>() {
    const auto expect = [&]<template <int, int> class Shape>(int shared_bytes, bool pairs) {
      for (int group = 1; group <= 9; ++group) {
        const HeadTiles tiles = TilesOfGroup<Shape, kDim>(group, shared_bytes);
        EXPECT_EQ(2 * tiles.pairs + tiles.singles, group);
        EXPECT_EQ(tiles.pairs, pairs ? group / 2 : 0) << kDim << " in " << shared_bytes;
      }
    };
    for (const int shared_bytes : {kAmpere, kHopper}) {
      expect.template operator()<ForwardShape>(shared_bytes, kDim <= kMaxPairedDim);
      expect.template operator()<QueryGradientShape>(shared_bytes, kDim <= kMaxPairedDim);
    }
    expect.template operator()<ForwardShape>(kSmall, kDim <= 128);
    expect.template operator()<QueryGradientShape>(kSmall, kDim <= 96);
  });
}

// What is chosen has to fit, or the gradients would stop half-way.
TEST(MmaLayoutTest, DevicesWithLessSharedMemoryTakeWhatFits) {
  ForEachDim([]<int kDim>() {
    EXPECT_LE((ForwardShape<kDim, 1>::kBytes), SharedBytesFor(kDim));
    EXPECT_LE((QueryGradientShape<kDim, 1>::kBytes), SharedBytesFor(kDim));
    EXPECT_LE(KeyGradientShape<kDim>::kBytes, SharedBytesFor(kDim));
    EXPECT_LE(SharedBytesFor(kDim), kAmpere);
  });
  const auto table = ops::AttentionImplementations();
  const auto found = std::find_if(table.begin(), table.end(), [](const auto& implementation) {
    return std::string_view(implementation.name) == "mma_bf16";
  });
  ASSERT_NE(found, table.end());
  const auto& entry = *found;
  for (int64_t dim = 8; dim <= kMaxDim; dim += 8) {
    ops::AttentionProblem problem{DType::kBF16, 4, 2, dim};
    EXPECT_EQ(entry.rejects(problem), "");
    problem.shared_bytes = kAmpere;
    EXPECT_EQ(entry.rejects(problem), "");
    problem.shared_bytes = kSmall;
    EXPECT_EQ(entry.rejects(problem).empty(), dim <= 128) << entry.rejects(problem);
  }
}

// ---- masks -----------------------------------------------------------------------------------

// Words of every query and group of 32 keys of the same row.
void ExpectWordsAgree(const MaskCase& c) {
  const ops::Documents& documents = *c.documents.documents;
  const ops::VisibleRule rule = ops::MakeVisibleRule(c.pattern.pattern, c.kv_heads, documents);
  const int64_t length = documents.row_length;
  for (int64_t head = 0; head < c.kv_heads; ++head) {
    for (int64_t q = 0; q < documents.tokens(); ++q) {
      const int64_t row = q / length * length;
      for (int64_t first = row; first < row + length; first += 32) {
        const int keys = static_cast<int>(std::min<int64_t>(32, row + length - first));
        uint32_t want = 0;
        for (int j = 0; j < keys; ++j) {
          want |= static_cast<uint32_t>(ops::Visible(rule, head, q, first + j)) << j;
        }
        ASSERT_EQ(VisibleKeys(rule, head, q, first, keys), want)
            << c.Name() << " head " << head << " query " << q << " keys from " << first;
      }
    }
  }
}

TEST(MmaLayoutTest, WordsAgreeWithVisible) {
  std::vector<MaskCase> cases = SampleMaskCases(300, 11);
  std::erase_if(cases, [](const MaskCase& c) { return c.documents.documents->tokens() > 800; });
  ASSERT_GT(cases.size(), 80u);
  cases.resize(80);
  std::set<ops::PatternKind> kinds;
  for (const MaskCase& c : cases) {
    ExpectWordsAgree(c);
    if (HasFailure()) return;
    kinds.insert(c.pattern.pattern.kind);
  }
  EXPECT_EQ(kinds.size(), static_cast<size_t>(ops::PatternKind::kSpans) + 1);
}

// Windows and sinks at every distance from the ends, and beyond what 64 bits of tokens could add.
TEST(MmaLayoutTest, WordsAgreeWithVisibleForEveryWindow) {
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(75, {{1, 40, 75}, {75}}));
  constexpr int64_t kHuge = int64_t{1} << 62;
  for (const int64_t window : {1, 2, 31, 32, 33, 73, 74, 75, 76, 149, 150, 151}) {
    for (const int64_t sinks : {0, 1, 31, 32, 74, 75, 151}) {
      ExpectWordsAgree({.pattern = {"window", ops::AttentionPattern::Window(window, sinks)},
                        .documents = {"three", documents},
                        .shard = {},
                        .kv_heads = 1});
    }
  }
  for (const auto& [window, sinks] : {std::pair{kHuge, int64_t{0}}, {int64_t{1}, kHuge}}) {
    ExpectWordsAgree({.pattern = {"huge", ops::AttentionPattern::Window(window, sinks)},
                      .documents = {"three", documents},
                      .shard = {},
                      .kv_heads = 1});
  }
}

}  // namespace
}  // namespace longspan::test
