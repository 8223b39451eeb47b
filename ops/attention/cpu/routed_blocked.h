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

// A key block's share of a chunk: up to kChunkKeys tokens in pieces of 64.
struct KeyChunk {
  int64_t begin, end;  // tokens
  int64_t pieces() const { return (end - begin + 63) / 64; }
  int64_t KeysOf(int64_t piece) const { return std::min<int64_t>(64, end - begin - piece * 64); }
};

// Copies listed rows, runs of neighbouring tokens at a time, to a packed block.
void GatherRows(const BlockKernels& kernels, const BlockedShape& shape, const Tensor& from,
                std::span<const FlatRow> rows, float* to);
// `count` rows of one kv head from `token` on, of k or v [T, kv heads, D].
void PackKeys(const BlockKernels& kernels, const BlockedShape& shape, const Tensor& from,
              int64_t kv_head, int64_t token, int64_t count, float* to);
void TransposeTo(const BlockKernels& kernels, const BlockedShape& shape, const float* from,
                 int64_t rows, float* to);

BlockedShape RoutedShape(const Tensor& q, const Tensor& k);

// A range of tokens and a kv head, whose rows one task owns.
struct Segment {
  int64_t begin, end;  // tokens
  int64_t kv_head;
  int64_t first_block, last_block;  // key blocks [first_block, last_block) that they may choose
};
// Long enough for the lists of one segment to fill tiles. A function of shapes only.
std::vector<Segment> SegmentsOf(const RoutedBlocks& blocks, const RoutedLists& lists,
                                const BlockedShape& shape);
// The rows of a segment that chose `block`, head by head; replaces what is in `rows`.
void RowsOfSegment(const RoutedLists& lists, const Segment& segment, int64_t block, int64_t group,
                   std::vector<FlatRow>& rows);

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
