// The flat form of masks and tables: the same content as the host's, on the host and in device
// memory, and one copy for each Context.
#include "ops/attention/cuda/device_mask.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "ops/attention/attention.h"
#include "ops/core/cuda/backend.h"
#include "ops/core/rng.h"
#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using ops::BlockMask;
using ops::BlockTask;
using ops::DeviceAxis;
using ops::DeviceMask;
using ops::FlatMask;

ops::DocumentArrays ArraysOf(const ops::Documents& documents) {
  return {documents.doc_begin.data(), documents.doc_end.data()};
}

void ExpectAxis(const DeviceMask& flat, const DeviceAxis& axis, const BlockMask& mask,
                const ops::BlockList& list, const ops::BlockRuns& runs) {
  ASSERT_EQ(axis.blocks, list.size());
  ASSERT_EQ(axis.task_count, mask.kv_heads() * list.size());
  EXPECT_TRUE(std::equal(list.ids.begin(), list.ids.end(), axis.ids));
  EXPECT_TRUE(std::equal(list.token_begin.begin(), list.token_begin.end(), axis.token_begin));
  std::vector<std::vector<int>> seen(static_cast<size_t>(mask.kv_heads()),
                                     std::vector<int>(static_cast<size_t>(list.size())));
  int64_t longest = std::numeric_limits<int64_t>::max();
  for (int64_t t = 0; t < axis.task_count; ++t) {
    const BlockTask task = axis.tasks[t];
    ++seen.at(static_cast<size_t>(task.kv_head)).at(static_cast<size_t>(task.index));
    int64_t entries = 0;
    ops::EntryCursor entry = flat.Entries(axis, task);
    for (const ops::BlockRun& run : runs.Row(mask.pattern_of(task.kv_head), task.index)) {
      for (int32_t n = 0; n < run.count; ++n, ++entries, entry.Next()) {
        ASSERT_FALSE(entry.done());
        EXPECT_EQ(entry.block(), run.first + n * run.step);
        EXPECT_EQ(entry.partial(), run.kind() == ops::BlockKind::kPartial);
      }
    }
    EXPECT_TRUE(entry.done());
    EXPECT_EQ(entries > 0, t < axis.busy_tasks) << "task " << t;
    EXPECT_LE(entries, longest) << "task " << t;
    longest = entries;
  }
  for (const auto& head : seen) {
    EXPECT_EQ(std::count(head.begin(), head.end(), 1), list.size()) << "each task once";
  }
}

TEST(DeviceMaskTest, FlatFormHoldsTheMask) {
  for (const MaskCase& c : SampleMaskCases(300, 11)) {
    SCOPED_TRACE(c.Name());
    const auto mask = BuildMask(c);
    const ops::Documents& documents = mask->documents();
    const FlatMask image(*mask);
    const DeviceMask flat = image.At(image.bytes().data(), ArraysOf(documents));
    ExpectAxis(flat, flat.rows, *mask, mask->queries(), mask->row_runs());
    ExpectAxis(flat, flat.columns, *mask, mask->keys(), mask->column_runs());

    const ops::BlockList& queries = mask->queries();
    const int64_t blocks = documents.rows * ops::BlocksPerRow(documents.row_length);
    for (int32_t id = 0; id < blocks; ++id) {
      EXPECT_EQ(flat.FirstToken(id), ops::BlockFirstToken(documents.row_length, id));
      EXPECT_EQ(flat.Tokens(id), ops::BlockTokens(documents.row_length, id));
      const auto at = std::find(queries.ids.begin(), queries.ids.end(), id);
      const auto i = static_cast<size_t>(at - queries.ids.begin());
      EXPECT_EQ(flat.QueryBegin(id), at == queries.ids.end() ? -1 : queries.token_begin[i]);
    }
    const Philox rng(5, StreamOf("pairs"));
    for (uint64_t n = 0; n < 200; ++n) {
      const auto draw = [&](uint64_t part, int64_t below) {
        return static_cast<int64_t>(rng.Below(3 * n + part, static_cast<uint64_t>(below)));
      };
      const int64_t q = draw(0, documents.tokens()), k = draw(1, documents.tokens());
      const int64_t head = draw(2, c.kv_heads);
      EXPECT_EQ(flat.Sees(head, q, k), Sees(c.pattern.pattern, c.kv_heads, documents, head, q, k))
          << head << " " << q << " " << k;
    }
    if (testing::Test::HasFailure()) return;
  }
}

TEST(DeviceMaskTest, SkipIsNextSoManyTimes) {
  const ops::BlockRun runs[] = {{3, 1, 1, 0}, {5, 4, 2, 1}, {20, 2, 1, 1}};
  for (int32_t from = 0; from <= 7; ++from) {
    for (int32_t n = 0; n <= 9; ++n) {
      ops::EntryCursor one(runs, runs + 3);
      for (int32_t i = 0; i < from; ++i) one.Next();
      ops::EntryCursor other = one;
      for (int32_t i = 0; i < n && !one.done(); ++i) one.Next();
      other.Skip(n);
      ASSERT_EQ(one.done(), other.done()) << from << " " << n;
      if (one.done()) continue;
      EXPECT_EQ(one.block(), other.block()) << from << " " << n;
    }
  }
}

