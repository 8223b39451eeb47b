#include "trainer/loop.h"

#include <glog/logging.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <deque>
#include <iterator>
#include <map>
#include <numeric>
#include <utility>

#include "parallel/comm/bootstrap.h"
#include "parallel/context/routed.h"
#include "parallel/context/strategy.h"
#include "trainer/agreement.h"
#include "trainer/checkpoint/directory.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/metrics/event_writer.h"
#include "trainer/metrics/jsonl_sink.h"
#include "trainer/metrics/terminal_line.h"
#include "trainer/resume.h"
#include "trainer/run_directory/file_io.h"
#include "trainer/run_directory/run_directory.h"
#include "trainer/straggler.h"

namespace longspan::trainer {
namespace {

using Clock = std::chrono::steady_clock;
double Seconds(Clock::time_point since) {
  return std::chrono::duration<double>(Clock::now() - since).count();
}

// Files and terminal of rank 0; on other ranks everything is a no-op.
class Reporter {
 public:
  Reporter(const RunDirectory& directory, const RunSettings& settings, const TrainOptions& options,
           int64_t resumed_step)
      : log_every_(options.log_every_steps) {
    jsonl_ = std::make_unique<JsonlSink>(directory.metrics_file(), resumed_step);
    events_ = std::make_unique<EventWriter>(directory.path(), resumed_step);
    if (settings.quiet) return;
    // Under mpirun stdout is a terminal that mpirun made, whatever the person looks at.
    line_ = std::make_unique<TerminalLine>(
        stdout, options.steps, TerminalLine::Options{.terminal = parallel::StdoutIsTerminal()});
  }
  void Step(const StepMetrics& m) {
    jsonl_->Write(m);
    events_->Write(m);
    if (line_ != nullptr && (m.step % log_every_ == 0 || m.step == 1)) line_->Update(m);
  }
  void Evaluation(const EvalMetrics& m) {
    jsonl_->Write(m);
    events_->Write(m);
    Note(Str("step ", m.step, "  ", m.eval, " ", m.value));
  }
  void Note(const std::string& text) {
    if (line_ != nullptr) line_->Note(text);
  }

 private:
  int64_t log_every_;
  std::unique_ptr<JsonlSink> jsonl_;
  std::unique_ptr<EventWriter> events_;
  std::unique_ptr<TerminalLine> line_;
};

// What each rank notes beside the sums of a step; kDeviceBytes by category of memory.
// kStrategies: of every strategy of attention the bytes sent and the seconds waited.
struct CountedStrategy {
  parallel::Traffic traffic;
  const char* wait;  // category of the Trace: "wait of " and the name
};
CountedStrategy Counted(parallel::StrategyKind kind) {
  return {parallel::TrafficOf(kind), parallel::WaitCategory(kind)};
}
const CountedStrategy kCounted[] = {Counted(parallel::StrategyKind::kRing),
                                    Counted(parallel::StrategyKind::kDoubleRing),
                                    Counted(parallel::StrategyKind::kAllGather),
                                    Counted(parallel::StrategyKind::kUlysses),
                                    Counted(parallel::StrategyKind::kHybrid),
                                    Counted(parallel::StrategyKind::kExchange),
                                    {parallel::Traffic::kRouted, parallel::kRoutedWait}};
enum RankValue {
  kSentBytes,
  kControlBytes,
  kPeakRssBytes,
  kReportFailed,
  kOwnSeconds,
  kStrategies,
  kDeviceBytes = kStrategies + 2 * std::size(kCounted)
};
constexpr size_t kNotes = kDeviceBytes + kMemoryCategories;

// Of the times of a Trace, those in which a rank waited for others.
double WaitSeconds(const std::map<std::string, double>& totals) {
  double seconds = 0;
  for (const char* category :
       {"communication wait", "gradient reduction wait", "parameter gather wait"}) {
    const auto it = totals.find(category);
    if (it != totals.end()) seconds += it->second;
  }
  return seconds;
}

// The run of one rank: everything that RunTraining needs at hand.
class Run {
 public:
  Run(Context& ctx, parallel::DeviceMesh& mesh, parallel::CountingCommunicator& counted,
      const TrainOptions& options, const RunSettings& settings)
      : ctx_(ctx),
        world_(mesh.world()),
        counted_(counted),
        options_(options),
        settings_(settings),
        directory_(settings.run_directory),
        root_(world_.rank() == 0) {
    const std::string checkpoint = ClaimAndDecide();
    trainer_ = std::make_unique<Trainer>(ctx, mesh, options_);
    Restore(checkpoint);
    first_step_ = trainer_->step();
    CheckpointWriterOptions writer;
    writer.directory = directory_.checkpoints();
    writer.retention = {static_cast<int>(options_.keep_last), options_.keep_every};
    writer.write_bytes_per_second = settings_.checkpoint_bytes_per_second;
    writer_ = std::make_unique<CheckpointWriter>(writer, world_);
    OnRoot([&] {
      // First what may refuse the files that are there, then what replaces one.
      reporter_ = std::make_unique<Reporter>(directory_, settings_, options_, resumed_step_);
      directory_.WriteConfig(settings_.config_text);
      for (const std::string& note : notes_) reporter_->Note(note);
    });
    StartTrace();
  }

