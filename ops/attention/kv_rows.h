#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention/device_copies.h"
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Keys and values (or their gradients) on their way between ranks lie in rows: one row is K and V
// of one token of one kv head, side by side, so that whatever a rank needs of another is a list of
// rows. These functions move rows and add them up.
//
// Shapes    k, v, dk, dv [T, Hkv, D]; rows [R, 2, D]
// Places    counted in vectors of D elements: token t of kv head h is vector t * Hkv + h of k and
//           of v; row i begins at vector 2 i with K, and its V is vector 2 i + 1
// Dtypes    copies: any; sums: f32 (f64 on a CPU)
// Numerics  sums in the order of the runs: the same bits for any number of threads
// Errors    InvalidArgument naming the operand, before anything is written
// Devices   cpu, cuda; a table is uploaded at its first use and kept with it

// `tokens` vectors (pairs of vectors, where rows are meant) from `from` on to `to` on, in steps of
// the table's strides.
struct RowRun {
  int64_t from = 0, to = 0, tokens = 0;
};

// What one pass over memory moves or adds: runs cut into strips of at most 64 tokens. Runs that end
// at the same place are one strip with several sources, in their order.
class RowTable {
 public:
  struct Strip {
    int64_t to;       // first vector
    int64_t first;    // its sources are from()[first], from()[first + 1], ...
    int32_t sources;  // at least 1
    int32_t tokens;
  };
  RowTable() = default;
  // Runs may end at the same vector when they are equally long, but must not overlap otherwise.
  // Strides are in vectors per token.
  RowTable(std::vector<RowRun> runs, int64_t from_stride, int64_t to_stride);

  const std::vector<Strip>& strips() const { return strips_; }
  const std::vector<int64_t>& from() const { return from_; }
  int64_t from_stride() const { return from_stride_; }
  int64_t to_stride() const { return to_stride_; }
  bool empty() const { return strips_.empty(); }
  // One past the last vector that is read, and written.
  int64_t from_end() const { return from_end_; }
  int64_t to_end() const { return to_end_; }
  bool adds() const { return adds_; }  // some strip has several sources

  const DeviceCopies& device_copies() const { return device_copies_; }

 private:
  int64_t from_stride_ = 1, to_stride_ = 1, from_end_ = 0, to_end_ = 0;
  bool adds_ = false;
  std::vector<Strip> strips_;
  std::vector<int64_t> from_;
  DeviceCopies device_copies_;
};

// Runs from vectors of k and v to rows (from_stride Hkv, to_stride 2): one source a strip.
void PackKv(Context& ctx, const RowTable& table, const Tensor& k, const Tensor& v, Tensor& rows);
// Runs from rows to rows (both strides 2): one source a strip. No row that is read is written.
void CopyRows(Context& ctx, const RowTable& table, const Tensor& from, Tensor& to);
// to += from, runs from rows to rows. `from` and `to` may be one tensor when no row that is read is
// written.
void AddRows(Context& ctx, const RowTable& table, const Tensor& from, Tensor& to);
// dk, dv += rows, runs from rows to vectors of dk and dv (from_stride 2, to_stride Hkv).
void AddToKv(Context& ctx, const RowTable& table, const Tensor& rows, Tensor& dk, Tensor& dv);

// Heads [begin, end) of t [T, H, D] or [T, H], a new tensor.
Tensor SliceHeads(Context& ctx, const Tensor& t, int64_t begin, int64_t end);
// Heads [begin, begin + n) of t become those of `heads`, which has n of them, in the dtype of t.
void PlaceHeads(Context& ctx, const Tensor& heads, int64_t begin, Tensor& t);

}  // namespace longspan::ops
