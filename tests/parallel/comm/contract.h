#pragma once
#include <functional>
#include <string>
#include <vector>

#include "parallel/comm/communicator.h"

namespace longspan::test {

// One way to get a group of ranks; the contract tests run once for each that a binary offers.
struct Harness {
  std::string name;  // as gtest wants it: letters, digits, underscores
  // Runs the body once per rank with that rank's communicator: on threads, or here when this
  // process is one rank of a job.
  std::function<void(const std::function<void(parallel::Communicator&)>&)> run;
};
std::vector<Harness> Harnesses();  // defined once per binary

inline void PrintTo(const Harness& harness, std::ostream* out) { *out << harness.name; }

// The same harness with every communicator inside a CountingCommunicator.
Harness Counted(const Harness& harness);

}  // namespace longspan::test
