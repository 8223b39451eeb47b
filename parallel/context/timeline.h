#pragma once
#include <cstdint>
#include <vector>

namespace longspan::parallel {

// What one rank does during a pass of attention, as far as time is concerned: pure data, derived
// from a program (program.h) with sizes and rates put in, and replayed by Predict (predict.h).
struct TimelineMessage {
  int peer = 0;  // rank of the communicator that the timelines belong to
  int64_t bytes = 0;
};

struct TimelineEvent {
  enum class Kind : uint8_t {
    kPost,     // starts transfer `transfer`: one Exchange, of all ranks alike and in the same order
    kWait,     // until the messages to this rank of `transfer` have arrived
    kCompute,  // `flops` floating-point operations
  };
  Kind kind = Kind::kCompute;
  int32_t transfer = -1;
  std::vector<TimelineMessage> sends{}, recvs{};  // of kPost, in list order
  double flops = 0;
};

using Timeline = std::vector<TimelineEvent>;

}  // namespace longspan::parallel
