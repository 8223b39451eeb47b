#include "parallel/comm/mpi_inquiry.h"

#include <chrono>
#include <set>
#include <thread>

#include "ops/core/error.h"
#include "parallel/comm/mpi_engine.h"

namespace longspan::parallel::internal {
namespace {

constexpr int kQuestion = 1, kAnswer = 2;  // tags
constexpr int kWords = 3;

std::string Listed(const std::set<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += Str(text.empty() ? "" : ", ", rank);
  return text;
}

}  // namespace

MpiInquiry::MpiInquiry() {
  CheckMpi(MPI_Comm_dup(MPI_COMM_WORLD, &comm_), "MPI_Comm_dup");
  CheckMpi(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  CheckMpi(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
}

MpiInquiry::~MpiInquiry() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (finalized || abandoned_) {
    for (auto& sent : sent_) (void)sent.release();  // MPI may still read them
    return;
  }
  MPI_Comm_free(&comm_);
}

uint64_t MpiInquiry::NameOfPart(uint64_t name, int64_t sequence, int color) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a over words
  for (const uint64_t word :
       {name, static_cast<uint64_t>(sequence), static_cast<uint64_t>(int64_t{color})}) {
    hash = (hash ^ word) * 0x100000001b3;
  }
  return hash == kWorld ? 1 : hash;
}

MpiInquiry::Issued MpiInquiry::Register(uint64_t name) {
  std::lock_guard lock(mutex_);
  return issued_[name] = std::make_shared<std::atomic<int64_t>>(0);
}

void MpiInquiry::Post(int to, int tag, const Text& text) {
  std::erase_if(sent_, [](const auto& sent) {
    int gone = 0;
    return MPI_Test(&sent->request, &gone, MPI_STATUS_IGNORE) != MPI_SUCCESS || gone != 0;
  });
  sent_.push_back(std::make_unique<Sent>(Sent{text}));
  CheckMpi(MPI_Isend(sent_.back()->text.data(), kWords, MPI_INT64_T, to, tag, comm_,
                     &sent_.back()->request),
           "MPI_Isend");
}

bool MpiInquiry::Take(int tag, int* from, Text* text) {
  int there = 0;
  MPI_Status status;
  CheckMpi(MPI_Iprobe(MPI_ANY_SOURCE, tag, comm_, &there, &status), "MPI_Iprobe");
  if (there == 0) return false;
  *from = status.MPI_SOURCE;
  CheckMpi(MPI_Recv(text->data(), kWords, MPI_INT64_T, *from, tag, comm_, MPI_STATUS_IGNORE),
           "MPI_Recv");
  return true;
}

void MpiInquiry::AnswerLocked() {
  int from = 0;
  Text text;
  while (Take(kQuestion, &from, &text)) {
    const auto it = issued_.find(static_cast<uint64_t>(text[0]));
    const int64_t issued = it == issued_.end() ? 0 : it->second->load();
    Post(from, kAnswer, {text[0], text[1], issued > text[1] ? 1 : 0});
  }
}

void MpiInquiry::Answer() noexcept {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  try {
    AnswerLocked();
  } catch (const CommError&) {
    // Whoever asks learns that this rank does not answer.
  }
}

std::string MpiInquiry::Ask(uint64_t name, int64_t sequence, const std::vector<int>& ranks) {
  using Clock = std::chrono::steady_clock;
  std::set<int> silent, missing;
  std::lock_guard lock(mutex_);
  for (const int rank : ranks) {
    if (rank == rank_) continue;
    silent.insert(rank);
    Post(rank, kQuestion, {static_cast<int64_t>(name), sequence, 0});
  }
  const auto deadline = Clock::now() + std::chrono::duration<double>(kPatienceS);
  while (!silent.empty() && Clock::now() < deadline) {
    AnswerLocked();  // ranks that wait for the same ask at the same time
    int from = 0;
    Text text;
    while (Take(kAnswer, &from, &text)) {
      if (static_cast<uint64_t>(text[0]) != name || text[1] != sequence) continue;  // an older one
      silent.erase(from);
      if (text[2] == 0) missing.insert(from);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  AnswerLocked();
  std::string text;
  if (!missing.empty()) text = Str("not issued by rank ", Listed(missing), " of the job");
  if (!silent.empty()) {
    text += Str(text.empty() ? "" : ", ", "no answer from rank ", Listed(silent), " of the job");
  }
  return text.empty() ? "all its ranks have issued it" : text;
}

}  // namespace longspan::parallel::internal
