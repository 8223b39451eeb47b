#pragma once
#include <CLI/CLI.hpp>

namespace longspan::launch {

// Adds `longspan prepare INPUT... --out P`: text to datasets of tokens (data/prepare.h). Progress
// goes to standard error, the summary to standard output. Errors are thrown, also when a signal
// asks it to stop; nothing is left behind then.
void AddPrepareCommand(CLI::App& root, int* exit_code);

}  // namespace longspan::launch
