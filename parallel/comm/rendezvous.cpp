#include "parallel/comm/rendezvous.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "ops/core/error.h"

namespace longspan::parallel {
namespace {

namespace fs = std::filesystem;

constexpr const char* kMagic = "longspan-rendezvous-1";

std::optional<std::string> FirstOf(const Variables& variable,
                                   std::initializer_list<const char*> names,
                                   const char** found = nullptr) {
  for (const char* name : names) {
    auto value = variable(name);
    if (!value || value->empty()) continue;
    if (found != nullptr) *found = name;
    return value;
  }
  return std::nullopt;
}

// The integer in the first of `names` that is set, in [low, high].
std::optional<int> IntegerOf(const Variables& variable, std::initializer_list<const char*> names,
                             int low, int high) {
  const char* name = nullptr;
  const auto text = FirstOf(variable, names, &name);
  if (!text) return std::nullopt;
  int value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size() || value < low || value > high) {
    throw CommError(Str(name, "=", *text, " is not an integer from ", low, " to ", high));
  }
  return value;
}

std::string JobIdOf(const Variables& variable) {
  std::string id;
  if (const auto own = FirstOf(variable, {"LONGSPAN_JOB_ID"})) {
    id = *own;
  } else if (const auto slurm = FirstOf(variable, {"SLURM_JOB_ID"})) {
    id = Str(*slurm, ".", FirstOf(variable, {"SLURM_STEP_ID"}).value_or("0"), ".",
             FirstOf(variable, {"SLURM_RESTART_COUNT"}).value_or("0"));
  } else {
    throw CommError(
        "LONGSPAN_RENDEZVOUS is set, but LONGSPAN_JOB_ID is not: give every job a value of its "
        "own, so that files of earlier jobs are not taken for this one's");
  }
  for (char c : id) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '-' && c != '_') {
      throw CommError(Str("job id \"", id, "\": use letters, digits, '.', '-' and '_'"));
    }
  }
  return id;
}

std::string Hex(const std::string& bytes) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (unsigned char c : bytes) {
    text += kDigits[c >> 4];
    text += kDigits[c & 15];
  }
  return text;
}

std::optional<std::string> FromHex(const std::string& text) {
  std::string bytes;
  if (text.size() % 2 != 0) return std::nullopt;
  for (size_t i = 0; i < text.size(); i += 2) {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data() + i, text.data() + i + 2, value, 16);
    if (error != std::errc() || end != text.data() + i + 2) return std::nullopt;
    bytes += static_cast<char>(value);
  }
  return bytes;
}

struct Meeting {
  std::string job_id;
  int size = 0;
  std::string id;
};

// None when there is no file, or one that is not a rendezvous.
std::optional<Meeting> ReadMeeting(const std::string& file) {
  std::ifstream in(file);
  std::string magic, hex, end;
  Meeting m;
  if (!(in >> magic >> m.job_id >> m.size >> hex >> end) || magic != kMagic || end != "end") {
    return std::nullopt;
  }
  auto id = FromHex(hex);
  if (!id) return std::nullopt;
  m.id = std::move(*id);
  return m;
}

void WriteWhole(const std::string& file, const std::string& text) {
  const std::string temporary = Str(file, ".", getpid(), ".tmp");
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) throw CommError(Str("cannot write ", temporary, ": ", std::strerror(errno)));
  const bool written =
      write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()) && fsync(fd) == 0;
  const int error = errno;
  close(fd);
  if (!written || rename(temporary.c_str(), file.c_str()) != 0) {
    const int reason = written ? errno : error;
    unlink(temporary.c_str());
    throw CommError(Str("cannot write ", file, ": ", std::strerror(reason)));
  }
}

std::string FailureFile(const Rendezvous& r) { return Str(r.file, ".", r.job_id, ".failed"); }

}  // namespace

