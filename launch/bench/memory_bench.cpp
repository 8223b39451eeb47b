#include "launch/bench/memory_bench.h"

#include <algorithm>
#include <functional>
#include <set>

#include "launch/bench/operands.h"
#include "ops/activation/gelu.h"
#include "ops/activation/swiglu.h"
#include "ops/core/rng.h"
#include "ops/elementwise/elementwise.h"
#include "ops/embedding/embedding.h"
#include "ops/gemm/gemm.h"
#include "ops/loss/linear_cross_entropy.h"
#include "ops/norm/rms_norm.h"
#include "ops/optim/adamw.h"
#include "ops/rope/rope.h"

namespace longspan::launch {
namespace {

constexpr int64_t kInnerWidth = 64;  // of the product that makes logits

// One pass of an op on operands of its own.
struct Pass {
  std::function<std::vector<Tensor>()> run;  // returns what it computed
  std::function<void()> uncounted;           // part of run that is not the op's; may be empty
  double bytes = 0;
};
struct Program {
  Pass forward, backward;  // backward.run is empty where there is none
};

double BytesOf(std::initializer_list<Tensor> tensors) {
  double bytes = 0;
  for (const Tensor& t : tensors) bytes += static_cast<double>(t.bytes());
  return bytes;
}

Tensor RandomIds(Context& ctx, int64_t n, int64_t vocab) {
  const Philox random(5, StreamOf("bench ids"));
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(random.Below(i, static_cast<uint64_t>(vocab)));
  }
  Tensor t = ctx.Empty({n}, DType::kI32);
  t.WriteFrom(ids.data());
  return t;
}

Program RmsNorm(Context& ctx, const MemoryCase& c) {
  const Shape shape{c.tokens, c.width};
  const Tensor x = RandomTensor(ctx, shape, c.dtype, 1), dy = RandomTensor(ctx, shape, c.dtype, 2);
  const Tensor w = RandomTensor(ctx, {c.width}, DType::kF32, 3);
  Tensor dw = ctx.Zeros({c.width}, DType::kF32);
  const ops::RmsNormResult saved = ops::RmsNormForward(ctx, x, w, 1e-5);
  const double statistics = BytesOf({w, saved.rstd});
  Program p;
  p.forward.run = [&ctx, x, w] {
    const auto r = ops::RmsNormForward(ctx, x, w, 1e-5);
    return std::vector<Tensor>{r.y, r.rstd};
  };
  p.forward.bytes = BytesOf({x, saved.y}) + statistics;
  p.backward.run = [&ctx, x, w, dy, dw, rstd = saved.rstd]() mutable {
    const Tensor dx = ops::RmsNormBackward(ctx, dy, x, w, rstd, dw);
    return std::vector<Tensor>{dx, dw};
  };
  p.backward.bytes = BytesOf({x, dy, x, dw, dw}) + statistics;
  return p;
}

Program SwiGlu(Context& ctx, const MemoryCase& c) {
  const Shape shape{c.tokens, c.width};
  const Tensor gate = RandomTensor(ctx, shape, c.dtype, 1),
               up = RandomTensor(ctx, shape, c.dtype, 2), dy = RandomTensor(ctx, shape, c.dtype, 3);
  Program p;
  p.forward.run = [&ctx, gate, up] {
    return std::vector<Tensor>{ops::SwiGluForward(ctx, gate, up)};
  };
  p.forward.bytes = BytesOf({gate, up, dy});
  p.backward.run = [&ctx, gate, up, dy] {
    const auto g = ops::SwiGluBackward(ctx, dy, gate, up);
    return std::vector<Tensor>{g.dgate, g.dup};
  };
  p.backward.bytes = BytesOf({gate, up, dy, gate, up});
  return p;
}

Program Gelu(Context& ctx, const MemoryCase& c) {
  const Shape shape{c.tokens, c.width};
  const Tensor x = RandomTensor(ctx, shape, c.dtype, 1), dy = RandomTensor(ctx, shape, c.dtype, 2);
  Program p;
  p.forward.run = [&ctx, x] { return std::vector<Tensor>{ops::GeluForward(ctx, x)}; };
  p.forward.bytes = BytesOf({x, x});
  p.backward.run = [&ctx, x, dy] { return std::vector<Tensor>{ops::GeluBackward(ctx, dy, x)}; };
  p.backward.bytes = BytesOf({x, dy, x});
  return p;
}

Program Cast(Context& ctx, const MemoryCase& c) {
  const DType from = c.dtype == DType::kBF16 ? DType::kF32 : DType::kBF16;
  const Tensor x = RandomTensor(ctx, {c.tokens, c.width}, from, 1);
  const Tensor y = ctx.Empty(x.shape(), c.dtype);
  Program p;
  p.forward.run = [&ctx, x, to = c.dtype] { return std::vector<Tensor>{ops::Cast(ctx, x, to)}; };
  p.forward.bytes = BytesOf({x, y});
  return p;
}

Program Sum(Context& ctx, const MemoryCase& c) {
  const Shape shape{c.tokens, c.width};
  const Tensor a = RandomTensor(ctx, shape, c.dtype, 1), b = RandomTensor(ctx, shape, c.dtype, 2);
  Program p;
  p.forward.run = [&ctx, a, b] { return std::vector<Tensor>{ops::Add(ctx, a, b)}; };
  p.forward.bytes = BytesOf({a, b, a});
  return p;
}

Program Rope(Context& ctx, const MemoryCase& c) {
  const Tensor x = RandomTensor(ctx, {c.tokens, c.heads, c.width}, c.dtype, 1);
  Context host(ContextOptions{.threads = 1});
  Tensor positions = host.Empty({c.tokens}, DType::kI64);
  for (int64_t i = 0; i < c.tokens; ++i) positions.data<int64_t>()[i] = i;
  const ops::RopeTable table =
      ops::MakeRopeTable(ctx, positions, {.theta = 5e5, .head_dim = c.width}, c.dtype);
  Program p;
  p.forward.run = [&ctx, x, table] { return std::vector<Tensor>{ops::RopeForward(ctx, x, table)}; };
  p.backward.run = [&ctx, x, table] {
    return std::vector<Tensor>{ops::RopeBackward(ctx, x, table)};
  };
  p.forward.bytes = p.backward.bytes = BytesOf({x, x, table.cos, table.sin});
  return p;
}

Program AdamW(Context& ctx, const MemoryCase& c) {
  const Shape shape{c.parameters};
  Tensor master = RandomTensor(ctx, shape, DType::kF32, 1), m = ctx.Zeros(shape, DType::kF32),
         v = ctx.Zeros(shape, DType::kF32);
  const Tensor grad = RandomTensor(ctx, shape, DType::kF32, 2);
  const Tensor copy = c.dtype == DType::kBF16 ? ctx.Empty(shape, DType::kBF16) : Tensor();
  Program p;
  p.forward.run = [&ctx, master, m, v, grad, copy]() mutable {
    ops::AdamWStep(ctx, {.lr = 1e-4, .weight_decay = 0.1}, Tensor(), master, grad, m, v, copy);
    return copy.defined() ? std::vector<Tensor>{master, m, v, copy}
                          : std::vector<Tensor>{master, m, v};
  };
  p.forward.bytes = BytesOf({master, master, m, m, v, v, grad}) +
                    (copy.defined() ? static_cast<double>(copy.bytes()) : 0);
  return p;
}

Program CrossEntropy(Context& ctx, const MemoryCase& c) {
  const Tensor x = RandomTensor(ctx, {c.tokens, kInnerWidth}, c.dtype, 1, 0.3);
  const Tensor w = RandomTensor(ctx, {c.vocab, kInnerWidth}, c.dtype, 2);
  const Tensor labels = RandomIds(ctx, c.tokens, c.vocab);
  const ops::LinearCrossEntropyOptions options{.chunk_tokens = c.tokens};
  const ops::LinearCrossEntropyResult saved =
      ops::LinearCrossEntropyForward(ctx, x, w, labels, options);
  Tensor logits = ctx.Empty({c.tokens, c.vocab}, DType::kF32);
  const Tensor gradient = RandomTensor(ctx, {c.tokens, c.vocab}, c.dtype, 3);
  Tensor dx = ctx.Empty(x.shape(), c.dtype), dw = ctx.Zeros(w.shape(), DType::kF32);
  Program p;
  p.forward.run = [&ctx, x, w, labels, options] {
    const auto r = ops::LinearCrossEntropyForward(ctx, x, w, labels, options);
    return std::vector<Tensor>{r.sums, r.lse};
  };
  p.forward.uncounted = [&ctx, x, w, logits]() mutable {
    ops::Gemm(ctx, x, false, w, true, logits);
  };
  p.forward.bytes = BytesOf({logits, labels, saved.lse});
  p.backward.run = [&ctx, x, w, labels, options, saved, dw]() mutable {
    const Tensor result =
        ops::LinearCrossEntropyBackward(ctx, saved, x, w, labels, options, 1.0, dw);
    return std::vector<Tensor>{result, dw};
  };
  p.backward.uncounted = [&ctx, x, w, logits, gradient, dx, dw]() mutable {
    ops::Gemm(ctx, x, false, w, true, logits);
    ops::Gemm(ctx, gradient, false, w, false, dx);
    ops::Gemm(ctx, gradient, true, x, false, dw, {.accumulate = true});
  };
  p.backward.bytes = BytesOf({logits, gradient, labels, saved.lse});
  return p;
}

Program Embedding(Context& ctx, const MemoryCase& c) {
  Context host(ContextOptions{.threads = 1});
  const Tensor host_ids = RandomIds(host, c.tokens, c.vocab);
  const Tensor ids = RandomIds(ctx, c.tokens, c.vocab);
  ops::EmbeddingOrder order = ops::OrderTokens(host, host_ids, c.vocab);
  if (ctx.device().kind != DeviceKind::kCpu) {
    for (Tensor* t : {&order.tokens, &order.pieces, &order.joins}) {
      const Tensor on_host = *t;
      *t = ctx.Empty(on_host.shape(), on_host.dtype());
      if (on_host.bytes() > 0) t->WriteFrom(on_host.raw());
    }
  }
  const Tensor table = RandomTensor(ctx, {c.vocab, c.width}, c.dtype, 1);
  const Tensor dy = RandomTensor(ctx, {c.tokens, c.width}, c.dtype, 2);
  Tensor dtable = ctx.Zeros(table.shape(), DType::kF32);
  const int32_t* id = host_ids.data<int32_t>();
  const auto rows = static_cast<double>(std::set<int32_t>(id, id + c.tokens).size());
  Program p;
  p.forward.run = [&ctx, ids, table, dtype = c.dtype] {
    return std::vector<Tensor>{ops::EmbeddingForward(ctx, ids, table, dtype)};
  };
  p.forward.bytes = BytesOf({ids, dy, dy});
  p.backward.run = [&ctx, ids, dy, dtable, order]() mutable {
    ops::EmbeddingBackward(ctx, ids, dy, dtable, order);
    return std::vector<Tensor>{dtable};
  };
  p.backward.bytes = BytesOf({ids, dy}) + 2 * rows * static_cast<double>(c.width) * sizeof(float);
  return p;
}

Program Make(Context& ctx, const MemoryCase& c) {
  switch (c.op) {
    case MemoryOp::kRmsNorm:
      return RmsNorm(ctx, c);
    case MemoryOp::kSwiGlu:
      return SwiGlu(ctx, c);
    case MemoryOp::kGelu:
      return Gelu(ctx, c);
    case MemoryOp::kCast:
      return Cast(ctx, c);
    case MemoryOp::kAdd:
      return Sum(ctx, c);
    case MemoryOp::kRope:
      return Rope(ctx, c);
    case MemoryOp::kAdamW:
      return AdamW(ctx, c);
    case MemoryOp::kCrossEntropy:
      return CrossEntropy(ctx, c);
    case MemoryOp::kEmbedding:
      return Embedding(ctx, c);
  }
  throw InvalidArgument("BenchMemory: unknown op");
}

void Check(Context& ctx, const MemoryCase& problem) {
  Context host(ContextOptions{.threads = ctx.threads()});
  const MemoryCase small = SmallVersion(problem);
  const Program expected = Make(host, small), got = Make(ctx, small);
  for (const auto& [reference, tested] :
       {std::pair(&expected.forward, &got.forward), std::pair(&expected.backward, &got.backward)}) {
    if (!reference->run) continue;
    const std::vector<Tensor> a = tested->run(), b = reference->run();
    for (size_t i = 0; i < a.size(); ++i) {
      RequireAgreement(problem.name, "cuda", "a result", RelativeDifference(a[i], b[i]),
                       problem.dtype);
    }
  }
}

}  // namespace

