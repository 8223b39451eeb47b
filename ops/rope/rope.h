#pragma once
#include <cstdint>
#include <vector>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Rotary position embedding in the half-split layout of Hugging Face Llama checkpoints: dims i and
// i + D/2 of a head form a pair that is rotated by angle position * theta^(-2 i / D):
//   y[i]       = x[i] cos - x[i + D/2] sin
//   y[i + D/2] = x[i + D/2] cos + x[i] sin
//
// Shapes    positions [T]; cos, sin [T, D/2]; x, y, dy, dx [T, H, D], D even
// Dtypes    positions i64; x f32 or bf16 with an f32 table, or f64 with an f64 table
// Numerics  angles, cosines and sines in f64, rounded once into the table; the rotation in f32
//           (f64 for f64), rounded once. An angle is off by less than 1e-9 at position 2^20.
// Errors    InvalidArgument naming the op and the argument, before any output is written
// Devices   cpu, cuda (no f64: Unsupported)
struct RopeOptions {
  double theta = 10000;  // base of the frequencies, > 0
  int64_t head_dim = 0;  // D, even, >= 2
};

// Rotations of the tokens of one packed row or shard, shared by all layers and heads. Positions are
// explicit: shards are permuted and documents restart at 0.
struct RopeTable {
  Tensor cos, sin;  // [T, D/2]
};

// theta^(-2 i / D) for i in [0, D/2): radians per position.
std::vector<double> RopeFrequencies(const RopeOptions& options);

// `positions` are in host memory, the table on the device of `ctx`. `dtype` is that of the
// activations; the table is f64 for f64 and else f32.
RopeTable MakeRopeTable(Context& ctx, const Tensor& positions, const RopeOptions& options,
                        DType dtype);

Tensor RopeForward(Context& ctx, const Tensor& x, const RopeTable& table);

// Returns dx: the rotation by the opposite angle.
Tensor RopeBackward(Context& ctx, const Tensor& dy, const RopeTable& table);

}  // namespace longspan::ops
