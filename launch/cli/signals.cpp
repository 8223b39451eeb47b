#include "launch/cli/signals.h"

#include <csignal>
#include <initializer_list>

namespace longspan::launch {
namespace {

volatile std::sig_atomic_t stop_requested = 0;

extern "C" void HandleStop(int signal) {
  stop_requested = 1;
  if (signal != SIGUSR1) std::signal(signal, SIG_DFL);
}

}  // namespace

void CatchStopSignals() {
  struct sigaction action = {};
  action.sa_handler = HandleStop;
  action.sa_flags = SA_RESTART;
  for (int signal : {SIGUSR1, SIGTERM, SIGINT}) sigaction(signal, &action, nullptr);
}

bool StopRequested() { return stop_requested != 0; }

}  // namespace longspan::launch
