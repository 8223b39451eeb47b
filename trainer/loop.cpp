#include "trainer/loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>

#include "parallel/comm/bootstrap.h"
#include "trainer/agreement.h"
#include "trainer/checkpoint/directory.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/metrics/event_writer.h"
#include "trainer/metrics/jsonl_sink.h"
#include "trainer/metrics/terminal_line.h"
#include "trainer/resume.h"
#include "trainer/run_directory/run_directory.h"

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
    } else if (!settings_.init_from.empty()) {
      const auto source = AgreeOnCheckpoint(world_, settings_.init_from);
      std::unique_ptr<CheckpointReader> reader;
      OnAllRanks(world_, [&] {
        reader = std::make_unique<CheckpointReader>(CheckpointReader::Open(source));
      });
      trainer_->InitFrom(*reader);
      if (root_) notes_.push_back("weights from " + reader->path().string());
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

  void Report(const StepResult& r, double seconds);
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
  StepResult Step() {
    try {
      return trainer_->Step([this] { return Wish(); });
    } catch (const StepFailure& e) {
      EndWith(e.what());
    }
  }
  StopWish Wish() const {
    if (settings_.stop_requested && settings_.stop_requested()) return StopWish::kSignal;
    return settings_.max_seconds > 0 && Seconds(start_) >= settings_.max_seconds ? StopWish::kTimeUp
                                                                                 : StopWish::kNone;
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
  int64_t seen_bytes_ = 0, tokens_ = 0;
  std::map<std::string, double> traced_;  // seconds in steps by category
  RunSummary summary_;
};

void Run::Report(const StepResult& r, double seconds) {
  // One small gather a step: traffic and memory of each rank, and whether its files failed.
  constexpr int kValues = 3;
  Tensor mine = ctx_.Empty({1, kValues}, DType::kF64);
  Tensor all = ctx_.Empty({world_.size(), kValues}, DType::kF64);
  const int64_t bytes = counted_.counts().Total().bytes;
  mine.data<double>()[0] = static_cast<double>(bytes - seen_bytes_);
  mine.data<double>()[1] = static_cast<double>(PeakRssBytes());
  mine.data<double>()[2] = report_error_.empty() ? 0 : 1;
  world_.AllGather(mine, all).Wait();

  StepMetrics m;
  m.step = trainer_->step();
  m.loss = r.loss;
  m.grad_norm = r.grad_norm;
  m.lr = r.lr;
  m.tokens = r.tokens;
  m.valid_tokens = r.valid_tokens;
  m.step_ms = seconds * 1e3;
  m.tokens_per_s = static_cast<double>(r.tokens) / seconds;
  if (settings_.peak_flops > 0) m.mfu = r.flops / seconds / settings_.peak_flops;
  for (int i = 0; i < world_.size(); ++i) {
    const double* rank = all.data<double>() + kValues * i;
    m.comm_bytes += static_cast<int64_t>(rank[0]);
    m.peak_rss_bytes = std::max(m.peak_rss_bytes, static_cast<int64_t>(rank[1]));
    if (rank[2] != 0) RaiseReportError();
  }
  summary_.seconds += seconds;
  tokens_ += r.tokens;
  summary_.last_loss = r.loss;
  Tell([&](Reporter& reporter) {
    reporter.Step(m);
    if (r.skipped) reporter.Note(Str("step ", m.step, " skipped: not finite"));
  });
}

void Run::Evaluate() {
  const EvaluationLoss e = trainer_->Evaluate();
  summary_.validation_loss = e.loss;
  Tell([&](Reporter& reporter) {
    reporter.Evaluation({trainer_->step(), "validation_loss", e.loss});
  });
}

RunSummary Run::Loop() {
  bool stop = false;
  while (trainer_->step() < options_.steps && !stop) {
    // What evaluations and saves added does not count.
    ctx_.trace().Reset();
    seen_bytes_ = counted_.counts().Total().bytes;
    const auto start = Clock::now();
    const StepResult r = Step();
    Report(r, Seconds(start));
    for (const auto& [category, seconds] : ctx_.trace().Totals()) traced_[category] += seconds;
    stop = r.stop_requested;
    writer_->Poll();
    if (r.time_is_up) {  // little may be left: first what must not be lost
      SaveNow();
      if (options_.evaluation_every_steps > 0) Evaluate();
      break;
    }
    if (Due(options_.evaluation_every_steps)) Evaluate();
    if (Due(options_.checkpoint_every_steps)) Save();
  }
  SaveNow();
  OnAllRanks(world_, [&] {
    if (!report_error_.empty()) throw Error(report_error_);
  });
  summary_.step = trainer_->step();
  summary_.stopped = trainer_->step() < options_.steps;
  summary_.skipped_steps = trainer_->skipped_steps();
  if (summary_.seconds > 0) {
    summary_.tokens_per_s = static_cast<double>(tokens_) / summary_.seconds;
    auto share = [&](const char* category) {
      const auto it = traced_.find(category);
      return it == traced_.end() ? 0.0 : it->second / summary_.seconds;
    };
    summary_.attention_share = share("attention");
    summary_.wait_share = share("communication wait") + share("gradient reduction wait");
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
