#include "ops/attention/routed_lists.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "ops/attention/arguments.h"
#include "ops/attention/cuda/routed_cuda.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops {
namespace {

// Rows are counted in chunks, so that a head's rows can be shared among threads. A chunk has at
// least as many entries as blocks: its counters then take no more memory than the lists.
constexpr int64_t kSmallestChunk = 4096;
int64_t ChunkRows(const RoutedLists& lists) {
  return std::max(kSmallestChunk, (lists.blocks + lists.width - 1) / lists.width);
}

class ListBuilder {
 public:
  ListBuilder(Context& ctx, RoutedLists& lists)
      : ctx_(ctx),
        lists_(lists),
        chunk_rows_(ChunkRows(lists)),
        chunks_((lists.rows + chunk_rows_ - 1) / chunk_rows_),
        next_(static_cast<size_t>(chunks_ * lists.heads * lists.blocks)) {}

  void Build() {
    ForEachChunk([&](int64_t head, int64_t chunk, int64_t* count) {
      ForEachEntry(head, chunk, [&](int64_t, int32_t block) { ++count[block]; });
    });
    PrefixSums();
    ForEachChunk([&](int64_t head, int64_t chunk, int64_t* next) {
      int32_t* rows = lists_.query_rows.data<int32_t>();
      ForEachEntry(head, chunk, [&](int64_t row, int32_t block) {
        rows[next[block]++] = static_cast<int32_t>(row);
      });
    });
  }

 private:
  // Counters [blocks] of one head and chunk.
  int64_t* Counters(int64_t head, int64_t chunk) {
    return next_.data() + (chunk * lists_.heads + head) * lists_.blocks;
  }

  template <class Body>
  void ForEachChunk(const Body& body) {
    ParallelFor(ctx_, lists_.heads * chunks_, [&](int64_t i, int) {
      body(i / chunks_, i % chunks_, Counters(i / chunks_, i % chunks_));
    });
  }

  template <class Body>
  void ForEachEntry(int64_t head, int64_t chunk, const Body& body) const {
    const int64_t end = std::min(lists_.rows, (chunk + 1) * chunk_rows_);
    for (int64_t row = chunk * chunk_rows_; row < end; ++row) {
      const int32_t* chosen =
          lists_.selected.data<int32_t>() + (head * lists_.rows + row) * lists_.width;
      for (int64_t i = 0; i < lists_.width && chosen[i] != -1; ++i) {
        if (chosen[i] < 0 || chosen[i] >= lists_.blocks) {
          throw InvalidArgument(Str("BuildRoutedLists: head ", head, " of row ", row,
                                    " selects block ", chosen[i], ", and there are ",
                                    lists_.blocks));
        }
        body(row, chosen[i]);
      }
    }
  }

  // Counts become the places of the first entries.
  void PrefixSums() {
    int64_t* offsets = lists_.offsets.data<int64_t>();
    int64_t at = 0;
    for (int64_t block = 0; block < lists_.blocks; ++block) {
      for (int64_t head = 0; head < lists_.heads; ++head) {
        offsets[block * lists_.heads + head] = at;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          int64_t& counter = Counters(head, chunk)[block];
          const int64_t count = counter;
          counter = at;
          at += count;
        }
      }
    }
    offsets[lists_.blocks * lists_.heads] = at;
  }

  Context& ctx_;
  RoutedLists& lists_;
  const int64_t chunk_rows_, chunks_;
  std::vector<int64_t> next_;  // [chunks, heads, blocks]
};

}  // namespace

RoutedLists BuildRoutedLists(Context& ctx, const Tensor& selected, int64_t blocks) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (!selected.defined() || selected.rank() != 3 || selected.dtype() != DType::kI32 ||
      selected.dim(1) > kMost || blocks < 0 || blocks > kMost) {
    throw InvalidArgument(Str(
        "BuildRoutedLists: selected is ", selected.defined() ? selected.Describe() : "undefined",
        " and blocks ", blocks, "; they must be i32 [heads, rows, width] and 0 to 2^31 - 1"));
  }
  internal::RequireDevice(ctx, "BuildRoutedLists", "selected", selected);
  RoutedLists lists{.rows = selected.dim(1),
                    .heads = selected.dim(0),
                    .blocks = blocks,
                    .width = selected.dim(2),
                    .selected = selected,
                    .offsets = ctx.Empty({blocks * selected.dim(0) + 1}, DType::kI64),
                    .query_rows = ctx.Empty({selected.numel()}, DType::kI32)};
  const TraceScope trace(ctx.trace(), "attention lists");
  if (selected.numel() == 0) {
    ctx.SetZero(lists.offsets);
    return lists;
  }
  if (ctx.device().kind == DeviceKind::kCuda) {
    internal::BuildRoutedListsCuda(ctx, lists);
  } else {
    ListBuilder(ctx, lists).Build();
  }
  return lists;
}

Tensor ListedBlocks(Context& ctx, const RoutedLists& lists, int64_t groups) {
  constexpr const char* kOp = "ListedBlocks";
  if (groups < 1 || lists.heads % groups != 0 || !lists.offsets.defined()) {
    throw InvalidArgument(
        Str(kOp, ": lists of ", lists.heads, " heads and ", groups,
            " groups; there must be lists, and heads must be a multiple of groups"));
  }
  internal::RequireDevice(ctx, kOp, "lists.offsets", lists.offsets);
  Tensor listed = ctx.Empty({groups, (lists.blocks + 7) / 8}, DType::kU8);
  if (listed.numel() == 0) return listed;
  if (ctx.device().kind == DeviceKind::kCuda) {
    internal::ListedBlocksCuda(ctx, lists, groups, listed);
    return listed;
  }
  const int64_t* offsets = lists.offsets.data<int64_t>();
  const int64_t group = lists.heads / groups;
  uint8_t* bytes = listed.data<uint8_t>();
  std::fill(bytes, bytes + listed.numel(), uint8_t{0});
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < lists.blocks; ++b) {
      const int64_t list = b * lists.heads + g * group;
      if (offsets[list + group] == offsets[list]) continue;
      uint8_t& byte = bytes[g * listed.dim(1) + b / 8];
      byte = static_cast<uint8_t>(byte | 1u << (b % 8));
    }
  }
  return listed;
}

}  // namespace longspan::ops
