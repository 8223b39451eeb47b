#pragma once
#include <functional>
#include <vector>

#include "ops/autograd/tape.h"

namespace longspan::autograd {

using Segment = std::function<Var(Tape&, const std::vector<Var>&)>;

struct RecomputeOptions {
  // Keep what attention returns, so that the second run does without its forward pass and without
  // the communication of that (DistFlashAttn, arXiv 2310.03294).
  bool keep_attention = false;
};

// Runs `segment` and keeps only its inputs and its output (and what the options say); the backward
// pass runs it again and differentiates that second run. One entry on the tape. The segment must be
// a pure function of its inputs and of parameters that do not change in between; collectives of
// what is not kept are issued once more. Same bits as the segment itself.
Var Recompute(Tape& tape, const std::vector<Var>& inputs, const Segment& segment,
              const RecomputeOptions& options = {});

using RowSegment = std::function<Var(Tape&, const Var&)>;

// The same for a segment whose result has one row for each row of `x` (dim 0, at least one) and
// that treats rows one by one, run on at most `rows` of them at a time: what lies between exists
// for that many only, in both directions. It issues no collectives. `trained`: whether a parameter
// of the segment has a gradient.
//
// Numerics  gradients of parameters are added up in the order of the rows, tile after tile, in the
//           dtype of their sums. Those sums have other roundings than one over all rows; all else
//           is the same as far as ops give a row the same bits whatever rows are around it.
Var RecomputeRows(Tape& tape, const Var& x, int64_t rows, bool trained, const RowSegment& segment);

// Rows that each tile but the last has: nearly equal tiles of at most `rows`, multiples of 64 where
// that allows it.
int64_t TileRows(int64_t total, int64_t rows);

}  // namespace longspan::autograd
