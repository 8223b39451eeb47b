#include "trainer/step.h"

#include <cmath>

#include "ops/optim/adamw.h"
#include "ops/optim/global_norm.h"

namespace longspan::trainer {
namespace {

// What ranks add up once a step.
enum Sum { kLoss, kZLoss, kValid, kTokens, kPairs, kSignals, kTimeUp, kSums };

}  // namespace

TrainStep::TrainStep(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options,
                     ParameterStore& store)
    : ctx_(ctx),
      mesh_(mesh),
      options_(options),
      store_(store),
      matmul_flops_per_token_(6.0 * static_cast<double>(CountMatmulParameters(options.model))) {}

StepResult TrainStep::Run(data::Loader& loader, int64_t step,
                          const std::function<StopWish()>& wish) {
  auto& buckets = store_.buckets();
  std::vector<Tensor> grads;
  for (Bucket& b : buckets) grads.push_back(b.grad);
  parallel::GradReducer reducer(mesh_.world(), grads);

  store_.ZeroGrads();
  Tensor sums = ctx_.Zeros({kSums}, DType::kF64);
  double* s = sums.data<double>();
  for (int64_t m = 0; m < options_.accumulation(); ++m) {
    const bool last = m + 1 == options_.accumulation();
    const data::MicroBatch batch = loader.Next();
    const auto prepared = std::static_pointer_cast<PreparedBatch>(batch.attachment);
    const LocalBatch local = ToDevice(ctx_, prepared->local);
    autograd::Tape tape(ctx_);
    const BucketHook ready = [&](size_t bucket) { reducer.BucketReady(static_cast<int>(bucket)); };
    const auto loss = DecoderForward(tape, mesh_.axis("cp"), options_.model, store_, local,
                                     last ? ready : BucketHook());
    s[kLoss] += loss.loss_sum;
    s[kZLoss] += loss.z_loss_sum;
    s[kValid] += static_cast<double>(loss.valid);
    s[kTokens] += static_cast<double>(local.ids.numel());
    s[kPairs] += prepared->attention_pairs;
    tape.Backward();
  }
  const StopWish mine = wish ? wish() : StopWish::kNone;
  s[kSignals] = mine == StopWish::kSignal ? 1 : 0;
  s[kTimeUp] = mine == StopWish::kTimeUp ? 1 : 0;
  {
    TraceScope scope(ctx_.trace(), "gradient reduction wait");
    reducer.Finish();
    mesh_.world().AllReduce(sums, parallel::ReduceOp::kSum).Wait();
  }

  StepResult result;
  result.valid_tokens = std::llround(s[kValid]);
  result.tokens = std::llround(s[kTokens]);
  result.time_is_up = s[kTimeUp] > 0;
  result.stop_requested = result.time_is_up || s[kSignals] > 0;
  result.flops = matmul_flops_per_token_ * s[kTokens] +
                 12.0 * static_cast<double>(options_.model.head_dim) * s[kPairs];
  result.lr = LearningRate(options_.schedule, options_.adamw.lr, step, options_.steps);
  // A batch without any label has gradient zero; it must not turn into 0 / 0.
  const double mean = result.valid_tokens > 0 ? 1.0 / s[kValid] : 0.0;
  result.loss = s[kLoss] * mean;
  double squares = 0;
  for (const Bucket& b : buckets) squares += ops::SumOfSquares(ctx_, b.grad);
  result.grad_norm = std::sqrt(squares) * mean;

  // Reduced values are the same bits on every rank, so every rank decides alike.
  if (!std::isfinite(result.loss + s[kZLoss]) || !std::isfinite(result.grad_norm)) {
    if (options_.on_nonfinite == NonFinitePolicy::kStop) {
      throw StepFailure(Str("step ", step + 1, ": the loss is ", result.loss,
                            " and the gradient norm ", result.grad_norm,
                            "; the weights were not changed. Lower optimizer.adamw.lr, ",
                            "or set run.on_nonfinite: SKIP to leave such steps out"));
    }
    result.skipped = true;
    return result;
  }
  if (result.valid_tokens == 0) return result;
  double scale = mean;
  if (options_.clip_norm > 0 && result.grad_norm > options_.clip_norm) {
    scale *= options_.clip_norm / result.grad_norm;
  }
  Update(step, result.lr, scale);
  return result;
}

void TrainStep::Update(int64_t step, double lr, double grad_scale) {
  TraceScope scope(ctx_.trace(), "optimizer");
  ops::AdamWOptions o;
  o.lr = lr;
  o.beta1 = options_.adamw.beta1;
  o.beta2 = options_.adamw.beta2;
  o.eps = options_.adamw.eps;
  o.step = step + 1;
  o.grad_scale = grad_scale;
  for (Bucket& b : store_.buckets()) {
    const bool copies = b.value.raw() != b.master.raw();
    auto update = [&](int64_t begin, int64_t end, double weight_decay) {
      if (begin == end) return;
      o.weight_decay = weight_decay;
      Tensor master = b.master.Rows(begin, end), m = b.m.Rows(begin, end), v = b.v.Rows(begin, end),
             value = copies ? b.value.Rows(begin, end) : Tensor();
      ops::AdamWStep(ctx_, o, master, b.grad.Rows(begin, end), m, v, value);
    };
    update(0, b.decay_end, options_.adamw.weight_decay);
    update(b.decay_end, b.master.numel(), 0);
  }
}

}  // namespace longspan::trainer
