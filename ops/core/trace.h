#pragma once
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace longspan {

namespace cuda {
class Mark;
class Runtime;
}  // namespace cuda

// Spans of time of one process, for a file that chrome://tracing and Perfetto show. Several Traces
// write into one recorder, each on a track of its own. Thread-safe.
class TraceRecorder {
 public:
  using Clock = std::chrono::steady_clock;
  // `process` numbers the process in the file: its rank. Times count from `origin`, which the ranks
  // of one host can agree on.
  explicit TraceRecorder(int process, Clock::time_point origin = Clock::now())
      : process_(process), origin_(origin) {}

  double Microseconds(Clock::time_point time) const {
    return std::chrono::duration<double, std::micro>(time - origin_).count();
  }
  // `name` holds no quotes, backslashes or control characters.
  void Add(const std::string& track, const char* name, double begin_us, double end_us);
  // The spans so far as JSON objects, separated by commas; with names of process and tracks.
  std::string Events() const;

 private:
  struct Span {
    size_t track;
    const char* name;  // a literal
    double begin_us, end_us;
  };
  const int process_;
  const Clock::time_point origin_;
  mutable std::mutex mutex_;
  std::vector<std::string> tracks_;
  std::vector<Span> spans_;
};

// The file made of the Events() of all processes.
std::string ChromeTrace(const std::vector<std::string>& events);

// Adds up time by category ("attention", "gemm", "communication wait", ...), each the lifetimes of
// its TraceScopes. Nested categories both count. One per Context.
//
//   CPU  wall time of the thread
//   GPU  time on the device between the scope's first and last work on the compute stream, which
//        includes waiting there for other streams; only of scopes that begin while TimeDevice is
//        on, because each costs two events, and only once the device has passed them. What the
//        host spends on issuing work is not counted. Profilers see every scope as an NVTX range.
//
// Thread-safe on a CPU; with a GPU used by the Context's thread.
class Trace {
 public:
  using Clock = std::chrono::steady_clock;
  Trace();
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  // Measures on this GPU from now on.
  void AttachDevice(std::shared_ptr<cuda::Runtime> runtime);
  void TimeDevice(bool on) { time_device_ = on; }
  // Blocks until all scopes that have ended are in Totals and in the recorder.
  void WaitForDevice();

  void Add(const char* category, double seconds);
  std::map<std::string, double> Totals();
  void Reset();

  // Also writes every scope into `recorder`, on `track`, and its time on the GPU on "GPU"; nullptr
  // ends that. Waits for the GPU, to relate its clock to the host's.
  void Record(std::shared_ptr<TraceRecorder> recorder, const std::string& track);

 private:
  friend class TraceScope;
  struct Start {
    Clock::time_point time;
    std::shared_ptr<cuda::Mark> mark;  // null: not timed on a device
  };
  struct DeviceSpan {
    const char* category;
    std::shared_ptr<cuda::Mark> begin, end;
  };
  Start Begin(const char* category);
  void End(const char* category, Start start) noexcept;
  std::shared_ptr<cuda::Mark> RecordedMark();
  void CollectOldest();
  void CollectFinished();

  std::mutex mutex_;
  std::map<std::string, double> seconds_;

  std::shared_ptr<cuda::Runtime> runtime_;  // of a GPU
  bool time_device_ = false;
  std::vector<std::shared_ptr<cuda::Mark>> free_marks_;
  std::deque<DeviceSpan> device_spans_;  // ended on the host, in that order

  std::shared_ptr<TraceRecorder> recorder_;
  std::string track_;
  std::shared_ptr<cuda::Mark> device_origin_;
  double device_origin_us_ = 0;  // of the recorder
};

// Times its own lifetime into a category, which is a literal.
class TraceScope {
 public:
  TraceScope(Trace& trace, const char* category)
      : trace_(trace), category_(category), start_(trace.Begin(category)) {}
  ~TraceScope() { trace_.End(category_, std::move(start_)); }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  Trace& trace_;
  const char* category_;
  Trace::Start start_;
};

}  // namespace longspan
