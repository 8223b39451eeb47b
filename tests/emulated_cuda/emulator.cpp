#include "tests/emulated_cuda/emulator.h"

#include <map>
#include <mutex>

#include "tests/emulated_cuda/tally.h"

namespace longspan::emulated {
namespace {

struct Faults {
  std::mutex mutex;
  std::map<Fault, int> calls_left;  // until the one that fails
};
Faults& TheFaults() {
  static Faults& faults = *new Faults;
  return faults;
}

struct Launches {
  std::mutex mutex;
  std::map<std::string, uint64_t> of;
};
Launches& TheLaunches() {
  static Launches& launches = *new Launches;
  return launches;
}

}  // namespace

Tally& TheTally() {
  static Tally& tally = *new Tally;
  return tally;
}

Counters Count() {
  const Tally& t = TheTally();
  return {t.launches, t.allocations, t.host_allocations, t.copies, t.host_waits, t.blocking_copies};
}

void CountLaunch(const char* kernel) {
  ++TheTally().launches;
  Launches& launches = TheLaunches();
  const std::lock_guard lock(launches.mutex);
  ++launches.of[kernel];
}

uint64_t LaunchesOf(const std::string& kernel) {
  Launches& launches = TheLaunches();
  const std::lock_guard lock(launches.mutex);
  const auto it = launches.of.find(kernel);
  return it == launches.of.end() ? 0 : it->second;
}

void FailNext(Fault fault, int skip) {
  Faults& faults = TheFaults();
  const std::lock_guard lock(faults.mutex);
  faults.calls_left[fault] = skip;
}

bool TakeFault(Fault fault) {
  Faults& faults = TheFaults();
  const std::lock_guard lock(faults.mutex);
  const auto it = faults.calls_left.find(fault);
  if (it == faults.calls_left.end()) return false;
  if (it->second-- > 0) return false;
  faults.calls_left.erase(it);
  return true;
}

void Recover() {
  EndFailure();
  {
    Faults& faults = TheFaults();
    const std::lock_guard lock(faults.mutex);
    faults.calls_left.clear();
  }
  cudaGetLastError();
}

}  // namespace longspan::emulated
