#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "configs/load.h"
#include "trainer/checkpoint/reader.h"

namespace longspan::launch {

struct InspectOptions {
  std::string target;
  std::string png;                // file for the patterns' picture; empty: none
  int64_t length = 0;             // tokens at which patterns are measured; 0: context_length
  std::vector<std::string> sets;  // only with a configuration
  bool verify = true;             // read all data and check it against its checksums
};

// The same facts twice: for programs and for people. `text` ends with a newline.
struct InspectReport {
  nlohmann::ordered_json json;
  std::string text;
};

// Errors: those of the reader of each kind (ConfigError, CheckpointError, DataError).
InspectReport InspectConfig(const InspectOptions& options);
InspectReport InspectCheckpoint(const InspectOptions& options);  // checkpoint or run directory
InspectReport InspectDataset(const InspectOptions& options);     // prefix of .bin and .idx

// Model size, batch, layers and patterns of a configuration; writes options.png when given. Part of
// the reports on configurations and checkpoints.
InspectReport DescribeConfig(const configs::LoadedConfig& loaded, const InspectOptions& options);

// The gates of attention branches that a checkpoint holds: a table, and the configuration that uses
// what they say (`config` is the checkpoint's own; null: it cannot be read, and only the table is
// given). Nothing for a checkpoint without gates.
void DescribeGates(const trainer::CheckpointReader& reader, const configs::LoadedConfig* config,
                   InspectReport& report);

// "  label          value\n", and a number with thousands separators ("1,234,567").
std::string ReportLine(const std::string& label, const std::string& value);
std::string Grouped(int64_t number);
std::string FormatBytes(int64_t bytes);  // "1,234,567 bytes (1.2 MB)"

}  // namespace longspan::launch
