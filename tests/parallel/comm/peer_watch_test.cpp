// Processes that end are noticed at once, and named.
#include "parallel/comm/peer_watch.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "ops/core/error.h"

namespace longspan::test {
namespace {

using parallel::internal::PeerWatch;

// A process that does nothing until it is killed.
class Child {
 public:
  Child() : process_(fork()) {
    if (process_ == 0) {
      for (;;) pause();
    }
  }
  ~Child() { End(); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  pid_t process() const { return process_; }
  void End() {
    if (ended_) return;
    kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
    ended_ = true;
  }

 private:
  const pid_t process_;
  bool ended_ = false;
};

std::optional<std::string> FailureWithin(PeerWatch& watch, double seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) {
    if (auto failure = watch.Failure()) return failure;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return std::nullopt;
}

TEST(PeerWatchTest, APeerThatEndsIsNamed) {
  Child first, second;
  PeerWatch watch(1, {{0, first.process()}, {2, second.process()}}, /*exit_after_s=*/0);
  EXPECT_EQ(FailureWithin(watch, 0.1), std::nullopt);
  second.End();
  const std::string expected =
      Str("rank 2 (process ", second.process(), " on this host) has ended");
  EXPECT_EQ(FailureWithin(watch, 20), expected);
  first.End();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(watch.Failure(), expected) << "the first is the reason";
}

TEST(PeerWatchTest, APeerThatIsGoneAlreadyIsNamed) {
  Child child;
  child.End();
  PeerWatch watch(0, {{1, child.process()}}, /*exit_after_s=*/0);
  EXPECT_TRUE(FailureWithin(watch, 20).has_value());
}

TEST(PeerWatchTest, AfterStopPeersMayEnd) {
  Child child;
  PeerWatch watch(0, {{1, child.process()}}, /*exit_after_s=*/0);
  watch.Stop();
  watch.Stop();
  child.End();
  EXPECT_EQ(FailureWithin(watch, 0.05), std::nullopt);
  PeerWatch alone(0, {});
  EXPECT_EQ(alone.Failure(), std::nullopt);
}

// What a test of several processes would see on its standard error.
std::string LoggedBy(int rank, double exit_after_s, int* status) {
  int pipe_ends[2];
  EXPECT_EQ(pipe(pipe_ends), 0);
  Child peer;
  const pid_t process = fork();
  if (process == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    PeerWatch watch(rank, {{1, peer.process()}, {2, getppid()}}, exit_after_s);
    std::this_thread::sleep_for(std::chrono::seconds(exit_after_s > 0 ? 30 : 1));
    std::_Exit(0);
  }
  close(pipe_ends[1]);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  peer.End();
  std::string text;
  char buffer[512];
  for (ssize_t n = 0; (n = read(pipe_ends[0], buffer, sizeof buffer)) > 0;) {
    text.append(buffer, static_cast<size_t>(n));
  }
  close(pipe_ends[0]);
  waitpid(process, status, 0);
  return text;
}

TEST(PeerWatchTest, WhereNobodyAsksTheLowestSurvivorSpeaks) {
  int status = -1;
  EXPECT_NE(LoggedBy(0, 0, &status).find("rank 0: rank 1 (process "), std::string::npos);
  EXPECT_EQ(LoggedBy(3, 0, &status), "") << "rank 2 is there to speak";
}

TEST(PeerWatchTest, AProcessThatDoesNotEndByItselfIsEnded) {
  int status = -1;
  const std::string text = LoggedBy(0, 0.2, &status);
  EXPECT_NE(text.find("has not stopped by itself"), std::string::npos) << text;
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 3) << status;
}

}  // namespace
}  // namespace longspan::test
