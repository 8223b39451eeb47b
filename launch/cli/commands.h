#pragma once
#include <CLI/CLI.hpp>

namespace longspan::launch {

// Each adds one subcommand to the `longspan` binary. Its callback stores the exit code; errors are
// thrown as longspan::Error and printed by main. (AddPrepareCommand: prepare.h.)
void AddBigramCommand(CLI::App& root, int* exit_code);
void AddTrainCommand(CLI::App& root, int* exit_code);
void AddEvalCommand(CLI::App& root, int* exit_code);
void AddInspectCommand(CLI::App& root, int* exit_code);
void AddBenchCommand(CLI::App& root, int* exit_code);

}  // namespace longspan::launch
