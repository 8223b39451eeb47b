#pragma once
#include <vector>

#include "parallel/comm/network.h"
#include "parallel/context/timeline.h"

namespace longspan::parallel {

// Of one rank, in seconds since the ranks began together.
struct RankPrediction {
  double finish_s = 0;   // when its timeline ends
  double compute_s = 0;  // of that, computing
  double exposed_s = 0;  // of that, waiting for messages
};

struct Prediction {
  std::vector<RankPrediction> ranks;
  RankPrediction largest;  // of each figure over the ranks
};

// When the ranks of one communicator are through with their timelines: replays ranks[r], what rank
// r of the network does, by the rules of NetworkTimer and with modelled computing. A program that
// does the same on a SimulatedCommunicator takes the same time to the last bit.
//
// Time     about the number of events and messages
// Errors   InvalidArgument as CheckNetwork, for a clock that is not kModelled, and for timelines
//          that do not fit together, naming rank and transfer: not the same transfers in the same
//          order on all ranks, a message that only one side knows or that has two sizes, a wait
//          for a transfer that has not been posted
Prediction Predict(const NetworkOptions& options, const std::vector<Timeline>& ranks);

}  // namespace longspan::parallel