std::optional<Rendezvous> RendezvousFrom(const Variables& variable) {
  const auto place = FirstOf(variable, {"LONGSPAN_RENDEZVOUS"});
  if (!place) return std::nullopt;
  constexpr int kMost = 1 << 20;
  Rendezvous r;
  const auto size = IntegerOf(variable, {"LONGSPAN_WORLD_SIZE", "SLURM_NTASKS"}, 1, kMost);
  if (!size) {
    throw CommError(
        "LONGSPAN_RENDEZVOUS is set, but neither LONGSPAN_WORLD_SIZE nor SLURM_NTASKS says how "
        "many ranks there are");
  }
  r.size = *size;
  const auto rank = IntegerOf(variable, {"LONGSPAN_RANK", "SLURM_PROCID"}, 0, r.size - 1);
  if (!rank) {
    throw CommError(
        "LONGSPAN_RENDEZVOUS is set, but neither LONGSPAN_RANK nor SLURM_PROCID says which rank "
        "this is");
  }
  r.rank = *rank;
  const auto local =
      IntegerOf(variable, {"LONGSPAN_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"}, 1, kMost);
  r.local_size = std::min(r.size, local.value_or(r.size));
  const auto local_rank =
      IntegerOf(variable, {"LONGSPAN_LOCAL_RANK", "SLURM_LOCALID"}, 0, r.size - 1);
  r.local_rank = local_rank.value_or(r.rank);
  r.least_local_size = std::max(local ? r.local_size : 1, local_rank ? *local_rank + 1 : 1);
  r.job_id = JobIdOf(variable);
  std::error_code ignored;
  r.file = fs::is_directory(*place, ignored) ? Str(*place, "/longspan-", r.job_id, ".rendezvous")
                                             : *place;
  return r;
}

void PublishId(const Rendezvous& r, const std::string& id) {
  const auto old = ReadMeeting(r.file);
  if (old && old->job_id == r.job_id) {
    throw CommError(Str("rendezvous file ", r.file, " of job ", r.job_id,
                        " is there already, and ranks may have read it: remove it, or give this "
                        "job another LONGSPAN_JOB_ID"));
  }
  unlink(FailureFile(r).c_str());
  WriteWhole(r.file, Str(kMagic, "\n", r.job_id, "\n", r.size, "\n", Hex(id), "\nend\n"));
}

std::string AwaitId(const Rendezvous& r, double timeout_s) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  for (;;) {
    const auto meeting = ReadMeeting(r.file);
    if (meeting && meeting->job_id == r.job_id) {
      if (meeting->size == r.size) return meeting->id;
      throw CommError(Str("rank ", r.rank, " was started as one of ", r.size,
                          " ranks, rank 0 of job ", r.job_id, " as one of ", meeting->size, " (",
                          r.file, ")"));
    }
    const std::chrono::duration<double> waited = Clock::now() - start;
    if (waited.count() > timeout_s) {
      throw CommError(
          Str("rank ", r.rank, " of ", r.size, " waited ", timeout_s, " s for rank 0 of job ",
              r.job_id, " at ", r.file, ": ",
              meeting ? Str("the file is of job ", meeting->job_id)
                      : std::string("there is no such file; do all ranks see the same folder?")));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

void Retire(const Rendezvous& r) noexcept {
  try {
    const auto meeting = ReadMeeting(r.file);
    if (meeting && meeting->job_id == r.job_id) unlink(r.file.c_str());
  } catch (const std::exception&) {
    // A file that stays is refused by its job id.
  }
}

void PublishFailure(const Rendezvous& r, const std::string& reason) noexcept {
  try {
    const std::string file = FailureFile(r);
    if (!fs::exists(file)) WriteWhole(file, Str("rank ", r.rank, ": ", reason, "\n"));
  } catch (const std::exception&) {
    // The others find out by their own deadline.
  }
}

std::optional<std::string> PublishedFailure(const Rendezvous& r) noexcept {
  try {
    std::ifstream in(FailureFile(r));
    std::string line;
    if (!std::getline(in, line) || line.empty()) return std::nullopt;
    return line;
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

}  // namespace longspan::parallel