  RunSummary Loop();

 private:
  // Runs `body` on rank 0 only; an error there is raised on all ranks.
  void OnRoot(const std::function<void()>& body) {
    OnAllRanks(world_, [&] {
      if (root_) body();
    });
  }

  // In slices: the other ranks wait in a collective operation, which has a time limit of its own,
  // and a stop signal is to be heard meanwhile.
  void ClaimDirectory() {
    const double limit = 1e-3 * static_cast<double>(settings_.lock_wait.count());
    bool claimed = false;
    for (int slice = 0; !claimed; ++slice) {
      OnAllRanks(world_, [&] {
        if (slice > 0 && settings_.stop_requested && settings_.stop_requested()) {
          throw Error(
              Str("stopped while another job held the run directory ", directory_.path().string()));
        }
        if (root_) claimed = TryClaim(limit);
      });
      claimed = parallel::AllReduceValue(world_, claimed ? 1.0 : 0.0, parallel::ReduceOp::kMax) > 0;
    }
  }

  bool TryClaim(double limit) {
    constexpr double kSlice = 1;  // second
    const double left = std::max(0.0, limit - Seconds(start_));
    try {
      directory_.Claim(std::chrono::milliseconds(std::llround(1e3 * std::min(kSlice, left))));
      return true;
    } catch (const RunDirectoryInUse& e) {
      if (left > kSlice) return false;
      throw CheckpointError(Str(e.what(), " (waited ", limit, " s)"));
    }
  }

  // Locks the run directory and returns the checkpoint to resume from, "" for none.
  std::string ClaimAndDecide() {
    std::string checkpoint;
    ClaimDirectory();
    OnRoot([&] {
      CleanLeftovers(directory_.checkpoints());
      const auto decided = DecideResume(directory_, settings_.resume, &notes_);
      if (decided.has_value()) checkpoint = decided->string();
      if (!settings_.init_from.empty() && !checkpoint.empty() && settings_.resume != "auto") {
        throw ConfigError("--init-from starts a new run and --resume continues one: give only one");
      }
      if (!checkpoint.empty()) notes_.push_back("resuming from " + checkpoint);
    });
    return parallel::BroadcastString(world_, checkpoint, 0);
  }

  bool HasUntrainedGates() const {
    return std::any_of(options_.model.mixers.begin(), options_.model.mixers.end(),
                       [](const MixerOptions& mixer) { return mixer.seer.has_value(); });
  }

