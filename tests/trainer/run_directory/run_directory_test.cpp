#include "trainer/run_directory/run_directory.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <thread>

#include "tests/trainer/checkpoint/support.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::test {
namespace {

using namespace std::chrono_literals;
using trainer::RunDirectory;

// A process that claims the directory, says so through a pipe, and keeps it for `hold`.
pid_t StartHolder(const std::filesystem::path& path, std::chrono::milliseconds hold) {
  int ready[2];
  LONGSPAN_CHECK(::pipe(ready) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    RunDirectory run(path);
    run.Claim(0ms);
    LONGSPAN_CHECK(::write(ready[1], "x", 1) == 1);
    std::this_thread::sleep_for(hold);
    ::_exit(0);
  }
  char byte;
  LONGSPAN_CHECK(::read(ready[0], &byte, 1) == 1);
  ::close(ready[0]);
  ::close(ready[1]);
  return child;
}

TEST(RunDirectoryTest, ClaimMakesTheLayout) {
  TemporaryDirectory temporary;
  RunDirectory run(temporary.path() / "a" / "run");
  EXPECT_FALSE(std::filesystem::exists(run.path()));
  EXPECT_THROW(run.WriteConfig("x"), InvalidArgument);
  run.Claim();
  EXPECT_EQ(Names(run.path()), (std::set<std::string>{"checkpoints", "lock", "log", "plots"}));
  run.WriteConfig("run { seed: 1 }\n");
  run.WriteConfig("run { seed: 2 }\n");
  EXPECT_EQ(trainer::ReadFile(run.config_file()), "run { seed: 2 }\n");
  EXPECT_EQ(Names(run.path()),
            (std::set<std::string>{"checkpoints", "config.textproto", "lock", "log", "plots"}));
  run.Claim();  // a second time is fine
}

TEST(RunDirectoryTest, ASecondJobIsRefusedNamingTheHolder) {
  TemporaryDirectory temporary;
  const auto path = temporary.path() / "run";
  const pid_t holder = StartHolder(path, 60s);
  RunDirectory second(path);
  const auto start = std::chrono::steady_clock::now();
  const std::string error = ErrorOf<CheckpointError>([&] { second.Claim(300ms); });
  EXPECT_GE(std::chrono::steady_clock::now() - start, 300ms);
  EXPECT_NE(error.find(Str("process ", holder, " on host ", trainer::HostName())),
            std::string::npos)
      << error;
  EXPECT_NE(error.find(path.string()), std::string::npos) << error;
  EXPECT_FALSE(second.claimed());
  // A killed holder leaves the file but not the lock.
  ::kill(holder, SIGKILL);
  ::waitpid(holder, nullptr, 0);
  second.Claim(0ms);
  EXPECT_TRUE(second.claimed());
  EXPECT_EQ(trainer::ReadFile(second.lock_file()),
            Str("process ", ::getpid(), " on host ", trainer::HostName(), "\n"));
}

TEST(RunDirectoryTest, ClaimWaitsForAJobThatIsEnding) {
  TemporaryDirectory temporary;
  const auto path = temporary.path() / "run";
  const pid_t holder = StartHolder(path, 300ms);
  RunDirectory second(path);
  second.Claim(20s);
  EXPECT_TRUE(second.claimed());
  ::waitpid(holder, nullptr, 0);
}

TEST(RunDirectoryTest, TheLockGoesWithTheObject) {
  TemporaryDirectory temporary;
  { RunDirectory(temporary.path()).Claim(0ms); }
  RunDirectory second(temporary.path());
  second.Claim(0ms);
  RunDirectory third(temporary.path());
  EXPECT_THROW(third.Claim(0ms), CheckpointError) << "also within one process";
}

TEST(RunDirectoryTest, PathsThatCannotBeMadeOrWrittenAreNamed) {
  TemporaryDirectory temporary;
  std::ofstream(temporary.path() / "file") << "in the way";
  const auto path = temporary.path() / "file" / "run";
  const std::string error = ErrorOf<CheckpointError>([&] { RunDirectory(path).Claim(); });
  EXPECT_NE(error.find(path.string()), std::string::npos) << error;
  EXPECT_NE(error.find("Not a directory"), std::string::npos) << error;

  // Permissions do not bind root, so the child becomes somebody else.
  const auto closed = temporary.path() / "closed";
  std::filesystem::create_directory(closed);
  std::filesystem::permissions(temporary.path(), std::filesystem::perms(0755));
  std::filesystem::permissions(closed, std::filesystem::perms(0555));
  EXPECT_EQ(
      RunInChild([&] {
        LONGSPAN_CHECK(::geteuid() != 0 || ::setuid(65534) == 0);
        const std::string denied = ErrorOf<CheckpointError>([&] { RunDirectory(closed).Claim(); });
        LONGSPAN_CHECK(denied.find(closed.string() + " cannot be written: Permission denied") !=
                       std::string::npos)
            << denied;
        const std::string inside =
            ErrorOf<CheckpointError>([&] { RunDirectory(closed / "run").Claim(); });
        LONGSPAN_CHECK(inside.find("Permission denied") != std::string::npos) << inside;
      }),
      0);
}

TEST(FileIoTest, AFullDeviceIsReportedWithPathAndReason) {
  trainer::FileWriter file("/dev/full", trainer::FileWriter::Mode::kAppend);
  EXPECT_EQ(ErrorOf<CheckpointError>([&] { file.Write("x"); }),
            "cannot write /dev/full: No space left on device");
}

TEST(FileIoTest, CreateRefusesAnExistingFile) {
  TemporaryDirectory temporary;
  const auto path = temporary.path() / "f";
  trainer::WriteFileAtomically(path, "one");
  EXPECT_THROW(trainer::FileWriter(path, trainer::FileWriter::Mode::kCreate), CheckpointError);
  EXPECT_EQ(trainer::ReadFile(path), "one");
  EXPECT_THROW(trainer::ReadFile(temporary.path() / "missing"), CheckpointError);
}

}  // namespace
}  // namespace longspan::test
