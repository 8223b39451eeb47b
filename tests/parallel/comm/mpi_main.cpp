// main() of tests that run under mpirun: every rank runs every test, any failing rank fails the
// run.
#include "tests/parallel/comm/mpi_main.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "tests/support/device_flag.h"

namespace longspan::test {
namespace {

std::unique_ptr<parallel::Bootstrap> job;

// Prints failures of the ranks that do not run gtest's own printer. A rank that leaves a test early
// would keep the others waiting, so it ends the job.
class FailureListener : public testing::EmptyTestEventListener {
  void OnTestStart(const testing::TestInfo& test) override { test_ = test.name(); }
  // gtest holds its lock here: no calls into it.
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (result.failed() && Job().rank() != 0) {
      std::fprintf(stderr, "rank %d: %s:%d: %s\n%s\n", Job().rank(), result.file_name(),
                   result.line_number(), test_.c_str(), result.message());
    }
    if (result.fatally_failed()) Job().world().Abort(result.message());
  }
  std::string test_;
};

}  // namespace

parallel::Bootstrap& Job() { return *job; }

}  // namespace longspan::test

int main(int argc, char** argv) {
  using longspan::test::job;
  testing::InitGoogleTest(&argc, argv);
  if (argc > 1 && std::string(argv[1]) == "--device=cuda") {
    longspan::test::internal::SetTestDevice({longspan::DeviceKind::kCuda, 0});
  }
  longspan::parallel::MpiOptions options;
  options.piece_bytes = 1 << 18;  // so that small tests have messages of several pieces
  job = longspan::parallel::Bootstrap::Start(options);
  if (!job->launched()) {
    std::fprintf(stderr, "%s: run me under launch/mpirun.sh\n", argv[0]);
    return 2;
  }
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  listeners.Append(new longspan::test::FailureListener);
  if (job->rank() != 0) delete listeners.Release(listeners.default_result_printer());
  GTEST_FLAG_SET(catch_exceptions, false);  // an exception ends the rank, and so the job
  const int status = RUN_ALL_TESTS();
  job->Finish();
  return status;
}