  void Restore(const std::string& checkpoint) {
    if (!checkpoint.empty()) {
      std::unique_ptr<CheckpointReader> reader;
      OnAllRanks(world_, [&] {
        reader = std::make_unique<CheckpointReader>(CheckpointReader::Open(checkpoint));
      });
      trainer_->Resume(*reader);
      resumed_step_ = trainer_->step();
      // An older checkpoint than the newest was chosen: later ones belong to an abandoned branch.
      OnRoot([&] {
        for (const auto& path : SetAsideNewerThan(directory_.checkpoints(), resumed_step_)) {
          notes_.push_back("set aside as " + path.string());
        }
      });
    } else if (settings_.init_from.empty() && options_.model.gates_only) {
      throw ConfigError(Str("objective.", options_.objective.name(),
                            " trains the gates of a finished model and leaves all other weights as "
                            "they are: give that model with --init-from"));
    } else if (settings_.init_from.empty() && HasUntrainedGates()) {
      throw ConfigError(
          "the gates of softmax.seer choose what is seen and this objective does not train them: "
          "give a model whose gates objective.seer_gates has taught with --init-from");
    } else if (!settings_.init_from.empty()) {
      const auto source = AgreeOnCheckpoint(world_, settings_.init_from);
      std::unique_ptr<CheckpointReader> reader;
      OnAllRanks(world_, [&] {
        reader = std::make_unique<CheckpointReader>(CheckpointReader::Open(source));
      });
      const std::string note = trainer_->InitFrom(*reader);
      if (root_) notes_.push_back(note);
    }
  }

  // Lets rank 0 write to its files. A failure there is known to the others one step later, so that
  // all ranks stop together.
  void Tell(const std::function<void(Reporter&)>& body) {
    if (!root_ || !report_error_.empty()) return;
    try {
      body(*reporter_);
    } catch (const Error& e) {
      report_error_ = e.what();
    }
  }
  [[noreturn]] void RaiseReportError() { EndWith(parallel::FirstError(world_, report_error_)); }

  // Ends the run for a reason that all ranks know. A save under way is completed first: what it
  // holds is from before the failure and may be an hour's work.
  [[noreturn]] void EndWith(std::string error) {
    try {
      writer_->Wait();
    } catch (const CheckpointError& e) {
      error += Str("; ", e.what());
    }
    throw Error(error);
  }

  void Report(const StepResult& r);
  void Evaluate();
  void Save() {
    writer_->Save(trainer_->Info(settings_.config_text), trainer_->State());
    saved_step_ = trainer_->step();
  }
  // The state as it is, committed when this returns.
  void SaveNow() {
    if (saved_step_ != trainer_->step() && resumed_step_ != trainer_->step()) Save();
    writer_->Wait();
  }
  PendingStep BeginStep() {
    step_begin_ = Clock::now();
    return trainer_->BeginStep([this] { return Note(); });
  }
  // Results of the steps begun, oldest first, until `left` remain.
  void FinishSteps(size_t left);
  RankNote Note();
  double OwnSeconds();
  void FillContext(const StepResult& r, StepMetrics& m) const;
  void NoteDeviceSeconds(const StepResult& r);
  void FindStragglers(const StepResult& r);
  StopWish Wish() const {
    if (settings_.stop_requested && settings_.stop_requested()) return StopWish::kSignal;
    return settings_.max_seconds > 0 && Seconds(start_) >= settings_.max_seconds ? StopWish::kTimeUp
                                                                                 : StopWish::kNone;
  }
  bool OnGpu() const { return ctx_.device().kind == DeviceKind::kCuda; }
  // Whether attention and waiting are measured in the step after `step` steps. A CPU always knows;
  // on a GPU it costs events, so only some steps do. The first one also loads kernels.
  bool IsTimed(int64_t step) const {
    constexpr int64_t kEvery = 16;
    const int64_t index = step - first_step_;
    const int64_t traced = settings_.trace_file.empty() ? 0 : settings_.trace_steps;
    return !OnGpu() || index < traced || index % kEvery == 1;
  }
  void StartTrace();
  void FinishTrace();
  void AddShares();
  // Around the issue of a step: evaluations and saves do not count.
  void BeginTracing() {
    if (OnGpu()) {
      ctx_.trace().TimeDevice(IsTimed(trainer_->step()));
    } else {
      ctx_.trace().Reset();
    }
  }
  void EndTracing() {
    if (OnGpu()) {
      ctx_.trace().TimeDevice(false);
    } else {
      for (const auto& [category, seconds] : ctx_.trace().Totals()) traced_[category] += seconds;
    }
  }
  bool Due(int64_t every) const {
    return every > 0 && (trainer_->step() % every == 0 || trainer_->step() == options_.steps);
  }