std::vector<BenchRecord> BenchMemory(Context& ctx, const MemoryCase& problem,
                                     const BenchOptions& options, const MachinePeaks& peaks) {
  const std::string name = ctx.device().kind == DeviceKind::kCuda ? "cuda" : "cpu";
  if (!options.implementation.empty() && options.implementation != name) {
    throw InvalidArgument(Str("--impl ", options.implementation, " is not an implementation; use ",
                              name, " or leave it out"));
  }
  if (name == "cuda") Check(ctx, problem);
  const Program program = Make(ctx, problem);
  std::vector<BenchRecord> records;
  for (const bool backward : {false, true}) {
    const Pass& pass = backward ? program.backward : program.forward;
    if (!pass.run || !(backward ? options.backward : options.forward)) continue;
    std::vector<std::function<void()>> runs = {[&pass] { pass.run(); }};
    if (pass.uncounted) runs.push_back(pass.uncounted);
    std::vector<Timing> timings = options.Time(ctx, runs);
    if (pass.uncounted) {
      // What noise leaves of a difference is never less than a hundredth of the whole.
      const double product = timings[1].median_ms, least = timings[0].median_ms * 0.01;
      timings[0].median_ms = std::max(least, timings[0].median_ms - product);
      timings[0].p90_ms = std::max(timings[0].median_ms, timings[0].p90_ms - product);
    }
    BenchRecord r = RecordOf("memory", problem.name, backward, problem.dtype, peaks);
    r.implementation = name;
    r.timing = timings[0];
    r.bytes = pass.bytes;
    records.push_back(r);
  }
  return records;
}

}  // namespace longspan::launch
