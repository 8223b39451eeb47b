#pragma once
#include "ops/attention/attention.h"
#include "parallel/comm/communicator.h"
#include "parallel/context/program.h"

namespace longspan::parallel {

// Runs programs. Knows neither masks nor placements nor strategies: kernels are given the masks of
// the program's steps, and rows of keys where the program says they are.
//
// Shapes    q, o, dq [T, Hq, D]; k, v, dk, dv [T, Hkv, D], tokens in the order of program.own; lse
//           [T, Hq], undefined of sigmoid
// Dtypes    q, k, v all f32, bf16 or f64. o in that dtype, rounded once; lse, dq, dk, dv f32 (f64)
// Memory    one allocation for each arena of the program
// Time      kernels are reported by comm.Computed; waits are the trace's "communication wait"
// Errors    InvalidArgument for operands that do not fit the program, before anything is sent
// Devices   cpu, cuda (f32 and bf16)

struct ForwardOutput {
  Tensor o, lse;
  Tensor kept;  // arena kKept [rows, 2, D] for the backward pass; undefined when it has no rows
};
// Collective. What no step of the program computes has o = 0 and lse = -inf. Without `round_output`
// o is f32 (f64), to be merged with results over other keys.
ForwardOutput RunForward(Context& ctx, Communicator& comm, const Program& program, const Tensor& q,
                         const Tensor& k, const Tensor& v, const ops::AttentionOptions& options,
                         bool round_output = true);

struct BackwardOutput {
  Tensor dq, dk, dv;
};
// Collective. `lse` and `kept` of the forward pass; delta as of AttentionBackward.
BackwardOutput RunBackward(Context& ctx, Communicator& comm, const Program& program,
                           const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& lse, const Tensor& delta, const Tensor& kept,
                           const ops::AttentionOptions& options);

}  // namespace longspan::parallel
