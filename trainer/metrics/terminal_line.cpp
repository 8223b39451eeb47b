#include "trainer/metrics/terminal_line.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace longspan::trainer {
namespace {

constexpr size_t kAveragedSteps = 32;
constexpr int kDefaultColumns = 80;
constexpr const char* kEraseLine = "\r\x1b[K";

template <class... Args>
std::string Format(const char* format, Args... args) {
  char text[160];
  std::snprintf(text, sizeof text, format, args...);
  return text;
}

}  // namespace

std::string FormatDuration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0 || seconds > 1e12) return "?";
  const auto s = static_cast<long long>(std::llround(seconds));
  if (s < 60) return Format("%llds", s);
  if (s < 3600) return Format("%lldm%02llds", s / 60, s % 60);
  if (s < 86400) return Format("%lldh%02lldm", s / 3600, s % 3600 / 60);
  return Format("%lldd%02lldh", s / 86400, s % 86400 / 3600);
}

std::string FormatProgress(const StepMetrics& metrics, int64_t total_steps, double eta_seconds) {
  std::string line = Format("step %lld/%lld  ", static_cast<long long>(metrics.step),
                            static_cast<long long>(total_steps));
  if (metrics.objective == "next_token") {
    line += Format("loss %.4f", metrics.loss);
  } else {
    line += Format("%s loss %.4g", metrics.objective.c_str(), metrics.loss);
  }
  if (metrics.mean_gate) line += Format("  mean gate %.3f", *metrics.mean_gate);
  line += Format("  %.0f tok/s", metrics.tokens_per_s);
  if (metrics.mfu) line += Format("  mfu %.1f%%", 100 * *metrics.mfu);
  return line + "  eta " + FormatDuration(eta_seconds);
}

TerminalLine::TerminalLine(std::FILE* stream, int64_t total_steps)
    : TerminalLine(stream, total_steps, Options{::isatty(::fileno(stream)) == 1, 0}) {}

TerminalLine::TerminalLine(std::FILE* stream, int64_t total_steps, Options options)
    : stream_(stream), total_steps_(total_steps), options_(options) {}

TerminalLine::~TerminalLine() { Finish(); }

double TerminalLine::eta_seconds(int64_t step) const {
  if (recent_ms_.empty()) return NAN;
  const double sum = std::accumulate(recent_ms_.begin(), recent_ms_.end(), 0.0);
  const double mean_ms = sum / static_cast<double>(recent_ms_.size());
  return mean_ms / 1000 * static_cast<double>(std::max<int64_t>(total_steps_ - step, 0));
}

void TerminalLine::Update(const StepMetrics& metrics) {
  recent_ms_.push_back(metrics.step_ms);
  if (recent_ms_.size() > kAveragedSteps) recent_ms_.pop_front();
  Draw(FormatProgress(metrics, total_steps_, eta_seconds(metrics.step)));
}

void TerminalLine::Draw(const std::string& line) {
  if (options_.terminal) {
    // One column stays free: some terminals wrap when the last one is filled.
    shown_ = line.substr(0, static_cast<size_t>(std::max(Columns() - 1, 1)));
    std::fprintf(stream_, "%s%s", kEraseLine, shown_.c_str());
  } else {
    std::fprintf(stream_, "%s\n", line.c_str());
  }
  std::fflush(stream_);
}

void TerminalLine::Note(std::string_view text) {
  const std::string line(text);
  if (shown_.empty()) {
    std::fprintf(stream_, "%s\n", line.c_str());
  } else {
    std::fprintf(stream_, "%s%s\n%s", kEraseLine, line.c_str(), shown_.c_str());
  }
  std::fflush(stream_);
}

void TerminalLine::Finish() {
  if (shown_.empty()) return;
  shown_.clear();
  std::fprintf(stream_, "\n");
  std::fflush(stream_);
}

int TerminalLine::Columns() const {
  if (options_.columns > 0) return options_.columns;
  winsize size{};
  if (::ioctl(::fileno(stream_), TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return kDefaultColumns;
}

}  // namespace longspan::trainer
