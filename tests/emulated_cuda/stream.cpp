#include "tests/emulated_cuda/stream.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "tests/emulated_cuda/emulator.h"

namespace longspan::emulated {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

// What the streams share. Never destroyed: streams may end after static objects.
struct Shared {
  std::atomic<uint64_t> seed{FromEnvironment("LONGSPAN_EMULATED_SEED", 1)};
  std::atomic<int> lag_us{static_cast<int>(FromEnvironment("LONGSPAN_EMULATED_LAG_US", 0))};
  std::atomic<int> devices{static_cast<int>(FromEnvironment("LONGSPAN_EMULATED_DEVICES", 1))};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string failure;
  std::set<cudaStream_t> streams;
  std::map<int, cudaStream_t> default_streams;
};
Shared& TheShared() {
  static Shared& shared = *new Shared;
  return shared;
}

}  // namespace

void Mark::Reach() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  seconds = std::chrono::duration<double>(now).count();
  done.store(1);
  done.notify_all();
}

bool Failed() { return TheShared().failed.load(); }
int DeviceCount() { return TheShared().devices.load(); }
uint64_t Seed() { return TheShared().seed.load(); }
void SetSeed(uint64_t seed) { TheShared().seed = seed; }
void SetLag(int microseconds) { TheShared().lag_us = microseconds; }
void SetDeviceCount(int devices) { TheShared().devices = devices; }

std::string Failure() {
  Shared& s = TheShared();
  const std::lock_guard lock(s.mutex);
  return s.failure;
}

void FailDevice(const std::string& why) {
  Shared& s = TheShared();
  const std::lock_guard lock(s.mutex);
  if (s.failed) return;
  s.failure = why;
  s.failed = true;
  std::fprintf(stderr, "emulated CUDA device: %s\n", why.c_str());
}

cudaStream_t DefaultStream(int device) {
  Shared& s = TheShared();
  {
    const std::lock_guard lock(s.mutex);
    const auto it = s.default_streams.find(device);
    if (it != s.default_streams.end()) return it->second;
  }
  auto made = std::make_unique<CUstream_st>(device, cudaStreamDefault, 0);
  const std::lock_guard lock(s.mutex);
  auto& stream = s.default_streams[device];
  if (stream == nullptr) {
    stream = made.release();
  } else {  // another thread was faster; our stream has no work, but its end takes the lock
    static std::vector<std::unique_ptr<CUstream_st>>& spare =
        *new std::vector<std::unique_ptr<CUstream_st>>;
    spare.push_back(std::move(made));
  }
  return stream;
}

void WaitForStreams(int device) {
  Shared& s = TheShared();
  std::vector<std::shared_ptr<Mark>> marks;
  {
    const std::lock_guard lock(s.mutex);
    for (CUstream_st* stream : s.streams) {
      if (device < 0 || stream->device == device) marks.push_back(stream->AddMark());
    }
  }
  for (const auto& mark : marks) mark->Wait();
}

void EndFailure() {
  WaitForStreams(-1);
  Shared& s = TheShared();
  const std::lock_guard lock(s.mutex);
  s.failed = false;
  s.failure.clear();
}

}  // namespace longspan::emulated

namespace em = longspan::emulated;

CUstream_st::CUstream_st(int device_, unsigned flags_, int priority_)
    : device(device_), priority(priority_), flags(flags_), worker_([this] { Work(); }) {
  em::Shared& s = em::TheShared();
  const std::lock_guard lock(s.mutex);
  s.streams.insert(this);
}

CUstream_st::~CUstream_st() {
  {
    em::Shared& s = em::TheShared();
    const std::lock_guard lock(s.mutex);
    s.streams.erase(this);
  }
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  added_.notify_one();
  worker_.join();
}

void CUstream_st::Add(Item item) {
  {
    const std::lock_guard lock(mutex_);
    items_.push_back(std::move(item));
  }
  added_.notify_one();
}

std::shared_ptr<em::Mark> CUstream_st::AddMark() {
  auto mark = std::make_shared<em::Mark>();
  Add({nullptr, mark, nullptr, false, true});
  return mark;
}

bool CUstream_st::Idle() {
  const std::lock_guard lock(mutex_);
  return items_.empty() && !busy_;
}

void CUstream_st::Work() {
  // Device memory stays open for a while, as opening it is not free.
  constexpr auto kLinger = std::chrono::milliseconds(1);
  uint64_t random = reinterpret_cast<uintptr_t>(this) | 1;
  std::optional<em::DeviceAccess> access;
  const auto wakes = [this] { return !items_.empty() || ending_; };
  std::unique_lock lock(mutex_);
  for (;;) {
    busy_ = false;
    if (access && !added_.wait_for(lock, kLinger, wakes)) access.reset();
    if (!access) added_.wait(lock, wakes);
    if (items_.empty()) return;
    Item item = std::move(items_.front());
    items_.pop_front();
    busy_ = true;
    lock.unlock();
    if (const int lag = em::TheShared().lag_us.load(); lag > 0) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      std::this_thread::sleep_for(
          std::chrono::microseconds((random >> 33) % (2 * static_cast<uint64_t>(lag) + 1)));
    }
    if (item.awaited != nullptr) {
      if (item.awaited->done.load() == 0) access.reset();
      item.awaited->Wait();
    }
    if (item.work != nullptr && (item.always || !em::Failed())) {
      if (!access) access.emplace();
      item.work();
    }
    item.work = nullptr;  // what it holds is gone before anyone hears that it is done
    if (item.closes) access.reset();
    if (item.reached != nullptr) item.reached->Reach();
    lock.lock();
  }
}
