#include "trainer/metrics/jsonl_sink.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "ops/core/error.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

using Json = nlohmann::ordered_json;  // keys stay in the order of the contract

// The step of a complete line, or -1 when the text is not a metrics object.
int64_t StepOf(const std::string& line) {
  const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return -1;
  const auto step = object.find("step");
  if (step == object.end() || !step->is_number_integer()) return -1;
  return step->get<int64_t>();
}

void CutBack(const std::filesystem::path& path, int64_t last_step) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return;  // nothing there yet; other problems show when it is opened for writing
  std::filesystem::path temporary = path;
  temporary += ".tmp";
  FileWriter out(temporary, FileWriter::Mode::kTruncate);
  std::string line;
  bool unchanged = true;
  for (int64_t number = 1; std::getline(in, line); ++number) {
    const bool complete = !in.eof();
    const int64_t step = complete ? StepOf(line) : -1;
    if (complete && step < 0 && last_step >= 0 && in.peek() != EOF) {
      std::filesystem::remove(temporary);
      throw CheckpointError(Str(path.string(), ":", number,
                                " is not a metrics line; repair the file or move it away"));
    }
    if (step < 0 || step > last_step) {
      unchanged = false;
      continue;
    }
    out.Write(line + "\n");
  }
  if (in.bad()) throw CheckpointError(Str("cannot read ", path.string()));
  if (unchanged) {
    std::filesystem::remove(temporary);
    return;
  }
  out.Sync();
  out.Close();
  Rename(temporary, path);
  SyncDirectory(path.has_parent_path() ? path.parent_path() : ".");
}

}  // namespace

JsonlSink::JsonlSink(const std::filesystem::path& path, int64_t last_step) {
  CutBack(path, last_step);
  file_ = std::make_unique<FileWriter>(path, FileWriter::Mode::kAppend);
}

JsonlSink::~JsonlSink() = default;

void JsonlSink::Write(const StepMetrics& metrics) {
  Json memory = Json::object();
  for (const auto& [category, bytes] : metrics.peak_device_memory) memory[category] = bytes;
  Json strategies = Json::object();
  for (const StrategyMetrics& s : metrics.strategies) {
    strategies[s.name] = {{"bytes", s.bytes},
                          {"exposed_ms", s.exposed_ms ? Json(*s.exposed_ms) : Json(nullptr)}};
  }
  Json object = {
      {"step", metrics.step},
      {"loss", metrics.loss},
      {"grad_norm", metrics.grad_norm},
      {"lr", metrics.lr},
      {"tokens", metrics.tokens},
      {"valid_tokens", metrics.valid_tokens},
      {"step_ms", metrics.step_ms},
      {"tokens_per_s", metrics.tokens_per_s},
      {"mfu", metrics.mfu ? Json(*metrics.mfu) : Json(nullptr)},
      {"work_max_over_mean", metrics.work_max_over_mean},
      {"comm_bytes", metrics.comm_bytes},
      {"control_bytes", metrics.control_bytes},
      {"strategies", strategies},
      {"plan_ms", metrics.plan_ms},
      {"context_work_max_over_mean", metrics.context_work_max_over_mean},
      {"peak_rss_bytes", metrics.peak_rss_bytes},
      {"peak_device_bytes", metrics.peak_device_bytes},
      {"peak_device_memory", memory},
  };
  if (metrics.objective != "next_token") object["objective"] = metrics.objective;
  if (metrics.mean_gate) object["mean_gate"] = *metrics.mean_gate;
  file_->Write(object.dump() + "\n");
}

void JsonlSink::Write(const EvalMetrics& metrics) {
  const Json object = {{"step", metrics.step}, {"eval", metrics.eval}, {"value", metrics.value}};
  file_->Write(object.dump() + "\n");
}

}  // namespace longspan::trainer
