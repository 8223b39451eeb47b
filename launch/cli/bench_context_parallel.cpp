#include "launch/cli/bench_context_parallel.h"

#include <algorithm>
#include <cctype>

#include "ops/core/error.h"

namespace longspan::launch {
namespace {

using parallel::PlacementKind;
using parallel::StrategyKind;

constexpr PlacementKind kPlacements[] = {PlacementKind::kContiguous, PlacementKind::kZigzag,
                                         PlacementKind::kStriped, PlacementKind::kBalanced};
constexpr StrategyKind kStrategies[] = {StrategyKind::kRing,      StrategyKind::kDoubleRing,
                                        StrategyKind::kAllGather, StrategyKind::kUlysses,
                                        StrategyKind::kHybrid,    StrategyKind::kExchange,
                                        StrategyKind::kAuto};

template <class Kind>
std::string NameOf(Kind kind) {
  std::string name = parallel::ToString(kind);
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

template <class Kind, size_t kCount>
Kind Find(const char* option, const std::string& name, const Kind (&kinds)[kCount]) {
  std::string known;
  for (const Kind kind : kinds) {
    if (NameOf(kind) == name) return kind;
    known += (known.empty() ? "" : ", ") + NameOf(kind);
  }
  throw InvalidArgument(Str(option, " ", name, " does not exist; use one of ", known));
}

}  // namespace

const std::vector<const char*>& ContextParallelArguments::Names() {
  static const std::vector<const char*> names = {
      "--strategy",  "--placement", "--ranks",      "--ranks-per-node",  "--tflops",
      "--link-gbps", "--node-gbps", "--latency-us", "--dense-ring-time", "--plan-only"};
  return names;
}

void AddContextParallelOptions(CLI::App& command, ContextParallelArguments& a) {
  const auto list = [&](const char* name, auto& values, const char* help) {
    command.add_option(name, values, help)->delimiter(',')->allow_extra_args(false);
  };
  list("--strategy", a.strategies,
       "With context_parallel: ring, double_ring, all_gather, ulysses, hybrid, exchange, auto; "
       "repeatable or separated by commas (default: all)");
  list("--placement", a.placements,
       "With context_parallel: contiguous, zigzag, striped, balanced (default: zigzag)");
  list("--ranks", a.ranks, "With context_parallel: ranks that share the row (default: 8)");
  const auto number = [&](const char* name, double& value, const char* help) {
    return command.add_option(name, value, help)->check(CLI::NonNegativeNumber);
  };
  command
      .add_option("--ranks-per-node", a.ranks_per_node,
                  "With context_parallel: neighbouring ranks of one node (default 0: all)")
      ->check(CLI::Range(0, 65536));
  number("--tflops", a.teraflops,
         "With context_parallel: what a rank computes, TFLOP/s (default 600)");
  CLI::Option* link =
      number("--link-gbps", a.gigabytes,
             "With context_parallel: link between ranks of a node, GB/s each way (default 400)");
  CLI::Option* node =
      number("--node-gbps", a.node_gigabytes,
             "With context_parallel: link of a rank to other nodes, GB/s each way (default 50)");
  number("--latency-us", a.latency_us,
         "With context_parallel: of a message, microseconds (default 10)");
  number("--dense-ring-time", a.dense_ring_time,
         "With context_parallel: choose the links so that the keys and values of a dense ring take "
         "this many times as long as the layer's own forward computation")
      ->excludes(link)
      ->excludes(node);
  command.add_flag("--plan-only", a.plan_only,
                   "With context_parallel: plans and forecasts alone, for rows of any length");
}

ContextParallelOptions ContextParallelOptionsOf(const ContextParallelArguments& a) {
  ContextParallelOptions o;
  for (const std::string& name : a.strategies) {
    o.strategies.push_back({.kind = Find("--strategy", name, kStrategies)});
  }
  if (o.strategies.empty()) {
    for (const StrategyKind kind : kStrategies) {
      // A double ring needs nodes to be one.
      if (kind == StrategyKind::kDoubleRing && a.ranks_per_node == 0) continue;
      o.strategies.push_back({.kind = kind});
    }
  }
  for (const std::string& name : a.placements) {
    o.placements.push_back(Find("--placement", name, kPlacements));
  }
  if (o.placements.empty()) o.placements = {PlacementKind::kZigzag};
  o.ranks = a.ranks.empty() ? std::vector<int>{8} : a.ranks;
  for (const int ranks : o.ranks) {
    if (ranks < 1 || ranks > 65536) {
      throw InvalidArgument(Str("--ranks ", ranks, " must be between 1 and 65536"));
    }
  }
  for (const auto& [option, value] : {std::pair{"--tflops", a.teraflops},
                                      {"--link-gbps", a.gigabytes},
                                      {"--node-gbps", a.node_gigabytes}}) {
    if (value <= 0) throw InvalidArgument(Str(option, " ", value, " must be above 0"));
  }
  o.network.intra = {1e-6 * a.latency_us, 1e9 * a.gigabytes};
  o.network.inter = {1e-6 * a.latency_us, 1e9 * a.node_gigabytes};
  o.network.ranks_per_node = a.ranks_per_node;
  o.network.flops_per_s = 1e12 * a.teraflops;
  o.dense_ring_time = a.dense_ring_time;
  o.plan_only = a.plan_only;
  return o;
}

}  // namespace longspan::launch
