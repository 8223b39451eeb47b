#pragma once
#include <vector>

#include "launch/bench/cases.h"
#include "launch/bench/record.h"
#include "ops/core/context.h"

namespace longspan::launch {

// Times an op that is bound by memory, both passes where it has two. On a GPU a small version is
// first compared with the same op on the CPU.
//
//   flops      0: the floor is that of the bytes
//   bytes      every operand read once and every result written once; what is added to counts
//              twice. Indices and per-row statistics are counted, tables of RoPE too.
//              crossentropy: the logits in f32, and in the backward pass the gradients that replace
//              them; its time is that of the op less that of its products alone, in the same rounds
//
// Errors    Error when an op is wrong
std::vector<BenchRecord> BenchMemory(Context& ctx, const MemoryCase& problem,
                                     const BenchOptions& options, const MachinePeaks& peaks);

}  // namespace longspan::launch
