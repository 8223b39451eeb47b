#pragma once
#include <vector>

#include "launch/bench/cases.h"
#include "launch/bench/record.h"
#include "ops/core/context.h"

namespace longspan::launch {

// Checks the chosen implementations on a small version of the case against the reference, then
// times them on random operands.
//
//   pass       backward for the roles dx and dw, forward otherwise; no record when that pass is
//              not wanted
//   flops      2 M N K
//   bytes      A, B and C once; C twice where the product is added to it (dw)
//
// Errors    InvalidArgument of ChooseImplementations; Error when an implementation is wrong
std::vector<BenchRecord> BenchGemm(Context& ctx, const GemmCase& problem,
                                   const BenchOptions& options, const MachinePeaks& peaks);

}  // namespace longspan::launch
