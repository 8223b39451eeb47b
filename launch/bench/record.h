#pragma once
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launch/bench/timing.h"
#include "ops/core/dtype.h"
#include "ops/core/machine.h"

namespace longspan::launch {

struct BenchOptions {
  std::string implementation;  // empty: all that accept a case, except the reference
  bool forward = true, backward = true;
  double seconds = 0.5;   // per measurement, at least (TimeInterleaved)
  int repeats = 5;        // at least
  Timer timer = nullptr;  // of single ops; absent: TimeInterleaved

  std::vector<Timing> Time(Context& ctx, const std::vector<std::function<void()>>& runs) const;
};

// One measured case. What it says about speed is relative to the floor
//   floor_ms = max(flops / peak_gflops, bytes / peak_gbps)
// the time of a machine that computes at its peak while every operand and result moves once. A
// problem that fits into caches can be faster than a floor made of bytes.
struct BenchRecord {
  std::string op, name, pass, implementation, device = "cpu";
  int threads = 0;
  Timing timing;
  double flops = 0;  // effective: hidden pairs and recomputation do not count
  double bytes = 0;
  std::optional<double> visible_fraction, block_fraction;
  // Of a sparse pattern: time over that of the dense one, of the same shape in the same rounds.
  std::optional<double> time_fraction;
  int64_t timed_kv_heads = 0;  // AttentionCase
  double peak_gflops = 0, peak_gbps = 0;

  double floor_ms() const;
  double fraction_of_floor() const { return floor_ms() / timing.median_ms; }
  double gflops() const { return flops / timing.median_ms * 1e-6; }
  double gbps() const { return bytes / timing.median_ms * 1e-6; }

  // Of routed attention only, and only then in the JSON: what share of the time each part takes.
  std::vector<std::pair<std::string, double>> shares;

  // Of whole training steps only, and only then in the JSON.
  std::optional<double> tokens_per_s, mfu;
  std::vector<std::pair<std::string, double>> more;  // further keys of the JSON
  std::vector<std::pair<std::string, std::string>> labels;  // further ones whose values are words
};

// What is known of a record before anything is measured.
BenchRecord RecordOf(const char* op, const std::string& name, bool backward, DType dtype,
                     const MachinePeaks& peaks);

// Peak of the arithmetic that a dtype allows, on the threads of `peaks`. f64 is taken as half of
// f32, which has twice the lanes.
double PeakGflops(const MachinePeaks& peaks, DType dtype);

// One line of JSON, with exactly the keys op, case, pass, impl, device, threads, ms_median, ms_p90,
// flops, bytes, visible_fraction, block_fraction, peak_gflops, peak_gbps, floor_ms,
// fraction_of_floor, peer, peer_ms_median, and what of a record's other fields is set. What does
// not apply is null; peers are other programs (tests/bench/peers), so theirs always are.
std::string ToJsonLine(const BenchRecord& record);
// `implementations`: those of the ops that are timed which this machine can run.
std::string ToJsonLine(const MachinePeaks& peaks,
                       const std::vector<std::string>& implementations = {});

// The same as aligned text; `name_width` is the width of the longest case name.
std::string TableHead(size_t name_width);
std::string TableLine(const BenchRecord& record, size_t name_width);
// "    gate 1.5 %, lists 0.3 %": what follows the line of a record with shares.
std::string SharesLine(const BenchRecord& record);
std::string ToText(const MachinePeaks& peaks);

// An entry of an op's implementation table with its answer to a case.
struct Candidate {
  std::string name;
  std::string reason;  // why it cannot run the case; empty when it can
};

inline constexpr const char* kReference = "reference";
inline constexpr const char* kBest = "best";  // the first that accepts
// "reference" and its likes on other devices.
inline bool IsReference(const std::string& name) { return name.starts_with(kReference); }

// What to time: `wanted` (kBest: what ops choose by themselves), or when that is empty every
// candidate that accepts. A reference, which is what the others are compared with and takes very
// long, is left out unless it is wanted or the only one.
//
// Errors    InvalidArgument: `wanted` does not exist or cannot run the case
std::vector<std::string> ChooseImplementations(const std::string& case_name,
                                               const std::vector<Candidate>& candidates,
                                               const std::string& wanted);

// Throws Error unless `difference` is allowed for `dtype`.
void RequireAgreement(const std::string& case_name, const std::string& implementation,
                      const char* what, double difference, DType dtype);

}  // namespace longspan::launch
