#include "ops/attention/routed_lists.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

struct Selection {
  int64_t heads, rows, width, blocks;
  std::vector<int32_t> selected;
};

// Ascending distinct blocks, from none to `width` of them.
Selection RandomSelection(int64_t heads, int64_t rows, int64_t width, int64_t blocks,
                          unsigned seed) {
  std::mt19937 random(seed);
  Selection s{heads, rows, width, blocks, {}};
  for (int64_t i = 0; i < heads * rows; ++i) {
    std::vector<int32_t> chosen;
    const auto wanted = random() % static_cast<unsigned>(width + 1);
    for (unsigned n = 0; n < wanted; ++n) {
      // Low blocks are popular.
      chosen.push_back(
          static_cast<int32_t>(random() % (random() % static_cast<unsigned>(blocks) + 1)));
    }
    std::sort(chosen.begin(), chosen.end());
    chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    chosen.resize(static_cast<size_t>(width), -1);
    s.selected.insert(s.selected.end(), chosen.begin(), chosen.end());
  }
  return s;
}

Tensor TensorOf(Context& ctx, const Selection& s) {
  Tensor t = ctx.Empty({s.heads, s.rows, s.width}, DType::kI32);
  if (t.numel() > 0) CopyFromHost(ctx, s.selected.data(), t);
  return t;
}

void ExpectLists(const Selection& s) {
  Context ctx = OpContext();
  const ops::RoutedLists lists = ops::BuildRoutedLists(ctx, TensorOf(ctx, s), s.blocks);
  std::vector<int64_t> offsets(static_cast<size_t>(s.blocks * s.heads + 1));
  std::vector<int32_t> rows(static_cast<size_t>(lists.query_rows.numel()));
  CopyToHost(lists.offsets, offsets.data());
  if (!rows.empty()) CopyToHost(lists.query_rows, rows.data());
  size_t at = 0;
  for (int64_t b = 0; b < s.blocks; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      const size_t list = static_cast<size_t>(b * s.heads + h);
      ASSERT_EQ(offsets[list], static_cast<int64_t>(at)) << "block " << b << " head " << h;
      for (int64_t t = 0; t < s.rows; ++t) {
        const auto begin = s.selected.begin() + (h * s.rows + t) * s.width;
        if (std::find(begin, begin + s.width, b) == begin + s.width) continue;
        ASSERT_LT(at, rows.size());
        ASSERT_EQ(rows[at++], t) << "block " << b << " head " << h;
      }
      ASSERT_EQ(offsets[list + 1], static_cast<int64_t>(at)) << "block " << b << " head " << h;
    }
  }
  for (const int64_t groups : {int64_t{1}, s.heads}) {
    const Tensor listed = ops::ListedBlocks(ctx, lists, groups);
    ASSERT_EQ(listed.shape(), (Shape{groups, (s.blocks + 7) / 8}));
    std::vector<uint8_t> bytes(static_cast<size_t>(listed.numel())), want(bytes.size(), 0);
    CopyToHost(listed, bytes.data());
    const int64_t group = s.heads / groups;
    for (int64_t i = 0; i < static_cast<int64_t>(s.selected.size()); ++i) {
      const int32_t block = s.selected[static_cast<size_t>(i)];
      if (block < 0) continue;
      const int64_t head = i / (s.rows * s.width);
      uint8_t& byte = want[static_cast<size_t>(head / group * listed.dim(1) + block / 8)];
      byte = static_cast<uint8_t>(byte | (1 << (block % 8)));
    }
    EXPECT_EQ(bytes, want) << groups << " groups";
  }
}

TEST(RoutedListsTest, ListsAreTheTranspose) {
  ExpectLists(RandomSelection(3, 211, 4, 17, 1));
  ExpectLists(RandomSelection(1, 9001, 2, 40, 2));   // several chunks of rows
  ExpectLists(RandomSelection(2, 130, 1, 5000, 3));  // more blocks than rows
  ExpectLists(RandomSelection(4, 20, 1, 3, 7));
  ExpectLists(RandomSelection(5, 1, 7, 9, 4));
}

TEST(RoutedListsTest, NothingSelected) {
  ExpectLists({2, 50, 0, 3, {}});
  ExpectLists({2, 0, 3, 3, {}});
  ExpectLists({2, 3, 2, 4, std::vector<int32_t>(12, -1)});
}

TEST(RoutedListsTest, SameBitsForAnyThreads) {
  if (OnCuda()) return;
  const Selection s = RandomSelection(2, 13000, 3, 50, 5);
  Context one = OpContext(1);
  const ops::RoutedLists want = ops::BuildRoutedLists(one, TensorOf(one, s), s.blocks);
  const int64_t entries = want.offsets.data<int64_t>()[s.blocks * s.heads];
  for (const int threads : {2, 3}) {
    Context ctx = OpContext(threads);
    const ops::RoutedLists lists = ops::BuildRoutedLists(ctx, TensorOf(ctx, s), s.blocks);
    EXPECT_TRUE(SameBits(lists.offsets, want.offsets));
    EXPECT_TRUE(SameBits(lists.query_rows.Rows(0, entries), want.query_rows.Rows(0, entries)));
  }
}

// Exactly the result, and on a GPU counters that take as much again where blocks are many.
TEST(RoutedListsTest, MemoryWhileListsAreMade) {
  constexpr int64_t kHeads = 2, kRows = 4096, kWidth = 2, kBlocks = 512;
  Context ctx = OpContext();
  const ops::RoutedLists lists = ops::BuildRoutedLists(
      ctx, TensorOf(ctx, RandomSelection(kHeads, kRows, kWidth, kBlocks, 6)), kBlocks);
  const size_t result = Allocator::BlockBytes(lists.selected.bytes()) +
                        Allocator::BlockBytes(lists.offsets.bytes()) +
                        Allocator::BlockBytes(lists.query_rows.bytes());
  EXPECT_EQ(ctx.allocator().used_bytes(), result);
  constexpr size_t kCounters = 8 * kHeads * kRows * kWidth, kPieces = 8 * 5;
  const size_t counters = Allocator::BlockBytes(kCounters) + Allocator::BlockBytes(kPieces);
  EXPECT_EQ(ctx.allocator().peak_bytes(), result + (OnCuda() ? counters : 0));
}

TEST(RoutedListsTest, RefusesWhatIsNoSelection) {
  Context ctx = OpContext();
  EXPECT_THROW(ops::BuildRoutedLists(ctx, ctx.Zeros({2, 3}, DType::kI32), 4), InvalidArgument);
  EXPECT_THROW(ops::BuildRoutedLists(ctx, ctx.Zeros({2, 3, 1}, DType::kF32), 4), InvalidArgument);
  EXPECT_THROW(ops::BuildRoutedLists(ctx, Tensor(), 4), InvalidArgument);
  EXPECT_THROW(ops::BuildRoutedLists(ctx, ctx.Zeros({2, 3, 1}, DType::kI32), -1), InvalidArgument);
  if (OnCuda()) return;  // not looked at there
  for (const int32_t bad : {4, -2}) {
    EXPECT_THROW(ops::BuildRoutedLists(ctx, TensorOf(ctx, {1, 2, 1, 4, {3, bad}}), 4),
                 InvalidArgument)
        << bad;
  }
}

}  // namespace
}  // namespace longspan::test