// What lies in device memory from `at` on.
template <class T>
std::vector<T> Read(Context& ctx, const T* at, int64_t n) {
  std::vector<T> values(static_cast<size_t>(n));
  if (n > 0) cuda::Download(ctx.cuda(), values.data(), at, values.size() * sizeof(T));
  return values;
}

template <class T>
void ExpectSame(Context& ctx, const T* device, const T* host, int64_t n, const char* what) {
  if (n == 0) return;  // neither may point anywhere
  const std::vector<T> values = Read(ctx, device, n);
  EXPECT_EQ(std::memcmp(values.data(), host, values.size() * sizeof(T)), 0) << what;
}

void ExpectSameAxis(Context& ctx, const DeviceAxis& device, const DeviceAxis& host,
                    int64_t patterns) {
  ASSERT_EQ(device.blocks, host.blocks);
  ASSERT_EQ(device.task_count, host.task_count);
  EXPECT_EQ(device.busy_tasks, host.busy_tasks);
  ExpectSame(ctx, device.ids, host.ids, host.blocks, "ids");
  ExpectSame(ctx, device.token_begin, host.token_begin, host.blocks + 1, "token_begin");
  ExpectSame(ctx, device.offsets, host.offsets, patterns * host.blocks + 1, "offsets");
  ExpectSame(ctx, device.runs, host.runs, host.offsets[patterns * host.blocks], "runs");
  ExpectSame(ctx, device.tasks, host.tasks, host.task_count, "tasks");
}

// The copy on ctx's GPU against the flat form on the host.
void ExpectOnDevice(Context& ctx, const BlockMask& mask) {
  const FlatMask image(mask);
  const ops::Documents& documents = mask.documents();
  const DeviceMask host = image.At(image.bytes().data(), ArraysOf(documents));
  const DeviceMask& device = ops::OnDevice(ctx, mask);
  ExpectSameAxis(ctx, device.rows, host.rows, mask.patterns());
  ExpectSameAxis(ctx, device.columns, host.columns, mask.patterns());
  ExpectSame(ctx, device.pattern_of, host.pattern_of, mask.kv_heads(), "pattern_of");
  ExpectSame(ctx, device.query_begin, host.query_begin,
             documents.rows * ops::BlocksPerRow(documents.row_length), "query_begin");
  ExpectSame(ctx, device.rule.doc_begin, host.rule.doc_begin, documents.tokens(), "doc_begin");
  ExpectSame(ctx, device.rule.doc_end, host.rule.doc_end, documents.tokens(), "doc_end");
  ASSERT_EQ(device.rule.segment_count, host.rule.segment_count);
  ExpectSame(ctx, device.rule.segment_ends, host.rule.segment_ends, host.rule.segment_count,
             "segment_ends");
  if (host.rule.kind == ops::PatternKind::kSpans) {
    ExpectSame(ctx, device.rule.spans, host.rule.spans, mask.kv_heads(), "spans");
  }
}

TEST(DeviceMaskTest, UploadedBitForBit) {
  if (!OnCuda()) return;
  Context ctx = OpContext();
  for (const MaskCase& c : SampleMaskCases(60, 12)) {
    SCOPED_TRACE(c.Name());
    ExpectOnDevice(ctx, *BuildMask(c));
  }
}

std::shared_ptr<const BlockMask> CausalMask(int64_t tokens) {
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(tokens, {{tokens / 3, tokens}}));
  const auto all = ops::BlockList::All(*documents);
  return BlockMask::Build(ops::AttentionPattern::Causal(), 2, documents, all, all);
}

TEST(DeviceMaskTest, OneCopyForEachContext) {
  if (!OnCuda()) return;
  Context ctx = OpContext(), other = OpContext();
  const auto mask = CausalMask(300);
  const DeviceMask* first = &ops::OnDevice(ctx, *mask);
  const size_t used = ctx.allocator().used_bytes();
  EXPECT_EQ(&ops::OnDevice(ctx, *mask), first);
  EXPECT_EQ(ctx.allocator().used_bytes(), used);
  EXPECT_NE(ops::OnDevice(other, *mask).rows.ids, first->rows.ids);
  EXPECT_EQ(&ops::OnDevice(ctx, *mask), first);

  // Masks of one micro-batch share its documents.
  const auto documents = std::make_shared<ops::Documents>(mask->documents());
  const auto all = ops::BlockList::All(*documents);
  const auto of = [&](const ops::AttentionPattern& pattern) {
    return BlockMask::Build(pattern, 2, documents, all, all);
  };
  const auto causal = of(ops::AttentionPattern::Causal()),
             window = of(ops::AttentionPattern::Window(9));
  EXPECT_EQ(ops::OnDevice(ctx, *causal).rule.doc_begin, ops::OnDevice(ctx, *window).rule.doc_begin);
  EXPECT_NE(ops::OnDevice(ctx, *causal).rule.doc_begin, first->rule.doc_begin);
}

