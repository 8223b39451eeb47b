#pragma once
#include <functional>
#include <string>

#include "parallel/comm/bootstrap.h"

namespace longspan::launch {

// Runs `body` as one rank of a job and turns its outcome into an exit code:
//   0  success
//   2  every rank failed: rank 0 prints its error, all leave through the communicator's clean end
//   3  only some ranks failed: after waiting a few seconds for the others, a failed rank prints its
//      error and ends the whole job
int RunSession(const std::function<void(parallel::Bootstrap&)>& body);

}  // namespace longspan::launch
