#pragma once
#include <functional>
#include <vector>

#include "ops/core/context.h"

namespace longspan::launch {

struct Timing {
  double median_ms = 0;
  double p90_ms = 0;
  int repeats = 0;
};

// Median and 90th percentile (nearest rank) of `milliseconds`, which is not empty.
Timing Summarize(std::vector<double> milliseconds);

// Times each of `runs`: one warm-up each, then rounds in which every one runs once, so that a slow
// moment of the machine hits all alike. Ends after at least `least` rounds and `seconds` times the
// number of runs.
std::vector<Timing> TimeInterleaved(const std::vector<std::function<void()>>& runs, double seconds,
                                    int least = 5);

// The same on the device of `ctx`: on a GPU by its own clock, after two warm-ups each. Runs there
// that take less than 1 ms begin with other data in its second-level cache, as they would in a
// training step.
std::vector<Timing> TimeInterleaved(Context& ctx, const std::vector<std::function<void()>>& runs,
                                    double seconds, int least = 5);

// What TimeInterleaved does, or a clock of a test's own.
using Timer = std::function<std::vector<Timing>(
    Context& ctx, const std::vector<std::function<void()>>& runs, double seconds, int least)>;

}  // namespace longspan::launch
