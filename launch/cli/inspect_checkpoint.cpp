#include <ctime>
#include <filesystem>
#include <map>
#include <optional>

#include "launch/cli/inspect.h"
#include "ops/core/error.h"
#include "trainer/checkpoint/directory.h"
#include "trainer/checkpoint/reader.h"

namespace longspan::launch {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kManifest = "manifest.binpb";

// "2024-05-01 12:00:00 UTC"
std::string TimeOf(const fs::path& file) {
  const auto time = fs::last_write_time(file);
  const auto system = std::chrono::file_clock::to_sys(time);
  const std::time_t seconds = std::chrono::system_clock::to_time_t(
      std::chrono::time_point_cast<std::chrono::system_clock::duration>(system));
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &utc);
  return text;
}

int64_t Elements(const trainer::TensorEntry& t) {
  int64_t n = 1;
  for (int64_t d : t.shape) n *= d;
  return n;
}
int64_t Bytes(const trainer::TensorEntry& t) {
  return Elements(t) * static_cast<int64_t>(SizeOf(t.dtype));
}

// "weights" of "weights/model.norm.weight": what the tensors are for.
std::string GroupOf(const std::string& name) {
  const size_t slash = name.find('/');
  return slash == std::string::npos ? "other" : name.substr(0, slash);
}

void DescribeTensors(const std::vector<trainer::TensorEntry>& tensors, InspectReport& report) {
  struct Total {
    int64_t tensors = 0, elements = 0, bytes = 0;
  };
  std::map<std::string, Total> groups;
  Json list = Json::array();
  size_t width = 0;
  for (const auto& t : tensors) width = std::max(width, t.name.size());
  std::string lines;
  for (const auto& t : tensors) {
    Total& total = groups[GroupOf(t.name)];
    ++total.tensors;
    total.elements += Elements(t);
    total.bytes += Bytes(t);
    list.push_back(
        {{"name", t.name}, {"dtype", ToString(t.dtype)}, {"shape", t.shape}, {"bytes", Bytes(t)}});
    lines += "  " + t.name + std::string(width + 2 - t.name.size(), ' ') + t.Describe() + "\n";
  }
  Json totals;
  report.text += "\ntensors\n" + lines + "\ntotals\n";
  for (const auto& [name, total] : groups) {
    totals[name] = {
        {"tensors", total.tensors}, {"elements", total.elements}, {"bytes", total.bytes}};
    report.text += ReportLine(name, Str(total.tensors, " tensors, ", Grouped(total.elements),
                                        " values, ", FormatBytes(total.bytes)));
  }
  report.json["tensors"] = std::move(list);
  report.json["totals"] = std::move(totals);
}

void DescribeFiles(const fs::path& path, InspectReport& report) {
  std::map<std::string, int64_t> files;
  for (const auto& entry : fs::directory_iterator(path)) {
    if (entry.is_regular_file()) {
      files[entry.path().filename().string()] = static_cast<int64_t>(entry.file_size());
    }
  }
  Json list = Json::array();
  int64_t sum = 0;
  report.text += "\nfiles\n";
  for (const auto& [name, bytes] : files) {
    sum += bytes;
    list.push_back({{"name", name}, {"bytes", bytes}});
    report.text += ReportLine(name, FormatBytes(bytes));
  }
  report.json["files"] = std::move(list);
  report.json["file_bytes"] = sum;
}

void DescribeInfo(const trainer::CheckpointReader& reader, InspectReport& report) {
  const trainer::CheckpointInfo& info = reader.info();
  Json& json = report.json;
  json = {{"kind", "checkpoint"},
          {"path", reader.path().string()},
          {"step", info.step},
          {"written", TimeOf(reader.path() / kManifest)},
          {"dp", info.dp},
          {"cp", info.cp},
          {"seed", info.seed},
          {"samples_consumed", info.samples_consumed},
          {"corpus_fingerprint", info.corpus_fingerprint},
          {"identity", Json(info.identity)}};
  std::string& text = report.text;
  text += Str("checkpoint ", reader.path().string(), "\n");
  text += ReportLine("step", Grouped(info.step));
  text += ReportLine("written", Str(json["written"].get<std::string>(), " by ", info.dp * info.cp,
                                    info.dp * info.cp == 1 ? " rank" : " ranks", " (dp ", info.dp,
                                    " x cp ", info.cp, ")"));
  text += ReportLine("data position", Grouped(info.samples_consumed) + " rows");
  text += ReportLine("corpus", info.corpus_fingerprint.empty() ? "none" : info.corpus_fingerprint);
  text += ReportLine("seed", std::to_string(info.seed));
  Json extra = Json::object();
  for (const auto& [name, bytes] : info.extra) extra[name] = {{"bytes", bytes.size()}};
  json["extra"] = std::move(extra);
}

void DescribeIdentity(const trainer::CheckpointInfo& info, InspectReport& report) {
  if (info.identity.empty()) return;
  size_t width = 0;
  for (const auto& [field, value] : info.identity) width = std::max(width, field.size());
  report.text += "\nfields that must stay as they are when it is resumed\n";
  for (const auto& [field, value] : info.identity) {
    report.text += "  " + field + std::string(width + 2 - field.size(), ' ') + value + "\n";
  }
}

// The configuration in the checkpoint. One that this binary cannot read is reported and leaves the
// rest of the report intact.
void DescribeSavedConfig(const trainer::CheckpointReader& reader, const InspectOptions& options,
                         InspectReport& report) {
  const std::string name = reader.path().string() + " (configuration)";
  std::optional<configs::LoadedConfig> loaded;
  try {
    loaded = configs::LoadText(reader.info().config_text, name);
  } catch (const ConfigError& error) {
    if (!options.png.empty() || options.length > 0) throw;  // asked for what only it can tell
    DescribeGates(reader, nullptr, report);
    report.json["config"] = nullptr;
    report.json["config_problem"] = error.what();
    report.text += Str("\nits configuration cannot be read by this binary: ", error.what(), "\n");
    return;
  }
  DescribeGates(reader, &*loaded, report);
  const InspectReport config = DescribeConfig(*loaded, options);
  report.json["config"] = config.json;
  report.json["config"]["resolved"] = loaded->resolved_text();
  report.text += "\nconfiguration\n" + config.text;
}

}  // namespace

InspectReport InspectCheckpoint(const InspectOptions& options) {
  const auto reader = trainer::CheckpointReader::Open(trainer::ResolveCheckpoint(options.target));
  if (options.verify) reader.Verify();
  InspectReport report;
  DescribeInfo(reader, report);
  DescribeTensors(reader.tensors(), report);
  DescribeFiles(reader.path(), report);
  DescribeIdentity(reader.info(), report);
  DescribeSavedConfig(reader, options, report);
  const int64_t bytes =
      reader.file_bytes() + static_cast<int64_t>(fs::file_size(reader.path() / kManifest));
  report.json["verified_bytes"] = options.verify ? Json(bytes) : Json();
  report.text += options.verify ? Str("\nverified ", bytes, " bytes: every checksum is right\n")
                                : "\nnot verified (--no-verify)\n";
  return report;
}

}  // namespace longspan::launch
