#pragma once
#include <mpi.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace longspan::parallel::internal {

// Finds out who keeps a collective operation from its end, which MPI does not tell: a rank that has
// waited too long asks the others whether they have issued it, and ranks that wait for something
// answer each other. Nothing is sent as long as nobody asks.
//
// Communicators have names that are the same on all their ranks, and operations are numbered.
//
// Threads   any
class MpiInquiry {
 public:
  // Of a communicator's operations those below this number have been issued by this rank.
  using Issued = std::shared_ptr<std::atomic<int64_t>>;

  MpiInquiry();  // collective over the job
  // Collective unless `abandon` was called.
  ~MpiInquiry();
  MpiInquiry(const MpiInquiry&) = delete;
  MpiInquiry& operator=(const MpiInquiry&) = delete;

  static constexpr uint64_t kWorld = 0;
  // The name of the part with `color` that the communicator made as its operation `sequence`.
  static uint64_t NameOfPart(uint64_t name, int64_t sequence, int color);
  Issued Register(uint64_t name);

  // Answers the questions that have come; cheap, and does nothing while another thread is at it.
  void Answer() noexcept;

  // Of `ranks` (of the job), which includes this one: a clause that names those that have not
  // issued the operation, and those that do not say so within kPatienceS.
  std::string Ask(uint64_t name, int64_t sequence, const std::vector<int>& ranks);
  static constexpr double kPatienceS = 1;

  // The job is about to end with an error: the communicator is left to MPI.
  void Abandon() { abandoned_ = true; }

 private:
  using Text = std::array<int64_t, 3>;  // name, operation, in an answer: whether it was issued
  struct Sent {
    Text text;
    MPI_Request request = MPI_REQUEST_NULL;
  };
  void Post(int to, int tag, const Text& text);
  bool Take(int tag, int* from, Text* text);
  void AnswerLocked();

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  std::mutex mutex_;
  std::map<uint64_t, Issued> issued_;
  std::deque<std::unique_ptr<Sent>> sent_;  // not yet gone
  std::atomic<bool> abandoned_{false};
};

}  // namespace longspan::parallel::internal
