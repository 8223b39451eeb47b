#include "trainer/step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>

#include "ops/elementwise/elementwise.h"
#include "ops/optim/adamw.h"
#include "ops/optim/global_norm.h"
#include "ops/optim/step_control.h"
#include "parallel/context/fingerprint.h"

namespace longspan::trainer {
namespace {

// What ranks add up once a step: the loss sums of ops and the squares of sharded gradients, from
// the device; what the host knows, and in places of their own the notes of each rank, then
// its attention pairs and the fingerprint of its plans.
constexpr int64_t kLossSums = ops::kLossSums;
constexpr int64_t kDeviceSums = kLossSums + 1;
enum HostSum {
  kTokens,
  kPairs,
  kOpenPairs,
  kPlanMs,
  kContextMost,
  kContextMean,
  kSignals,
  kTimeUp,
  kHostSums
};
constexpr int64_t kSums = kDeviceSums + kHostSums;

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// `plans`: fingerprints of all ranks, of which those that share rows must be the same.
void RequireSamePlans(std::span<const double> plans, int cp) {
  const auto ranks = static_cast<int>(plans.size());
  for (int first = 0; first < ranks; first += cp) {
    std::vector<int64_t> shared;
    for (int r = first; r < first + cp; ++r) {
      shared.push_back(static_cast<int64_t>(plans[static_cast<size_t>(r)]));
    }
    const std::string problem = parallel::DifferingPlans(shared, first, ranks);
    if (!problem.empty()) throw CommError(problem);
  }
}

}  // namespace

TrainStep::TrainStep(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options,
                     ParameterStore& store)
    : ctx_(ctx),
      mesh_(mesh),
      options_(options),
      store_(store),
      flops_(FlopsOf(options.objective, options.model)),
      on_gpu_(ctx.device().kind == DeviceKind::kCuda) {
  Prepare(0);
}

// The report for notes of `values` values; keeps the record.
void TrainStep::Prepare(size_t values) {
  std::vector<double> record(ops::kStepFields);
  if (report_.defined()) {
    const int64_t sums = report_.dim(0) - ops::kStepFields;
    report_.Rows(sums, report_.dim(0)).ReadTo(record.data());
  }
  // Of every rank: the note, pairs, the fingerprint of plans.
  const int64_t sums = kSums + int64_t{mesh_.world().size()} * static_cast<int64_t>(values + 2);
  values_ = values;
  report_ = ctx_.Zeros({sums + ops::kStepFields}, DType::kF64);
  report_.Rows(sums, report_.dim(0)).WriteFrom(record.data());
}

void TrainStep::SetSkippedSteps(int64_t steps) {
  std::vector<double> record(ops::kStepFields);
  record[ops::kStepSkips] = static_cast<double>(steps);
  report_.Rows(report_.dim(0) - ops::kStepFields, report_.dim(0)).WriteFrom(record.data());
}

std::shared_ptr<PendingStep::Slot> TrainStep::FreeSlot() {
  for (const auto& slot : slots_) {
    if (slot.use_count() == 1) return slot;
  }
  auto slot = std::make_shared<PendingStep::Slot>();
  if (on_gpu_) {
    slot->begin = cuda::MakeMark(ctx_.cuda());
    slot->end = cuda::MakeMark(ctx_.cuda());
  }
  slots_.push_back(slot);
  return slot;
}

PendingStep TrainStep::Begin(data::Loader& loader, int64_t step,
                             const std::function<RankNote()>& note) {
  PendingStep pending;
  pending.step_ = step;
  pending.lr_ = LearningRate(options_.schedule, options_.adamw.lr, step, options_.steps);
  const auto start = std::chrono::steady_clock::now();
  std::shared_ptr<PendingStep::Slot> slot = FreeSlot();
  if (on_gpu_) slot->begin->Record();

  GradientExchange exchange(ctx_, mesh_.world(), store_);
  std::vector<double> host(kHostSums);
  Backward(loader, exchange, host);
  exchange.Finish();
  slot->sums = Reduce(note ? note() : RankNote(), host);

  Tensor record = report_.Rows(report_.dim(0) - ops::kStepFields, report_.dim(0));
  const bool skip = options_.on_nonfinite == NonFinitePolicy::kSkip;
  const double allowed = skip ? static_cast<double>(options_.max_skipped_steps) : 0;
  ops::StepControl(ctx_, report_.Rows(0, kLossSums), Squares(),
                   {.clip_norm = options_.clip_norm, .skips_allowed = allowed}, record);
  Update(step, pending.lr_);

  if (on_gpu_) {
    slot->end->Record();
    if (slot->report_bytes < report_.bytes()) {
      slot->report = cuda::MakeReadback(ctx_.cuda(), report_.bytes());
      slot->report_bytes = report_.bytes();
    }
    slot->report->Start(report_.raw(), report_.bytes());
  } else {
    slot->host_report.resize(static_cast<size_t>(report_.numel()));
    report_.ReadTo(slot->host_report.data());
    slot->host_seconds = SecondsSince(start);
  }
  pending.slot_ = std::move(slot);
  return pending;
}

// Before every micro-batch; on a GPU, where the host would wait for all work before it, once. Plans
// of later ones are compared when their step is finished.
void TrainStep::CheckPlans(const BatchPlans& plans) {
  if (options_.cp == 1 || (on_gpu_ && plans_checked_)) return;
  plans_checked_ = true;
  const TraceScope scope(ctx_.trace(), "communication wait");
  parallel::Communicator& axis = mesh_.axis("cp");
  parallel::CheckSamePlans(axis, plans.hash, mesh_.world().rank() - axis.rank(),
                           mesh_.world().size());
}

// Gradients of the summed loss, handed to `exchange` bucket after bucket; the loss sums of this
// rank in report_, what only the host knows in `host`.
void TrainStep::Backward(data::Loader& loader, GradientExchange& exchange,
                         std::vector<double>& host) {
  store_.ZeroGrads();
  ctx_.SetZero(report_.Rows(0, report_.dim(0) - ops::kStepFields));
  Tensor loss_sums = report_.Rows(0, kLossSums);
  parallel::Fingerprint plans;
  for (int64_t m = 0; m < options_.accumulation(); ++m) {
    const bool last = m + 1 == options_.accumulation();
    const data::MicroBatch batch = loader.Next();
    const auto prepared = std::static_pointer_cast<PreparedBatch>(batch.attachment);
    CheckPlans(*prepared->plans);
    plans.Add(prepared->plans->hash);
    host[kPlanMs] += prepared->plan_ms;
    host[kContextMost] += prepared->plans->work_max;
    host[kContextMean] += prepared->plans->work_mean;
    const LocalBatch local = ToDevice(ctx_, prepared->local);
    autograd::Tape tape(ctx_);
    const Tensor sums = ObjectiveForward(tape, mesh_.axis("cp"), options_.objective, options_.model,
                                         store_, local, exchange.Pass(/*first=*/m == 0, last));
    ops::AddInto(ctx_, loss_sums, sums);
    host[kTokens] += static_cast<double>(local.ids.numel());
    host[kPairs] += prepared->attention_pairs;
    host[kOpenPairs] += prepared->open_pairs;
    tape.Backward();
  }
  plans_ = plans.value() >> 12;
}

// The sum of the gradients' squares.
Tensor TrainStep::Squares() const { return report_.Rows(kLossSums, kDeviceSums); }

void TrainStep::AddSquares() {
  Tensor total = Squares();
  for (const Bucket& b : store_.buckets()) {
    for (const OwnedSegment& s : b.owned) {
      if (s.grad.defined()) ops::AddSumOfSquares(ctx_, s.grad.Rows(0, s.end - s.begin), total);
    }
  }
}

// Sums over all ranks: losses, squares of gradients, what the hosts know. Returns the last
// operation, of which the host has not heard yet whether it failed.
parallel::Work TrainStep::Reduce(const RankNote& note, std::vector<double>& host) {
  host[kSignals] = note.wish == StopWish::kSignal ? 1 : 0;
  host[kTimeUp] = note.wish == StopWish::kTimeUp ? 1 : 0;
  if (note.values.size() != values_) {  // in the first step
    const Tensor loss_sums = report_.Rows(0, kLossSums);
    Prepare(note.values.size());
    Tensor fresh = report_.Rows(0, kLossSums);
    ops::AddInto(ctx_, fresh, loss_sums);
  }
  const int64_t sums = report_.dim(0) - ops::kStepFields;
  host.resize(static_cast<size_t>(sums - kDeviceSums));
  std::copy(note.values.begin(), note.values.end(),
            host.begin() + kHostSums + mesh_.world().rank() * static_cast<int64_t>(values_));
  // What only this rank adds to: then the sums are a list by rank.
  const auto ranks = static_cast<size_t>(mesh_.world().size());
  const auto rank = static_cast<size_t>(mesh_.world().rank());
  host[host.size() - 2 * ranks + rank] = host[kPairs];
  host[host.size() - ranks + rank] = static_cast<double>(plans_);
  report_.Rows(kDeviceSums, sums).WriteFrom(host.data());
  // Each part counts once, whatever number of ranks hold it; whole gradients are summed by now, and
  // the same everywhere.
  const parallel::ShardGroups* groups = store_.groups();
  if (groups != nullptr && groups->copy() == 0) AddSquares();
  parallel::Work work;
  {
    TraceScope scope(ctx_.trace(), "gradient reduction wait");
    work = mesh_.world().AllReduce(report_.Rows(0, sums), parallel::ReduceOp::kSum);
    parallel::Work(work).Wait();
  }
  if (groups == nullptr) AddSquares();
  return work;
}

StepResult TrainStep::Finish(PendingStep pending) {
  LONGSPAN_CHECK(pending.slot_ != nullptr) << "Finish: this step was never begun";
  PendingStep::Slot& slot = *pending.slot_;
  const double* s =
      on_gpu_ ? static_cast<const double*>(slot.report->Wait()) : slot.host_report.data();
  // Communication that fails lets the GPU go on, with sums that are none.
  const bool summed = slot.sums.Done();
  LONGSPAN_CHECK(summed) << "Finish: the sums of step " << pending.step_ + 1 << " are not complete";
  slot.sums = parallel::Work();
  const int64_t notes = int64_t{mesh_.world().size()} * static_cast<int64_t>(values_);
  const double *pairs = s + kSums + notes, *plans = pairs + mesh_.world().size();
  const double* record = plans + mesh_.world().size();
  RequireSamePlans({plans, record}, static_cast<int>(options_.cp));

  StepResult result;
  result.step = pending.step_ + 1;
  result.lr = pending.lr_;
  result.loss = record[ops::kStepLoss];
  result.grad_norm = record[ops::kStepGradNorm];
  result.valid_tokens = std::llround(s[ops::kValidSum]);
  result.tokens = std::llround(s[kDeviceSums + kTokens]);
  result.plan_ms = s[kDeviceSums + kPlanMs] / mesh_.world().size();
  if (s[kDeviceSums + kContextMean] > 0) {
    result.context_work_max_over_mean =
        s[kDeviceSums + kContextMost] / s[kDeviceSums + kContextMean];
  }
  result.flops = flops_.per_token * s[kDeviceSums + kTokens] +
                 flops_.per_pair * s[kDeviceSums + kPairs] +
                 flops_.per_open_pair * s[kDeviceSums + kOpenPairs];
  if (options_.objective.kind == ObjectiveKind::kDuoGates && s[ops::kValidSum] > 0) {
    result.mean_gate = s[ops::kZLossSum] / s[ops::kValidSum];
  }
  result.seconds = on_gpu_ ? 1e-3 * slot.end->MillisecondsSince(*slot.begin) : slot.host_seconds;
  result.time_is_up = s[kDeviceSums + kTimeUp] > 0;
  result.stop_requested = result.time_is_up || s[kDeviceSums + kSignals] > 0;
  result.notes.assign(s + kSums, s + kSums + notes);
  if (s[kDeviceSums + kPairs] > 0) {
    result.work_max_over_mean = *std::max_element(pairs, plans) *
                                static_cast<double>(mesh_.world().size()) / s[kDeviceSums + kPairs];
  }
  // Reduced values are the same bits on every rank, so every rank decides alike.
  result.skipped = record[ops::kStepFinite] == 0;
  if (result.skipped && options_.on_nonfinite == NonFinitePolicy::kStop) {
    throw StepFailure(Str("step ", result.step, ": the loss is ", result.loss,
                          " and the gradient norm ", result.grad_norm,
                          "; the weights were not changed. Lower optimizer.adamw.lr, ",
                          "or set run.on_nonfinite: SKIP to leave such steps out"));
  }
  return result;
}

// Every range of every bucket, where the record says that the step counts.
void TrainStep::Update(int64_t step, double lr) {
  TraceScope scope(ctx_.trace(), "optimizer");
  const Tensor record = report_.Rows(report_.dim(0) - ops::kStepFields, report_.dim(0));
  ops::AdamWOptions o;
  o.lr = lr;
  o.beta1 = options_.adamw.beta1;
  o.beta2 = options_.adamw.beta2;
  o.eps = options_.adamw.eps;
  o.step = step + 1;
  for (size_t i = 0; i < store_.buckets().size(); ++i) {
    Bucket& b = store_.buckets()[i];
    for (OwnedSegment& s : b.owned) {
      if (!s.layout.trained) continue;
      // What this rank has of elements [begin, end) of the bucket.
      const auto update = [&](int64_t begin, int64_t end, double weight_decay) {
        begin = std::max(begin, s.begin) - s.begin;
        end = std::min(end, s.end) - s.begin;
        if (begin >= end) return;
        o.weight_decay = weight_decay;
        Tensor master = s.master.Rows(begin, end), m = s.m.Rows(begin, end),
               v = s.v.Rows(begin, end),
               value = s.value.defined() ? s.value.Rows(begin, end) : Tensor();
        ops::AdamWStep(ctx_, o, record, master, s.grad.Rows(begin, end), m, v, value);
      };
      update(0, b.decay_end, options_.adamw.weight_decay);
      update(b.decay_end, b.trained_end, 0);
    }
    for (size_t spec = 0; spec < b.specs.size(); ++spec) {
      if (!b.specs[spec].fraction || b.offsets[spec] >= b.trained_end) continue;
      Tensor gates = ParameterStore::PartOf(b, spec, &OwnedSegment::master).elements;
      if (gates.numel() > 0) ops::Clamp(ctx_, gates, 0, 1);
    }
    store_.Publish(i);
  }
}

}  // namespace longspan::trainer
