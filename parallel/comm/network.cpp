#include "parallel/comm/network.h"

#include <algorithm>
#include <cmath>

#include "ops/core/check.h"

namespace longspan::parallel {
namespace {

void CheckLink(const char* name, const LinkOptions& link) {
  if (!std::isfinite(link.latency_s) || link.latency_s < 0) {
    throw InvalidArgument(Str("network: ", name, ".latency_s is ", link.latency_s,
                              " (use a number of seconds from 0)"));
  }
  if (!std::isfinite(link.bytes_per_s) || link.bytes_per_s <= 0) {
    throw InvalidArgument(
        Str("network: ", name, ".bytes_per_s is ", link.bytes_per_s, " (use a rate above 0)"));
  }
}

}  // namespace

void CheckNetwork(const NetworkOptions& options) {
  CheckLink("intra", options.intra);
  if (options.ranks_per_node < 0) {
    throw InvalidArgument(Str("network: ranks_per_node is ", options.ranks_per_node,
                              " (use a number of ranks, or 0 for one node)"));
  }
  if (options.ranks_per_node > 0) CheckLink("inter", options.inter);
  const bool modelled = options.compute == ComputeClock::kModelled;
  if (modelled && (!std::isfinite(options.flops_per_s) || options.flops_per_s <= 0)) {
    throw InvalidArgument(Str("network: flops_per_s is ", options.flops_per_s,
                              ", and modelled computing needs a rate above 0"));
  }
}

NetworkTimer::NetworkTimer(const NetworkOptions& options, std::vector<int> world_ranks)
    : options_(options),
      world_ranks_(std::move(world_ranks)),
      out_free_s_(world_ranks_.size() * kClasses),
      in_free_s_(world_ranks_.size() * kClasses),
      inbound_(world_ranks_.size() * kClasses) {
  CheckNetwork(options);
}

int NetworkTimer::NodeOf(int rank) const {
  const int world_rank = world_ranks_[static_cast<size_t>(rank)];
  return options_.ranks_per_node == 0 ? 0 : world_rank / options_.ranks_per_node;
}

void NetworkTimer::Reset() {
  std::ranges::fill(out_free_s_, 0.0);
  std::ranges::fill(in_free_s_, 0.0);
}

std::vector<double> NetworkTimer::Exchange(std::span<const double> ready,
                                           std::span<const std::vector<NetworkMessage>> sends) {
  for (int from = 0; from < size(); ++from) {
    const auto sender = static_cast<size_t>(from);
    for (const NetworkMessage& m : sends[sender]) {
      if (m.bytes == 0 || m.peer == from) continue;
      const Class c = Between(from, m.peer);
      double& free_s = out_free_s_[Port(from, c)];
      const double start_s = std::max(ready[sender], free_s);
      free_s = start_s + static_cast<double>(m.bytes) / Link(c).bytes_per_s;
      inbound_[Port(m.peer, c)].push_back({start_s, m.bytes});
    }
  }
  std::vector<double> arrival(ready.begin(), ready.end());
  for (int to = 0; to < size(); ++to) {
    for (const Class c : {kIntra, kInter}) {
      std::vector<Inbound>& messages = inbound_[Port(to, c)];
      // They were added by sender and place in its list.
      std::ranges::stable_sort(messages, {}, &Inbound::start_s);
      double& free_s = in_free_s_[Port(to, c)];
      for (const Inbound& m : messages) {
        free_s = std::max(m.start_s + Link(c).latency_s, free_s) +
                 static_cast<double>(m.bytes) / Link(c).bytes_per_s;
      }
      if (!messages.empty()) {
        double& last_s = arrival[static_cast<size_t>(to)];
        last_s = std::max(last_s, free_s);
      }
      messages.clear();
    }
  }
  return arrival;
}

double NetworkTimer::Collective(CommOp op, int64_t bytes, std::span<const double> ready) {
  double begin_s = *std::ranges::max_element(ready);
  if (size() == 1) return begin_s;
  bool uses[kClasses] = {};
  for (int r = 0; r < size(); ++r) uses[Between(r, (r + 1) % size())] = true;
  double latency_s = 0, bytes_per_s = 0;
  for (const Class c : {kIntra, kInter}) {
    if (!uses[c]) continue;
    latency_s = std::max(latency_s, Link(c).latency_s);
    const double rate = Link(c).bytes_per_s;
    bytes_per_s = bytes_per_s == 0 ? rate : std::min(bytes_per_s, rate);
    for (int r = 0; r < size(); ++r) {
      begin_s = std::max({begin_s, out_free_s_[Port(r, c)], in_free_s_[Port(r, c)]});
    }
  }
  const double p = size(), hops = p - 1, whole_s = static_cast<double>(bytes) / bytes_per_s;
  double seconds = 0;
  switch (op) {
    case CommOp::kAllReduce:
      seconds = 2 * hops * (latency_s + whole_s / p);
      break;
    case CommOp::kAllGather:
    case CommOp::kReduceScatter:
      seconds = hops * (latency_s + whole_s);
      break;
    case CommOp::kBroadcast:
      seconds = hops * latency_s + whole_s;
      break;
    case CommOp::kBarrier:
      seconds = 2 * hops * latency_s;
      break;
    case CommOp::kExchange:
    case CommOp::kSplit:
      LONGSPAN_CHECK(false) << "NetworkTimer: " << ToString(op) << " is not a collective";
  }
  for (const Class c : {kIntra, kInter}) {
    if (!uses[c]) continue;
    for (int r = 0; r < size(); ++r) {
      out_free_s_[Port(r, c)] = in_free_s_[Port(r, c)] = begin_s + seconds;
    }
  }
  return begin_s + seconds;
}

}  // namespace longspan::parallel
