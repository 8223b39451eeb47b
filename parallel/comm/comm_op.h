#pragma once

namespace longspan::parallel {

// The operations of a Communicator that every rank issues in the same order.
enum class CommOp {
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kBroadcast,
  kExchange,
  kBarrier,
  kSplit
};
inline constexpr int kCommOps = 7;

constexpr const char* ToString(CommOp op) {
  constexpr const char* kNames[kCommOps] = {"AllReduce", "AllGather", "ReduceScatter", "Broadcast",
                                            "Exchange",  "Barrier",   "Split"};
  return kNames[static_cast<int>(op)];
}

}  // namespace longspan::parallel
