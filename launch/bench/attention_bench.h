#pragma once
#include <vector>

#include "launch/bench/cases.h"
#include "launch/bench/record.h"
#include "ops/core/context.h"

namespace longspan::launch {

// Checks the chosen implementations on a small version of the case against the reference, then
// times them on random operands, one record per pass and implementation.
//
//   forward    q, k, v -> o (in their dtype), lse
//   backward   do, q, k, v and the saved o, lse -> dq, dk, dv; includes delta = rowsum(do * o)
//   flops      4 x visible pairs x D per query head forward, 2.5 times that backward
//   bytes      q, k, v, o once forward; q, k, v, o, do, dq, dk, dv once backward
//
// Errors    InvalidArgument of ChooseImplementations; Error when an implementation is wrong
std::vector<BenchRecord> BenchAttention(Context& ctx, const AttentionCase& problem,
                                        const BenchOptions& options, const MachinePeaks& peaks);

}  // namespace longspan::launch
