#include "launch/bench/record.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "launch/bench/operands.h"
#include "ops/core/error.h"

namespace longspan::launch {
namespace {

using Json = nlohmann::ordered_json;

Json OrNull(const std::optional<double>& value) {
  return value.has_value() ? Json(*value) : Json();
}

std::string Format(const char* format, auto... values) {
  char text[512];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

}  // namespace

std::vector<Timing> BenchOptions::Time(Context& ctx,
                                       const std::vector<std::function<void()>>& runs) const {
  return timer ? timer(ctx, runs, seconds, repeats) : TimeInterleaved(ctx, runs, seconds, repeats);
}

BenchRecord RecordOf(const char* op, const std::string& name, bool backward, DType dtype,
                     const MachinePeaks& peaks) {
  BenchRecord r;
  r.op = op;
  r.name = name;
  r.pass = backward ? "backward" : "forward";
  r.device = peaks.device;
  r.threads = peaks.threads;
  r.peak_gflops = PeakGflops(peaks, dtype);
  r.peak_gbps = peaks.copy_gbps;
  return r;
}

double BenchRecord::floor_ms() const {
  return std::max(flops / peak_gflops, bytes / peak_gbps) * 1e-6;
}

double PeakGflops(const MachinePeaks& peaks, DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return peaks.bf16_gflops;
    case DType::kF64:
      return peaks.f32_gflops / 2;
    default:
      return peaks.f32_gflops;
  }
}

std::string ToJsonLine(const BenchRecord& r) {
  Json json = {{"op", r.op},
               {"case", r.name},
               {"pass", r.pass},
               {"impl", r.implementation},
               {"device", r.device},
               {"threads", r.threads},
               {"ms_median", r.timing.median_ms},
               {"ms_p90", r.timing.p90_ms},
               {"flops", r.flops},
               {"bytes", r.bytes},
               {"visible_fraction", OrNull(r.visible_fraction)},
               {"block_fraction", OrNull(r.block_fraction)},
               {"peak_gflops", r.peak_gflops},
               {"peak_gbps", r.peak_gbps},
               {"floor_ms", r.floor_ms()},
               {"fraction_of_floor", r.fraction_of_floor()},
               {"peer", nullptr},
               {"peer_ms_median", nullptr}};
  if (r.time_fraction.has_value()) json["time_fraction"] = *r.time_fraction;
  if (r.timed_kv_heads > 0) json["timed_kv_heads"] = r.timed_kv_heads;
  for (const auto& [part, share] : r.shares) json["shares"][part] = share;
  if (r.tokens_per_s.has_value()) {
    json["tokens_per_s"] = *r.tokens_per_s;
    json["mfu"] = OrNull(r.mfu);
  }
  for (const auto& [key, value] : r.labels) json[key] = value;
  for (const auto& [key, value] : r.more) json[key] = value;
  return json.dump();
}

std::string ToJsonLine(const MachinePeaks& p, const std::vector<std::string>& implementations) {
  const Json json = {{"op", "machine"},
                     {"device", p.device},
                     {"name", p.name.empty() ? Json() : Json(p.name)},
                     {"threads", p.threads},
                     {"f32_gflops", p.f32_gflops},
                     {"f32_set", p.f32_set},
                     {"bf16_gflops", p.bf16_gflops},
                     {"bf16_set", p.bf16_set},
                     {"copy_gbps", p.copy_gbps},
                     {"implementations", implementations}};
  return json.dump();
}

std::string TableHead(size_t name_width) {
  return Format("%-*s  %-8s  %-15s %10s %10s %9s %10s %8s %7s %7s %7s %10s %8s",
                static_cast<int>(name_width), "case", "pass", "impl", "ms median", "ms p90",
                "GFLOP/s", "per thread", "GB/s", "visible", "blocks", "time", "floor ms",
                "of floor");
}

std::string TableLine(const BenchRecord& r, size_t name_width) {
  const auto share = [](const std::optional<double>& value) {
    return value.has_value() ? Format("%.3f", *value) : std::string("-");
  };
  return Format("%-*s  %-8s  %-15s %10.3f %10.3f %9.1f %10.1f %8.1f %7s %7s %7s %10.3f %7.1f%%",
                static_cast<int>(name_width), r.name.c_str(), r.pass.c_str(),
                r.implementation.c_str(), r.timing.median_ms, r.timing.p90_ms, r.gflops(),
                r.gflops() / r.threads, r.gbps(), share(r.visible_fraction).c_str(),
                share(r.block_fraction).c_str(), share(r.time_fraction).c_str(), r.floor_ms(),
                100 * r.fraction_of_floor());
}

std::string SharesLine(const BenchRecord& r) {
  std::string line = "   ";
  for (const auto& [part, share] : r.shares) {
    line += Format("%s %s %.1f %%", line.size() > 3 ? "," : "", part.c_str(), 100 * share);
  }
  return line;
}

std::string ToText(const MachinePeaks& p) {
  if (p.device != "cpu") {
    return Format("peaks of %s: f32 %.0f GFLOP/s, bf16 %.0f GFLOP/s (%s), copy %.0f GB/s",
                  p.name.c_str(), p.f32_gflops, p.bf16_gflops, p.bf16_set.c_str(), p.copy_gbps);
  }
  return Format("peaks of %d %s: f32 %.1f GFLOP/s (%s), bf16 %.1f GFLOP/s (%s), copy %.1f GB/s",
                p.threads, p.threads == 1 ? "thread" : "threads", p.f32_gflops, p.f32_set.c_str(),
                p.bf16_gflops, p.bf16_set.c_str(), p.copy_gbps);
}

std::vector<std::string> ChooseImplementations(const std::string& case_name,
                                               const std::vector<Candidate>& candidates,
                                               const std::string& wanted) {
  std::vector<std::string> accepting;
  std::string known;
  for (const Candidate& c : candidates) {
    known += (known.empty() ? "" : ", ") + c.name;
    if (c.reason.empty()) accepting.push_back(c.name);
    if (c.name != wanted) continue;
    if (c.reason.empty()) return {wanted};
    throw InvalidArgument(Str("--impl ", wanted, " cannot run ", case_name, ": ", c.reason,
                              "; choose cases that it can run with --filter"));
  }
  if (wanted == kBest && !accepting.empty()) return {accepting.front()};
  if (!wanted.empty()) {
    throw InvalidArgument(
        Str("--impl ", wanted, " is not an implementation; use best or one of ", known));
  }
  std::vector<std::string> timed;
  for (const std::string& name : accepting) {
    if (!IsReference(name)) timed.push_back(name);
  }
  return timed.empty() ? accepting : timed;
}

void RequireAgreement(const std::string& case_name, const std::string& implementation,
                      const char* what, double difference, DType dtype) {
  const double allowed = AllowedDifference(dtype);
  if (difference <= allowed) return;
  throw Error(Str("implementation ", implementation, " is wrong on a small version of ", case_name,
                  ": ", what, " differs from the reference by ", difference, " (at most ", allowed,
                  "), so its speed was not measured"));
}

}  // namespace longspan::launch
