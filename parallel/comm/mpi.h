#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

struct MpiOptions {
  // Messages are cut into pieces of at most this size. Measured with Open MPI 4.1 and 2 ranks on
  // one node: larger pieces halve the rate of AllReduce, smaller ones bring nothing.
  int64_t piece_bytes = int64_t{1} << 20;
  double timeout_s = kDefaultTimeoutS;  // a longer wait throws CommError; 0 = no limit
  // Asked while an operation is waited for: that another rank has failed, and how. The wait then
  // throws CommError with that text.
  std::function<std::optional<std::string>()> foreign_failure{};
};

namespace internal {

// A communicator over a private duplicate of MPI_COMM_WORLD; MPI must be initialised with
// MPI_THREAD_MULTIPLE (Bootstrap does both). Collective over all ranks.
//
// Operations are MPI's nonblocking collectives and point-to-point messages, all pieces posted when
// the operation is issued, so any poll moves any operation of the process. Reduction order is that
// of the MPI library: fixed for a given size, number of ranks and library.
std::unique_ptr<Communicator> MakeMpiWorld(const MpiOptions& options);

}  // namespace internal
}  // namespace longspan::parallel
