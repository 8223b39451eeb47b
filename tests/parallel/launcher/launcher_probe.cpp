// A job that behaves as its first argument says, for mpirun_test.sh.
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#include "ops/core/parallel_for.h"
#include "parallel/comm/bootstrap.h"

namespace {

using longspan::parallel::Bootstrap;

std::atomic<int> signals{0};
void OnSignal(int) { ++signals; }

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

void PrintReady(Bootstrap& job) {
  std::printf("pid %d\n", static_cast<int>(getpid()));
  std::fflush(stdout);
  job.world().Barrier();
  if (job.rank() == 0) {
    std::printf("ready\n");
    std::fflush(stdout);
  }
}

int Run(const std::string& mode, int argument) {
  if (mode == "stop") signal(SIGUSR1, OnSignal);
  if (mode == "deaf") {
    for (int s : {SIGUSR1, SIGTERM, SIGINT, SIGHUP}) signal(s, SIG_IGN);
  }
  auto job = Bootstrap::Start();
  if (mode == "exit") {
    if (job->rank() == 0) std::printf("this is the output\n");
    job->world().Barrier();
    job->Finish();
    return argument;
  }
  if (mode == "environment") {
    std::printf("threads=%d cores=%d omp=%s wait=%s terminal=%d stdin=%s\n", job->threads(),
                longspan::AvailableCores(),
                longspan::parallel::Environment("OMP_NUM_THREADS").value_or("-").c_str(),
                longspan::parallel::Environment("OMP_WAIT_POLICY").value_or("-").c_str(),
                longspan::parallel::StdoutIsTerminal(), std::getchar() == EOF ? "empty" : "data");
    job->Finish();
    return 0;
  }
  if (mode == "abort-one" || mode == "throw-one") {
    if (job->rank() == job->size() - 1) {
      if (mode == "abort-one") job->world().Abort("a test wants it");
      throw std::runtime_error("a test wants it");
    }
    job->world().Barrier();  // never complete
    return 0;
  }
  PrintReady(*job);  // "stop" and "deaf"
  while (signals == 0) Sleep(0.01);
  Sleep(2);  // the rest of a step
  job->world().Barrier();
  std::printf("rank %d stopped after %d signal\n", job->rank(), signals.load());
  job->Finish();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : 0);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
}