  const Clock::time_point start_ = Clock::now();
  Context& ctx_;
  parallel::Communicator& world_;
  parallel::CountingCommunicator& counted_;
  const TrainOptions& options_;
  const RunSettings& settings_;
  RunDirectory directory_;
  const bool root_;
  std::vector<std::string> notes_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<CheckpointWriter> writer_;
  std::unique_ptr<Reporter> reporter_;
  std::string report_error_;
  int64_t resumed_step_ = -1, saved_step_ = -1;
  parallel::CommCounts seen_counts_;  // before the step
  int64_t tokens_ = 0;
  int64_t first_step_ = 0;                // steps done when this process started
  std::map<std::string, double> traced_;  // seconds in timed steps by category
  double timed_seconds_ = 0;              // of those steps
  Clock::time_point step_begin_;          // of the step that is being issued
  double device_own_s_ = -1, device_waited_s_ = 0;
  StragglerWatch stragglers_;
  std::shared_ptr<TraceRecorder> tracing_;
  std::deque<PendingStep> pending_;
  bool stop_ = false, time_is_up_ = false;
  RunSummary summary_;
};

// How long this rank has computed in the step that is being issued, which a CPU has done by now;
// of a GPU the last timed step that has ended. Negative: not known.
double Run::OwnSeconds() {
  if (OnGpu()) return std::exchange(device_own_s_, -1.0);
  const auto totals = ctx_.trace().Totals();
  const auto polling = totals.find(kProgressTime);
  return Seconds(step_begin_) - WaitSeconds(totals) -
         (polling == totals.end() ? 0.0 : polling->second);
}

void Run::NoteDeviceSeconds(const StepResult& r) {
  // Where the next step is timed as well, the totals may hold some of it.
  if (!OnGpu() || !IsTimed(r.step - 1)) return;
  const double waited = WaitSeconds(ctx_.trace().Totals());
  if (!IsTimed(r.step)) device_own_s_ = std::max(0.0, r.seconds - (waited - device_waited_s_));
  device_waited_s_ = waited;
}

// Every rank finds the same ones, in the same step.
void Run::FindStragglers(const StepResult& r) {
  std::vector<double> own;
  for (size_t rank = 0; rank < r.notes.size(); rank += kNotes) {
    own.push_back(r.notes[rank + kOwnSeconds]);
  }
  for (const Straggler& s : stragglers_.Step(own)) {
    const std::string host = parallel::BroadcastString(world_, HostName(), s.rank);
    if (!root_) continue;
    LOG(WARNING) << "step " << r.step << ": rank " << s.rank << " on host " << host
                 << " is slow: it computes " << s.own_s << " s in a step, the other ranks "
                 << s.others_s << " s (median), and they wait for it";
  }
}

RankNote Run::Note() {
  std::vector<double> values(kNotes);
  const parallel::CommCounts counts = counted_.counts();
  // What the update of this step will send is known already.
  values[kSentBytes] = static_cast<double>(counts.Total().bytes - seen_counts_.Total().bytes +
                                           trainer_->parameters().PublishedBytes());
  values[kPeakRssBytes] = static_cast<double>(PeakRssBytes());
  values[kReportFailed] = report_error_.empty() ? 0 : 1;
  values[kControlBytes] = static_cast<double>(counts.control.bytes - seen_counts_.control.bytes);
  values[kOwnSeconds] = OwnSeconds();
  const std::map<std::string, double> totals = ctx_.trace().Totals();
  for (size_t i = 0; i < std::size(kCounted); ++i) {
    const auto waited = totals.find(kCounted[i].wait);
    const auto traffic = static_cast<size_t>(kCounted[i].traffic);
    values[kStrategies + 2 * i] =
        static_cast<double>(counts.bytes_of[traffic] - seen_counts_.bytes_of[traffic]);
    values[kStrategies + 2 * i + 1] = waited == totals.end() ? 0 : waited->second;
  }
  const BytesByCategory peak = ctx_.allocator().peak_by_category();
  for (size_t c = 0; c < peak.size(); ++c) values[kDeviceBytes + c] = static_cast<double>(peak[c]);
  return {Wish(), std::move(values)};
}

void Run::FillContext(const StepResult& r, StepMetrics& m) const {
  m.plan_ms = r.plan_ms;
  m.context_work_max_over_mean = r.context_work_max_over_mean;
  for (size_t i = 0; i < std::size(kCounted); ++i) {
    StrategyMetrics use{kCounted[i].wait + sizeof("wait of"), 0, {}};
    double waited_s = 0;
    for (size_t rank = 0; rank < r.notes.size(); rank += kNotes) {
      use.bytes += std::llround(r.notes[rank + kStrategies + 2 * i]);
      waited_s = std::max(waited_s, r.notes[rank + kStrategies + 2 * i + 1]);
    }
    if (!OnGpu()) use.exposed_ms = 1e3 * waited_s;
    if (use.bytes > 0) m.strategies.push_back(std::move(use));
  }
}

void Run::Report(const StepResult& r) {
  StepMetrics m;
  m.step = r.step;
  m.loss = r.loss;
  m.objective = options_.objective.name();
  m.mean_gate = r.mean_gate;
  m.grad_norm = r.grad_norm;
  m.lr = r.lr;
  m.tokens = r.tokens;
  m.valid_tokens = r.valid_tokens;
  m.step_ms = r.seconds * 1e3;
  m.tokens_per_s = static_cast<double>(r.tokens) / r.seconds;
  m.work_max_over_mean = r.work_max_over_mean;
  if (settings_.peak_flops > 0) m.mfu = r.flops / r.seconds / settings_.peak_flops;
  for (size_t rank = 0; rank < r.notes.size(); rank += kNotes) {
    m.comm_bytes += std::llround(r.notes[rank + kSentBytes]);
    m.control_bytes += std::llround(r.notes[rank + kControlBytes]);
    m.peak_rss_bytes =
        std::max(m.peak_rss_bytes, static_cast<int64_t>(r.notes[rank + kPeakRssBytes]));
    if (r.notes[rank + kReportFailed] != 0) RaiseReportError();
    const double* peak = &r.notes[rank + kDeviceBytes];
    const auto bytes = std::llround(std::accumulate(peak, peak + kMemoryCategories, 0.0));
    if (bytes <= m.peak_device_bytes) continue;
    m.peak_device_bytes = bytes;
    m.peak_device_memory.clear();
    for (size_t c = 0; c < kMemoryCategories; ++c) {
      m.peak_device_memory.emplace_back(ToString(static_cast<MemoryCategory>(c)),
                                        std::llround(peak[c]));
    }
  }
  FillContext(r, m);
  NoteDeviceSeconds(r);
  FindStragglers(r);
  if (IsTimed(r.step - 1)) timed_seconds_ += r.seconds;
  summary_.seconds += r.seconds;
  tokens_ += r.tokens;
  summary_.last_loss = r.loss;
  Tell([&](Reporter& reporter) {
    reporter.Step(m);
    if (r.skipped) reporter.Note(Str("step ", m.step, " skipped: not finite"));
  });
}

void Run::FinishSteps(size_t left) {
  while (pending_.size() > left) {
    PendingStep oldest = std::move(pending_.front());
    pending_.pop_front();
    StepResult r;
    try {
      r = trainer_->FinishStep(std::move(oldest));
    } catch (const StepFailure& e) {
      EndWith(e.what());
    }
    Report(r);
    stop_ = stop_ || r.stop_requested;
    time_is_up_ = time_is_up_ || r.time_is_up;
  }
}

void Run::Evaluate() {
  const EvaluationLoss e = trainer_->Evaluate();
  summary_.validation_loss = e.loss;
  Tell([&](Reporter& reporter) {
    reporter.Evaluation({trainer_->step(), "validation_loss", e.loss});
  });
}

void Run::StartTrace() {
  if (settings_.trace_file.empty()) return;
  OnRoot([&] {  // a file that cannot be written is known before hours of training
    FileWriter(settings_.trace_file, FileWriter::Mode::kTruncate).Close();
  });
  world_.Barrier();  // times of all ranks of a host begin at one moment
  tracing_ = std::make_shared<TraceRecorder>(world_.rank());
  ctx_.trace().Record(tracing_, "compute");
  trainer_->Record(tracing_);
}

void Run::FinishTrace() {
  if (tracing_ == nullptr) return;
  ctx_.trace().WaitForDevice();
  ctx_.trace().Record(nullptr, "");
  trainer_->Record(nullptr);
  const std::vector<std::string> events = GatherStrings(world_, tracing_->Events());
  tracing_.reset();
  Tell([&](Reporter& reporter) {
    try {
      FileWriter file(settings_.trace_file, FileWriter::Mode::kTruncate);
      file.Write(ChromeTrace(events));
      file.Close();
      reporter.Note(Str("trace of the first steps in ", settings_.trace_file.string()));
    } catch (const CheckpointError& e) {  // no reason to end a run
      reporter.Note(Str("there is no trace: ", e.what()));
    }
  });
}

void Run::AddShares() {
  if (OnGpu()) {
    ctx_.trace().WaitForDevice();
    traced_ = ctx_.trace().Totals();
  }
  if (timed_seconds_ <= 0) return;
  const auto attention = traced_.find("attention");
  summary_.attention_share = attention == traced_.end() ? 0.0 : attention->second / timed_seconds_;
  summary_.wait_share = WaitSeconds(traced_) / timed_seconds_;
}

RunSummary Run::Loop() {
  // A GPU works on one step while the host issues the next and reports the last.
  const size_t ahead = OnGpu() ? 1 : 0;
  while (trainer_->step() < options_.steps && !stop_) {
    BeginTracing();
    seen_counts_ = counted_.counts();
    pending_.push_back(BeginStep());
    EndTracing();
    const bool pause = Due(options_.evaluation_every_steps) ||
                       Due(options_.checkpoint_every_steps) || trainer_->step() == options_.steps;
    FinishSteps(pause ? 0 : ahead);
    if (stop_) FinishSteps(0);
    if (trainer_->step() - first_step_ >= settings_.trace_steps) FinishTrace();
    writer_->Poll();
    if (time_is_up_) {  // little may be left: first what must not be lost
      SaveNow();
      if (options_.evaluation_every_steps > 0) Evaluate();
      break;
    }
    if (Due(options_.evaluation_every_steps)) Evaluate();
    if (Due(options_.checkpoint_every_steps)) Save();
  }
  FinishTrace();
  SaveNow();
  OnAllRanks(world_, [&] {
    if (!report_error_.empty()) throw Error(report_error_);
  });
  summary_.step = trainer_->step();
  summary_.stopped = trainer_->step() < options_.steps;
  summary_.skipped_steps = trainer_->skipped_steps();
  if (summary_.seconds > 0) {
    summary_.tokens_per_s = static_cast<double>(tokens_) / summary_.seconds;
    AddShares();
  }
  return summary_;
}

}  // namespace

RunSummary RunTraining(Context& ctx, parallel::DeviceMesh& mesh,
                       parallel::CountingCommunicator& counted, const TrainOptions& options,
                       const RunSettings& settings) {
  Run run(ctx, mesh, counted, options, settings);
  return run.Loop();
}

}  // namespace longspan::trainer
