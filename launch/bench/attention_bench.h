#pragma once
#include <vector>

#include "launch/bench/cases.h"
#include "launch/bench/record.h"
#include "ops/core/context.h"

namespace longspan::launch {

// Cases with the same dtype, sizes and documents together, so that a sparse pattern is timed in
// turns with the dense one. In the order of each one's first case.
std::vector<std::vector<AttentionCase>> GroupByShape(const std::vector<AttentionCase>& cases);

// Checks the chosen implementations on small versions of the cases against the reference, then
// times all of them on all cases in the same rounds, on random operands: one record per case, pass
// and implementation.
//
//   forward    q, k, v -> o (in their dtype), lse
//   backward   do, q, k, v and the saved o, lse -> dq, dk, dv; includes delta = rowsum(do * o). Of
//              sigmoid there is neither lse nor delta, and o is not read
//   flops      4 x visible pairs x D per query head forward, 2.5 times that backward
//   bytes      q, k, v, o once forward; q, k, v, o, do, dq, dk, dv once backward
//
//   time_fraction  where the group has the dense case of the same normalization too: causal, or
//             full for patterns that look ahead
//
// Errors    InvalidArgument of ChooseImplementations, or of a case that times some kv heads alone
//           although they differ; Error when an implementation is wrong
std::vector<BenchRecord> BenchAttention(Context& ctx, const std::vector<AttentionCase>& group,
                                        const BenchOptions& options, const MachinePeaks& peaks);

}  // namespace longspan::launch
