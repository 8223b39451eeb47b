#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <span>
#include <vector>

#include "ops/attention/cpu/blocked.h"
#include "ops/attention/cpu/routed_cpu.h"

// What the tiled passes over RoutedLists share.
namespace longspan::ops::cpu {

// Keys whose packed K and V stay in cache while the rows that chose them pass by.
inline constexpr int64_t kChunkKeys = 512;

// Query rows of all heads are numbered row * heads + head: row i of q, d_out, o, and element i of
// lse, delta.
using FlatRow = int64_t;

// Neighbouring keys of a key block, in pieces of 64.
struct KeyChunk {
  int64_t offset;  // elements, of the first one in the storage of a KvView
  int64_t count;
  int64_t pieces() const { return (count + 63) / 64; }
  int64_t KeysOf(int64_t piece) const { return std::min<int64_t>(64, count - piece * 64); }
};
// Calls visit(KeyChunk) for a block's keys of one kv head, kChunkKeys at a time.
template <class Visit>
void ForEachChunk(const KvView& kv, const RoutedBlocks& blocks, int64_t kv_head, int64_t block,
                  const Visit& visit) {
  const int64_t tokens = blocks.TokensOf(block), offset = kv.Offset(kv_head, block);
  for (int64_t first = 0; first < tokens; first += kChunkKeys) {
    visit(KeyChunk{offset + first * kv.token_stride(), std::min(kChunkKeys, tokens - first)});
  }
}

// Copies listed rows, runs of neighbouring tokens at a time, to a packed block.
void GatherRows(const BlockKernels& kernels, const BlockedShape& shape, const Tensor& from,
                std::span<const FlatRow> rows, float* to);
void TransposeTo(const BlockKernels& kernels, const BlockedShape& shape, const float* from,
                 int64_t rows, float* to);

BlockedShape RoutedShape(const Tensor& q, int64_t kv_heads);

// A range of rows of q and a kv head, whose results one task owns.
struct Segment {
  int64_t begin, end;  // rows
  int64_t kv_head;
  int64_t first_block, last_block;  // key blocks [first_block, last_block) that they may choose
};
// Long enough for the lists of one segment to fill tiles. A function of shapes only.
std::vector<Segment> SegmentsOf(const RoutedQueries& queries, const RoutedLists& lists,
                                int64_t kv_heads);
// The rows of a segment that chose `block`, head by head; replaces what is in `rows`.
void RowsOfSegment(const RoutedLists& lists, const Segment& segment, int64_t block, int64_t group,
                   std::vector<FlatRow>& rows);

// Keys of one dK/dV task: what its operands and sums leave of a cache of 1 MB.
inline constexpr int64_t kGradientKeys = 256;

// A piece of a key block and a kv head, whose dK and dV one task owns.
struct KeyTask {
  int64_t block, kv_head;
  int64_t first, count;  // keys of the block, up to kGradientKeys
  int64_t entries;

  // The keys where `view` (a KvView or KvGradView) has them.
  template <class View>
  KeyChunk In(const View& view) const {
    return {view.Offset(kv_head, block) + first * view.token_stride(), count};
  }
};
// Those whose keys most rows chose first; none for keys that nobody chose.
std::vector<KeyTask> KeyTasks(const RoutedBlocks& blocks, const RoutedLists& lists,
                              int64_t kv_heads);
// Calls visit(rows) for the rows of the group's heads that chose the block, 64 at a time.
template <class Visit>
void ForEachTileOf(const KeyTask& task, const RoutedLists& lists, int64_t group,
                   const Visit& visit) {
  const int64_t* offsets = lists.offsets.data<int64_t>();
  FlatRow rows[64];
  size_t n = 0;
  for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head) {
    const int64_t list = task.block * lists.heads + head;
    for (int64_t at = offsets[list]; at < offsets[list + 1]; ++at) {
      rows[n++] = lists.query_rows.data<int32_t>()[at] * lists.heads + head;
      if (n < 64) continue;
      visit(std::span<const FlatRow>(rows, n));
      n = 0;
    }
  }
  if (n > 0) visit(std::span<const FlatRow>(rows, n));
}

// lse of rows in units of log2, and delta. Lanes after the last row get lse = +inf: probability 0.
void LoadRowStatistics(const RoutedBackwardArgs& args, std::span<const FlatRow> rows, float* lse,
                       float* delta);

// Adds up the time of gathering and scattering over the workers of a call.
class GatherClock {
 public:
  explicit GatherClock(Context& ctx) : ctx_(ctx) {}
  ~GatherClock() {
    ctx_.trace().Add("attention gather",
                     1e-9 * static_cast<double>(nanoseconds_.load()) / ctx_.threads());
  }
  GatherClock(const GatherClock&) = delete;
  GatherClock& operator=(const GatherClock&) = delete;

  template <class Body>
  void Time(const Body& body) {
    const auto begin = Clock::now();
    body();
    nanoseconds_.fetch_add(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count(),
        std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  Context& ctx_;
  std::atomic<int64_t> nanoseconds_{0};
};

}  // namespace longspan::ops::cpu
