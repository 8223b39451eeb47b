#pragma once
#include <cstdint>
#include <cstdio>
#include <deque>
#include <string>
#include <string_view>

#include "trainer/metrics/metrics.h"

namespace longspan::trainer {

// "step 120/400  loss 3.2105  12345 tok/s  mfu 41.2%  eta 3m20s"; "mfu" is left out when unknown.
std::string FormatProgress(const StepMetrics& metrics, int64_t total_steps, double eta_seconds);

// "47s", "3m20s", "2h05m", "3d04h"; "?" for values that are not finite or are negative.
std::string FormatDuration(double seconds);

// Shows progress to a person: one line that is rewritten in place on a terminal, one line a call
// elsewhere (logs, pipes). Not thread-safe.
class TerminalLine {
 public:
  // `columns` 0 asks the terminal at each update; a longer line is cut, because a wrapped one could
  // not be rewritten.
  struct Options {
    bool terminal = false;
    int columns = 0;
  };
  // Finds out whether `stream` is a terminal. The stream must outlive this object.
  TerminalLine(std::FILE* stream, int64_t total_steps);
  TerminalLine(std::FILE* stream, int64_t total_steps, Options options);
  ~TerminalLine();  // ends the line

  // The remaining time is that of the steps left at the mean of the last 32 updates' step_ms.
  void Update(const StepMetrics& metrics);
  // Prints a message of its own line above the progress line.
  void Note(std::string_view text);
  // Leaves the last progress line on the terminal.
  void Finish();

  double eta_seconds(int64_t step) const;

 private:
  void Draw(const std::string& line);
  int Columns() const;
  std::FILE* stream_;
  int64_t total_steps_;
  Options options_;
  std::deque<double> recent_ms_;
  std::string shown_;  // what the terminal's current line holds
};

}  // namespace longspan::trainer
