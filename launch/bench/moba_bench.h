#pragma once
#include <vector>

#include "launch/bench/cases.h"
#include "launch/bench/record.h"
#include "ops/core/context.h"

namespace longspan::launch {

// As BenchAttention, for a case of moba.
//
//   forward    q, k, v -> o (f32), lse: the own blocks, gate, lists, attention to chosen blocks
//   backward   do, q, k, v, the saved o, lse and lists -> dq, dk, dv; includes delta
//   flops      4 x pairs that were really chosen x D per query head forward, 2.5 times that
//   backward;
//              the gate does not count
//   shares     gate (mean keys, gates, choice), lists (their sorting), gather (rows to and from
//              tiles), attention (everything between)
std::vector<BenchRecord> BenchMoba(Context& ctx, const AttentionCase& problem,
                                   const BenchOptions& options, const MachinePeaks& peaks);

}  // namespace longspan::launch
