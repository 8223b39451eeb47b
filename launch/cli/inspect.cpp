#include "launch/cli/inspect.h"

#include <cstdio>
#include <filesystem>
#include <memory>

#include "launch/cli/commands.h"
#include "ops/core/error.h"

namespace longspan::launch {
namespace {

namespace fs = std::filesystem;

enum class TargetKind { kConfig, kCheckpoint, kDataset };

// A checkpoint, a run directory or a folder of checkpoints, usable or not: what is wrong with it is
// the checkpoint reader's to say.
bool LooksLikeCheckpoint(const fs::path& path) {
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) return false;
  if (fs::exists(path / "checkpoints", ignored) || fs::exists(path / "manifest.binpb", ignored)) {
    return true;
  }
  const auto is_step = [](const fs::path& p) {
    return p.filename().string().rfind("step_", 0) == 0;
  };
  if (is_step(fs::canonical(path, ignored))) return true;
  for (const auto& entry : fs::directory_iterator(path, ignored)) {
    if (is_step(entry.path())) return true;
  }
  return false;
}

TargetKind KindOf(const std::string& target) {
  std::error_code ignored;
  if (LooksLikeCheckpoint(target)) return TargetKind::kCheckpoint;
  if (fs::exists(target + ".bin", ignored) || fs::exists(target + ".idx", ignored)) {
    return TargetKind::kDataset;
  }
  if (fs::path(target).extension() == ".textproto") return TargetKind::kConfig;
  throw InvalidArgument(
      Str(target,
          " is none of the four things that can be inspected: a checkpoint directory, a run "
          "directory with checkpoints, a dataset prefix (P of P.bin and P.idx) or a configuration "
          "file (*.textproto)"));
}

// Options that would have no effect on this kind of target are refused, not ignored.
void RefuseUseless(TargetKind kind, const InspectOptions& o) {
  const auto refuse = [&](const char* option, const char* what) {
    throw InvalidArgument(
        Str(option, " has no meaning for ", o.target, ", which is ", what, "; leave it out"));
  };
  if (kind == TargetKind::kDataset) {
    if (!o.png.empty()) refuse("--png", "a dataset");
    if (o.length > 0) refuse("--length", "a dataset");
  }
  if (kind != TargetKind::kConfig && !o.sets.empty()) {
    refuse("--set", kind == TargetKind::kDataset ? "a dataset" : "a checkpoint");
  }
  if (kind == TargetKind::kConfig && !o.verify) refuse("--no-verify", "a configuration");
}

InspectReport Inspect(const InspectOptions& options) {
  const TargetKind kind = KindOf(options.target);
  RefuseUseless(kind, options);
  switch (kind) {
    case TargetKind::kConfig:
      return InspectConfig(options);
    case TargetKind::kCheckpoint:
      return InspectCheckpoint(options);
    case TargetKind::kDataset:
      break;
  }
  return InspectDataset(options);
}

}  // namespace

std::string ReportLine(const std::string& label, const std::string& value) {
  constexpr size_t kWidth = 16;
  const std::string padding(label.size() < kWidth ? kWidth - label.size() : 1, ' ');
  return "  " + label + padding + value + "\n";
}

std::string Grouped(int64_t number) {
  std::string digits = std::to_string(number);
  const size_t first = number < 0 ? 1 : 0;
  for (size_t i = digits.size(); i > first + 3;) {
    i -= 3;
    digits.insert(i, 1, ',');
  }
  return digits;
}

std::string FormatBytes(int64_t bytes) {
  const char* const units[] = {"kB", "MB", "GB", "TB"};
  std::string text = Grouped(bytes) + " bytes";
  if (bytes < 1000) return text;
  double value = static_cast<double>(bytes) / 1000;
  size_t unit = 0;
  for (; value >= 1000 && unit < 3; ++unit) value /= 1000;
  char rounded[32];
  std::snprintf(rounded, sizeof rounded, " (%.1f %s)", value, units[unit]);
  return text + rounded;
}

void AddInspectCommand(CLI::App& root, int* exit_code) {
  struct Arguments {
    InspectOptions options;
    bool json = false, no_verify = false;
  };
  auto a = std::make_shared<Arguments>();
  CLI::App* command = root.add_subcommand(
      "inspect", "Show what a checkpoint, a dataset or a configuration contains, and verify it");
  command
      ->add_option("target", a->options.target,
                   "Checkpoint directory, run directory (its newest checkpoint), dataset prefix "
                   "(P of P.bin and P.idx) or configuration file (*.textproto)")
      ->required();
  command->add_flag("--json", a->json, "Print one JSON object");
  command->add_option("--png", a->options.png,
                      "Write a picture of the attention patterns to this file: blue = all pairs "
                      "visible, orange = some, grey = none");
  command
      ->add_option("--length", a->options.length,
                   "Tokens of the row on which patterns are shown (default: run.context_length)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  command
      ->add_option("--set", a->options.sets,
                   "Override a field of the configuration: path.to.field=value, repeatable")
      ->allow_extra_args(false);
  command->add_flag("--no-verify", a->no_verify,
                    "Do not read the data of a checkpoint or dataset to check its checksums");
  command->callback([a, exit_code] {
    a->options.verify = !a->no_verify;
    const InspectReport report = Inspect(a->options);
    // Text from files may be cut inside a character.
    constexpr auto kReplace = nlohmann::ordered_json::error_handler_t::replace;
    const std::string out =
        a->json ? report.json.dump(2, ' ', false, kReplace) + "\n" : report.text;
    std::fwrite(out.data(), 1, out.size(), stdout);
    *exit_code = 0;
  });
}

}  // namespace longspan::launch
