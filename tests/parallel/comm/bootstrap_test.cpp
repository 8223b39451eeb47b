#include "parallel/comm/bootstrap.h"

#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdlib>

#include "ops/core/parallel_for.h"

namespace longspan::test {
namespace {

TEST(BootstrapTest, APlainRunIsOneRankWithoutMpi) {
  unsetenv("OMP_NUM_THREADS");
  auto job = parallel::Bootstrap::Start();
  int initialized = 1;
  MPI_Initialized(&initialized);
  EXPECT_FALSE(initialized);
  EXPECT_FALSE(job->launched());
  EXPECT_EQ(job->world().name(), "self");
  EXPECT_EQ(job->rank(), 0);
  EXPECT_EQ(job->size(), 1);
  EXPECT_EQ(job->local_rank(), 0);
  EXPECT_EQ(job->local_size(), 1);
  EXPECT_EQ(job->threads(), AvailableCores());
  job->Finish();
  int finalized = 1;
  MPI_Finalized(&finalized);
  EXPECT_FALSE(finalized);
}

TEST(BootstrapTest, ThreadsFollowOmpNumThreads) {
  setenv("OMP_NUM_THREADS", "7", 1);
  EXPECT_EQ(parallel::Bootstrap::Start()->threads(), 7);
  setenv("OMP_NUM_THREADS", "many", 1);
  EXPECT_EQ(parallel::Bootstrap::Start()->threads(), AvailableCores());
  unsetenv("OMP_NUM_THREADS");
}

TEST(BootstrapTest, EnvironmentReadsVariables) {
  setenv("LONGSPAN_TEST_VARIABLE", "value", 1);
  EXPECT_EQ(parallel::Environment("LONGSPAN_TEST_VARIABLE"), "value");
  unsetenv("LONGSPAN_TEST_VARIABLE");
  EXPECT_EQ(parallel::Environment("LONGSPAN_TEST_VARIABLE"), std::nullopt);
}

TEST(BootstrapTest, TheLauncherKnowsWhetherThereIsATerminal) {
  setenv("LONGSPAN_TERMINAL", "1", 1);
  EXPECT_TRUE(parallel::StdoutIsTerminal());
  setenv("LONGSPAN_TERMINAL", "0", 1);
  EXPECT_FALSE(parallel::StdoutIsTerminal());
  unsetenv("LONGSPAN_TERMINAL");
}

// A launcher of another MPI: its variables are there, but our library starts alone.
TEST(BootstrapDeathTest, AForeignLauncherIsNamed) {
  auto start = [] {
    setenv("PMI_RANK", "0", 1);
    setenv("PMI_SIZE", "4", 1);
    try {
      parallel::Bootstrap::Start();
    } catch (const CommError& e) {
      std::fprintf(stderr, "%s\n", e.what());
      std::_Exit(2);
    }
    std::_Exit(0);
  };
  EXPECT_EXIT(start(), testing::ExitedWithCode(2), "announced 4 ranks but the MPI library sees 1");
}

}  // namespace
}  // namespace longspan::test
