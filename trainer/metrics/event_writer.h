#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "trainer/metrics/metrics.h"

namespace longspan::trainer {

class FileWriter;

// TensorBoard scalars in a new file `events.out.tfevents.<seconds>.<host>.<pid>.<n>` of
// `directory`; readers merge all files of a directory. Curves: train/loss, train/grad_norm,
// train/lr, train/tokens_per_s, train/step_ms, train/mfu, train/comm_bytes, train/peak_rss_bytes,
// and eval/<name>.
//
// Framing, little-endian: length u64, masked CRC-32C of these 8 bytes, Event, masked CRC-32C of the
// Event. Each event is handed to the system at once.
//
// Errors: CheckpointError naming the file and the system's reason.
class EventWriter {
 public:
  // `last_step` is the step a run resumes from, -1 for a fresh one: readers drop what earlier files
  // have after it.
  EventWriter(const std::filesystem::path& directory, int64_t last_step);
  ~EventWriter();

  void Write(const StepMetrics& metrics);
  void Write(const EvalMetrics& metrics);
  const std::filesystem::path& path() const;

 private:
  struct Scalar {
    std::string tag;
    double value;
  };
  void WriteScalars(int64_t step, const std::vector<Scalar>& scalars);
  void WriteRecord(const std::string& event);
  std::unique_ptr<FileWriter> file_;
};

}  // namespace longspan::trainer
