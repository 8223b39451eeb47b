#include "ops/core/trace.h"

#include <algorithm>
#include <cstdio>

#include "ops/core/cuda/backend.h"
#include "ops/core/error.h"

namespace longspan {
namespace {

std::string Format(const char* format, auto... values) {
  char text[512];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

}  // namespace

void TraceRecorder::Add(const std::string& track, const char* name, double begin_us,
                        double end_us) {
  std::lock_guard lock(mutex_);
  const auto known = std::find(tracks_.begin(), tracks_.end(), track);
  const auto index = static_cast<size_t>(known - tracks_.begin());
  if (known == tracks_.end()) tracks_.push_back(track);
  spans_.push_back({index, name, begin_us, end_us});
}

std::string TraceRecorder::Events() const {
  std::lock_guard lock(mutex_);
  std::string text =
      Format(R"({"ph":"M","name":"process_name","pid":%d,"tid":0,"args":{"name":"rank %d"}})",
             process_, process_);
  for (size_t i = 0; i < tracks_.size(); ++i) {
    text += Format(R"(,%c{"ph":"M","name":"thread_name","pid":%d,"tid":%zu,"args":{"name":"%s"}})",
                   '\n', process_, i, tracks_[i].c_str());
  }
  for (const Span& span : spans_) {
    text += Format(R"(,%c{"ph":"X","name":"%s","pid":%d,"tid":%zu,"ts":%.3f,"dur":%.3f})", '\n',
                   span.name, process_, span.track, span.begin_us,
                   std::max(0.0, span.end_us - span.begin_us));
  }
  return text;
}

std::string ChromeTrace(const std::vector<std::string>& events) {
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  for (size_t i = 0; i < events.size(); ++i) text += (i == 0 ? "" : ",\n") + events[i];
  return text + "\n]}\n";
}

Trace::Trace() = default;
Trace::~Trace() = default;

void Trace::AttachDevice(std::shared_ptr<cuda::Runtime> runtime) { runtime_ = std::move(runtime); }

void Trace::Add(const char* category, double seconds) {
  std::lock_guard lock(mutex_);
  seconds_[category] += seconds;
}

std::map<std::string, double> Trace::Totals() {
  CollectFinished();
  std::lock_guard lock(mutex_);
  return seconds_;
}

void Trace::Reset() {
  CollectFinished();
  std::lock_guard lock(mutex_);
  seconds_.clear();
}

void Trace::Record(std::shared_ptr<TraceRecorder> recorder, const std::string& track) {
  if (runtime_ != nullptr) {
    WaitForDevice();
    device_origin_ = RecordedMark();
    device_origin_->Wait();
    if (recorder != nullptr) device_origin_us_ = recorder->Microseconds(Clock::now());
  }
  std::lock_guard lock(mutex_);
  recorder_ = std::move(recorder);
  track_ = track;
}

Trace::Start Trace::Begin(const char* category) {
  Start start;
  if (runtime_ != nullptr) {
    cuda::PushRange(category);
    if (time_device_) start.mark = RecordedMark();
  }
  start.time = Clock::now();
  return start;
}

// A device that fails says so where work is issued; a time that is missing is no reason to end.
void Trace::End(const char* category, Start start) noexcept try {
  const Clock::time_point now = Clock::now();
  if (runtime_ == nullptr) {
    Add(category, std::chrono::duration<double>(now - start.time).count());
  } else {
    cuda::PopRange();
    if (start.mark != nullptr) {
      device_spans_.push_back({category, std::move(start.mark), RecordedMark()});
      CollectFinished();
    }
  }
  std::lock_guard lock(mutex_);
  if (recorder_ != nullptr) {
    recorder_->Add(track_, category, recorder_->Microseconds(start.time),
                   recorder_->Microseconds(now));
  }
} catch (const std::exception&) {
}

std::shared_ptr<cuda::Mark> Trace::RecordedMark() {
  std::shared_ptr<cuda::Mark> mark;
  if (free_marks_.empty()) {
    mark = cuda::MakeMark(*runtime_);
  } else {
    mark = std::move(free_marks_.back());
    free_marks_.pop_back();
  }
  mark->Record();
  return mark;
}

void Trace::CollectOldest() {
  DeviceSpan span = std::move(device_spans_.front());
  device_spans_.pop_front();
  Add(span.category, span.end->MillisecondsSince(*span.begin) * 1e-3);
  if (recorder_ != nullptr && device_origin_ != nullptr) {
    const auto at = [&](const cuda::Mark& mark) {
      return device_origin_us_ + mark.MillisecondsSince(*device_origin_) * 1e3;
    };
    recorder_->Add("GPU", span.category, at(*span.begin), at(*span.end));
  }
  free_marks_.push_back(std::move(span.begin));
  free_marks_.push_back(std::move(span.end));
}

void Trace::CollectFinished() {
  while (!device_spans_.empty() && device_spans_.front().end->Done()) CollectOldest();
}

void Trace::WaitForDevice() {
  while (!device_spans_.empty()) {
    device_spans_.front().end->Wait();
    CollectOldest();
  }
}

}  // namespace longspan
