#include "launch/bench/attention_bench.h"

#include <functional>
#include <memory>

#include "launch/bench/operands.h"
#include "launch/picture/mask_facts.h"
#include "ops/attention/attention.h"

namespace longspan::launch {
namespace {

ops::Documents DocumentsOf(const AttentionCase& c) {
  if (c.document_tokens == 0) return ops::Documents::OnePerRow(1, c.tokens);
  std::vector<int64_t> ends;
  for (int64_t end = c.document_tokens; end < c.tokens; end += c.document_tokens) {
    ends.push_back(end);
  }
  ends.push_back(c.tokens);
  return ops::Documents::FromEnds(c.tokens, {ends});
}

// Operands and results of one case; forward and backward of any implementation.
class AttentionRun {
 public:
  AttentionRun(Context& ctx, const AttentionCase& c) : ctx_(ctx) {
    const auto documents = std::make_shared<const ops::Documents>(DocumentsOf(c));
    const ops::BlockList blocks = ops::BlockList::All(*documents);
    mask_ = ops::BlockMask::Build(c.pattern, c.kv_heads, documents, blocks, blocks);
    const Shape query_shape{c.tokens, c.heads, c.head_dim},
        key_shape{c.tokens, c.kv_heads, c.head_dim};
    q_ = RandomTensor(ctx, query_shape, c.dtype, 1);
    d_out_ = RandomTensor(ctx, query_shape, c.dtype, 4);
    kv_ = ops::MakeKvView(RandomTensor(ctx, key_shape, c.dtype, 2),
                          RandomTensor(ctx, key_shape, c.dtype, 3), blocks);
    const DType wide = AccumulatorOf(c.dtype);
    dq_ = ctx.Zeros(query_shape, wide);
    dk_ = ctx.Zeros(key_shape, wide);
    dv_ = ctx.Zeros(key_shape, wide);
    grads_ = ops::MakeKvGradView(dk_, dv_, blocks);
  }

  ops::AttentionResult Forward(const std::string& implementation) {
    return ops::AttentionForward(ctx_, q_, kv_, *mask_, Options(implementation));
  }
  // Adds to dq, dk and dv.
  void Backward(const std::string& implementation, const ops::AttentionResult& saved) {
    const Tensor delta = ops::AttentionDelta(ctx_, d_out_, saved.o);
    ops::AttentionBackward(ctx_, d_out_, q_, kv_, saved.lse, delta, *mask_, dq_, grads_,
                           Options(implementation));
  }

  const ops::BlockMask& mask() const { return *mask_; }
  const Tensor& dq() const { return dq_; }
  const Tensor& dk() const { return dk_; }
  const Tensor& dv() const { return dv_; }

 private:
  static ops::AttentionOptions Options(const std::string& implementation) {
    return {.implementation = implementation, .round_output = true};
  }

  Context& ctx_;
  std::shared_ptr<const ops::BlockMask> mask_;
  Tensor q_, d_out_, dq_, dk_, dv_;
  ops::KvView kv_;
  ops::KvGradView grads_;
};

void Check(Context& ctx, const AttentionCase& problem, const std::string& implementation) {
  const AttentionCase small = SmallVersion(problem);
  Context host(ContextOptions{.threads = ctx.threads()});
  AttentionRun expected(host, small), got(ctx, small);
  const ops::AttentionResult reference = expected.Forward(kReference);
  const ops::AttentionResult result = got.Forward(implementation);
  const auto require = [&](const char* what, const Tensor& a, const Tensor& b) {
    RequireAgreement(problem.name, implementation, what, RelativeDifference(a, b), problem.dtype);
  };
  require("o", result.o, reference.o);
  require("lse", result.lse, reference.lse);
  expected.Backward(kReference, reference);
  got.Backward(implementation, result);
  require("dq", got.dq(), expected.dq());
  require("dk", got.dk(), expected.dk());
  require("dv", got.dv(), expected.dv());
}

BenchRecord Describe(const AttentionCase& c, const ops::BlockMask& mask,
                     const MachinePeaks& peaks) {
  const MaskFacts facts = FactsOf(mask);
  BenchRecord r;
  r.op = "attention";
  r.name = c.name;
  r.device = peaks.device;
  r.threads = peaks.threads;
  r.visible_fraction = facts.visible_fraction;
  r.block_fraction = facts.block_fraction;
  r.peak_gflops = PeakGflops(peaks, c.dtype);
  r.peak_gbps = peaks.copy_gbps;
  return r;
}

void SetPass(BenchRecord& r, const AttentionCase& c, const ops::BlockMask& mask, bool backward) {
  const double pairs = static_cast<double>(mask.TotalVisiblePairs() * (c.heads / c.kv_heads));
  const double q = static_cast<double>(c.tokens * c.heads * c.head_dim);
  const double kv = 2.0 * static_cast<double>(c.tokens * c.kv_heads * c.head_dim);
  const double size = static_cast<double>(SizeOf(c.dtype));
  const double gradient_size = static_cast<double>(SizeOf(AccumulatorOf(c.dtype)));
  const double forward_flops = 4 * pairs * static_cast<double>(c.head_dim);
  r.pass = backward ? "backward" : "forward";
  r.flops = backward ? 2.5 * forward_flops : forward_flops;
  r.bytes = backward ? (3 * q + kv) * size + (q + kv) * gradient_size : (2 * q + kv) * size;
}

}  // namespace

std::vector<BenchRecord> BenchAttention(Context& ctx, const AttentionCase& problem,
                                        const BenchOptions& options, const MachinePeaks& peaks) {
  std::vector<Candidate> candidates;
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (entry.device != ctx.device().kind) continue;
    candidates.push_back(
        {entry.name, entry.rejects({.dtype = problem.dtype,
                                    .heads = problem.heads,
                                    .kv_heads = problem.kv_heads,
                                    .head_dim = problem.head_dim,
                                    .shared_bytes = ops::AttentionSharedBytes(ctx)})});
  }
  const std::vector<std::string> implementations =
      ChooseImplementations(problem.name, candidates, options.implementation);
  for (const std::string& name : implementations) {
    if (name != kReference) Check(ctx, problem, name);
  }

  AttentionRun run(ctx, problem);
  BenchRecord record = Describe(problem, run.mask(), peaks);
  std::vector<BenchRecord> records;
  const auto measure = [&](bool backward, const std::function<void(const std::string&)>& once) {
    SetPass(record, problem, run.mask(), backward);
    std::vector<std::function<void()>> runs;
    for (const std::string& name : implementations) runs.push_back([&once, &name] { once(name); });
    const std::vector<Timing> timings = TimeInterleaved(ctx, runs, options.seconds);
    for (size_t i = 0; i < implementations.size(); ++i) {
      record.implementation = implementations[i];
      record.timing = timings[i];
      records.push_back(record);
    }
  };
  if (options.forward) measure(false, [&](const std::string& name) { run.Forward(name); });
  if (options.backward) {
    const ops::AttentionResult saved = run.Forward(implementations.front());
    measure(true, [&](const std::string& name) { run.Backward(name, saved); });
  }
  return records;
}

}  // namespace longspan::launch
