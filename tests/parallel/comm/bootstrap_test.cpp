#include "parallel/comm/bootstrap.h"

#include <gtest/gtest.h>
#include <mpi.h>
#include <unistd.h>

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

// The executable has the emulated GPU and NCCL.
TEST(BootstrapTest, RanksMeetWithoutMpi) {
  const std::string file = testing::TempDir() + Str("longspan-bootstrap-", getpid());
  setenv("LONGSPAN_RENDEZVOUS", file.c_str(), 1);
  setenv("LONGSPAN_RANK", "0", 1);
  setenv("LONGSPAN_WORLD_SIZE", "1", 1);
  EXPECT_THROW(parallel::Bootstrap::Start(), CommError) << "no job id";
  setenv("LONGSPAN_JOB_ID", "here", 1);
  for (int again = 0; again < 2; ++again) {  // the file of the first job is gone
    auto job = parallel::Bootstrap::Start();
    int initialized = 1;
    MPI_Initialized(&initialized);
    EXPECT_FALSE(initialized);
    EXPECT_TRUE(job->launched());
    EXPECT_EQ(job->world().name(), "nccl");
    EXPECT_EQ(job->local_rank(), 0);
    EXPECT_EQ(job->local_size(), 1);
    EXPECT_EQ(BroadcastString(job->world(), "text", 0), "text");
    EXPECT_NE(access(file.c_str(), F_OK), 0);
    job->Finish();
  }
  for (const char* name :
       {"LONGSPAN_RENDEZVOUS", "LONGSPAN_RANK", "LONGSPAN_WORLD_SIZE", "LONGSPAN_JOB_ID"}) {
    unsetenv(name);
  }
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
