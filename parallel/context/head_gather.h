#pragma once
#include <cstdint>
#include <vector>

#include "ops/attention/device_copies.h"
#include "ops/core/context.h"

namespace longspan::parallel {

// How vectors of heads move between layouts: what is packed for a message, laid out after it, and
// summed over the places that hold a share. For every token t and output j
//   out[to_j + t * to_stride_j] = sum over j's sources of in[from + t * from_stride]
// in this order, where tensors count in vectors of the same number of elements (head_dim; 1 for row
// statistics), so that a gather depends on neither head_dim nor dtype.
//
// Immutable once used: a GPU keeps a copy of it.
struct HeadGather {
  struct Output {
    int64_t to = 0, to_stride = 0;
    int32_t first_source = 0, sources = 1;  // at least 1
  };
  struct Source {
    int64_t from = 0, from_stride = 0;
  };
  int64_t tokens = 0;
  std::vector<Output> outputs;
  std::vector<Source> sources;
  ops::DeviceCopies device_copies;

  bool empty() const { return tokens == 0 || outputs.empty(); }
  // One more output with one more source for the output last added.
  void Add(int64_t to, int64_t to_stride, int64_t from, int64_t from_stride);
  void AddSource(int64_t from, int64_t from_stride);
};

// Dtypes    in, out both f32, bf16 or f64 (f64 only together, and only on a CPU)
// Numerics  sums in f32 (f64), rounded once
// Errors    InvalidArgument when a vector lies outside its tensor, before anything is written
// Devices   cpu, cuda
void GatherHeads(Context& ctx, const HeadGather& gather, const Tensor& in, const Tensor& out,
                 int64_t elements);

}  // namespace longspan::parallel
