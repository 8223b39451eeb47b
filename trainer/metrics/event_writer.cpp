#include "trainer/metrics/event_writer.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>

#include "ops/core/error.h"
#include "trainer/metrics/crc32c.h"
#include "trainer/metrics/event.pb.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

double WallTime() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

metrics::Event NewEvent(int64_t step) {
  metrics::Event event;
  event.set_wall_time(WallTime());
  event.set_step(step);
  return event;
}

// A name that no file of the directory has.
std::filesystem::path NewEventFile(const std::filesystem::path& directory) {
  char seconds[24];
  std::snprintf(seconds, sizeof seconds, "%010lld", static_cast<long long>(WallTime()));
  for (int n = 0;; ++n) {
    auto path =
        directory / Str("events.out.tfevents.", seconds, ".", HostName(), ".", ::getpid(), ".", n);
    if (!std::filesystem::exists(path)) return path;
  }
}

template <class T>
void AppendRaw(std::string& out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

}  // namespace

EventWriter::EventWriter(const std::filesystem::path& directory, int64_t last_step)
    : file_(std::make_unique<FileWriter>(NewEventFile(directory), FileWriter::Mode::kCreate)) {
  metrics::Event version = NewEvent(0);
  version.set_file_version("brain.Event:2");
  version.mutable_source_metadata()->set_writer("longspan");
  WriteRecord(version.SerializeAsString());
  metrics::Event start = NewEvent(last_step + 1);
  start.mutable_session_log()->set_status(metrics::SessionLog::START);
  WriteRecord(start.SerializeAsString());
}

EventWriter::~EventWriter() = default;

const std::filesystem::path& EventWriter::path() const { return file_->path(); }

void EventWriter::Write(const StepMetrics& metrics) {
  std::vector<Scalar> scalars = {
      {"train/loss", metrics.loss},
      {"train/grad_norm", metrics.grad_norm},
      {"train/lr", metrics.lr},
      {"train/tokens_per_s", metrics.tokens_per_s},
      {"train/step_ms", metrics.step_ms},
      {"train/comm_bytes", static_cast<double>(metrics.comm_bytes)},
      {"train/peak_rss_bytes", static_cast<double>(metrics.peak_rss_bytes)},
  };
  if (metrics.mfu) scalars.push_back({"train/mfu", *metrics.mfu});
  if (metrics.mean_gate) scalars.push_back({"train/mean_gate", *metrics.mean_gate});
  WriteScalars(metrics.step, scalars);
}

void EventWriter::Write(const EvalMetrics& metrics) {
  WriteScalars(metrics.step, {{Str("eval/", metrics.eval), metrics.value}});
}

void EventWriter::WriteScalars(int64_t step, const std::vector<Scalar>& scalars) {
  metrics::Event event = NewEvent(step);
  for (const Scalar& scalar : scalars) {
    metrics::Summary::Value& value = *event.mutable_summary()->add_value();
    value.set_tag(scalar.tag);
    value.set_simple_value(static_cast<float>(scalar.value));
  }
  WriteRecord(event.SerializeAsString());
}

void EventWriter::WriteRecord(const std::string& event) {
  std::string record;
  AppendRaw(record, static_cast<uint64_t>(event.size()));
  AppendRaw(record, MaskedCrc32c(record));
  record += event;
  AppendRaw(record, MaskedCrc32c(event));
  file_->Write(record);
}

}  // namespace longspan::trainer