// A copy of an object may be changed; what the original has on a device is not the copy's.
TEST(DeviceMaskTest, CopiedDocumentsStartAfresh) {
  if (!OnCuda()) return;
  Context ctx = OpContext();
  const auto mask = CausalMask(200);
  ops::OnDevice(ctx, *mask);
  ops::Documents changed = mask->documents();
  EXPECT_EQ(changed, mask->documents());
  changed = ops::Documents::FromEnds(200, {{150, 200}});
  const auto documents = std::make_shared<ops::Documents>(changed);
  const auto all = ops::BlockList::All(*documents);
  ExpectOnDevice(ctx, *BlockMask::Build(ops::AttentionPattern::Causal(), 1, documents, all, all));
  ExpectOnDevice(ctx, *mask);
}

TEST(DeviceMaskTest, MasksOutliveContextsAndContextsMasks) {
  if (!OnCuda()) return;
  const auto mask = CausalMask(300);
  for (int i = 0; i < 3; ++i) {  // memory of the Contexts before is not taken for the next one's
    Context ctx = OpContext();
    ExpectOnDevice(ctx, *mask);
  }
  Context ctx = OpContext();
  const size_t before = ctx.allocator().used_bytes();
  std::optional<std::shared_ptr<const BlockMask>> short_lived = CausalMask(500);
  ExpectOnDevice(ctx, **short_lived);
  EXPECT_GT(ctx.allocator().used_bytes(), before);
  short_lived.reset();
  EXPECT_EQ(ctx.allocator().used_bytes(), before);
}

TEST(KvTableTest, ViewsOfOneLayoutShareTheMasksTable) {
  Context ctx = OpContext();
  const auto mask = CausalMask(150);
  const auto tensor = [&](int64_t rows, int64_t heads, int64_t dim) {
    return ctx.Zeros({rows, heads, dim}, DType::kF32);
  };
  const Tensor k = tensor(150, 2, 16), wide = tensor(150, 2, 24), larger = tensor(200, 2, 16);
  const std::vector<int64_t> rows = {5, 70, 136}, others = {5, 71, 136};
  const auto plain = ops::MakeKvView(k, k, *mask).table;
  EXPECT_EQ(ops::MakeKvView(k, k, *mask).table, plain);
  EXPECT_EQ(ops::MakeKvGradView(k, k, *mask).table, plain);
  EXPECT_NE(ops::MakeKvView(wide, wide, *mask).table, plain);
  const auto scattered = ops::MakeKvView(larger, larger, *mask, rows).table;
  EXPECT_EQ(ops::MakeKvGradView(larger, larger, *mask, rows).table, scattered);
  EXPECT_NE(ops::MakeKvView(larger, larger, *mask, others).table, scattered);
  EXPECT_NE(scattered, plain);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int64_t h = 0; h < 2; ++h) {
      EXPECT_EQ(scattered->Offset(h, static_cast<int64_t>(i)), (rows[i] * 2 + h) * 16);
      EXPECT_EQ(plain->Offset(h, static_cast<int64_t>(i)),
                (static_cast<int64_t>(i) * ops::kMaskBlock * 2 + h) * 16);
    }
  }
  EXPECT_THROW(ops::MakeKvView(tensor(149, 2, 16), tensor(149, 2, 16), *mask), InvalidArgument);
  if (!OnCuda()) return;
  const ops::DeviceKvTable& device = ops::OnDevice(ctx, *scattered);
  EXPECT_EQ(&ops::OnDevice(ctx, *scattered), &device);
  EXPECT_EQ(device.token_stride, 32);
  EXPECT_EQ(device.blocks, 3);
  EXPECT_EQ(Read(ctx, device.offsets, 6), scattered->offsets());
}

TEST(KvTableTest, AlignmentDividesEveryRow) {
  EXPECT_EQ(ops::KvTable(2, 48, 0, {0, 96, 16, -1}).alignment(), 16);
  EXPECT_EQ(ops::KvTable(1, 48, 0, {24, -1}).alignment(), 24);
  EXPECT_EQ(ops::KvTable(1, 48, 0, {3}).alignment(), 3);
  EXPECT_EQ(ops::KvTable(1, 7, 0, {14}).alignment(), 7);
  EXPECT_EQ(ops::KvTable(1, 48, 0, {-1}).alignment(), 0);
}

}  // namespace
}  // namespace longspan::test
