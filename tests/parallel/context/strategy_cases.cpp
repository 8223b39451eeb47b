#include "tests/parallel/context/strategy_cases.h"

#include <gtest/gtest.h>

#include <limits>
#include <mutex>
#include <numeric>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/context/balance.h"

namespace longspan::test {

using namespace parallel;

namespace {

std::vector<int64_t> LocalTokens(const Placement& placement, int rank) {
  std::vector<int64_t> index(static_cast<size_t>(placement.tokens()));
  std::iota(index.begin(), index.end(), 0);
  return placement.Slice(index, rank);
}

// Gathers a [rows * length, width] array into global order from the rank-local parts.
void Scatter(const std::vector<int64_t>& mine, int64_t width, const Vec& local, Vec& global) {
  ASSERT_EQ(local.size(), mine.size() * static_cast<size_t>(width));
  for (size_t t = 0; t < mine.size(); ++t) {
    for (int64_t d = 0; d < width; ++d) {
      global[static_cast<size_t>(mine[t] * width + d)] =
          local[t * static_cast<size_t>(width) + static_cast<size_t>(d)];
    }
  }
}

Vec Pick(const std::vector<int64_t>& mine, int64_t width, const Vec& global) {
  Vec local;
  for (const int64_t t : mine) {
    local.insert(local.end(), global.begin() + t * width, global.begin() + (t + 1) * width);
  }
  return local;
}

// Counts what arrives from each peer.
class Recorder : public Communicator {
 public:
  explicit Recorder(Communicator& inner) : inner_(inner), bytes_(static_cast<size_t>(size())) {}

  std::vector<int64_t> TakeBytes() {
    return std::exchange(bytes_, std::vector<int64_t>(bytes_.size()));
  }

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string name() const override { return inner_.name(); }
  Work AllReduce(Tensor t, ReduceOp op) override { return inner_.AllReduce(t, op); }
  Work AllGather(Tensor in, Tensor out) override { return inner_.AllGather(in, out); }
  Work ReduceScatter(Tensor in, Tensor out) override { return inner_.ReduceScatter(in, out); }
  Work Broadcast(Tensor t, int root) override { return inner_.Broadcast(t, root); }
  Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) override {
    for (const Recv& r : recvs) {
      EXPECT_GT(r.bytes, 0) << "messages of no rows are left out";
      if (r.peer != rank()) bytes_[static_cast<size_t>(r.peer)] += r.bytes;
    }
    return inner_.Exchange(std::move(sends), std::move(recvs));
  }
  void Barrier() override { inner_.Barrier(); }
  void UseDevice(std::shared_ptr<cuda::Runtime> runtime) override {
    inner_.UseDevice(std::move(runtime));
  }
  void Progress() override { inner_.Progress(); }
  void Computed(double flops) override { inner_.Computed(flops); }
  void SetTimeout(double seconds) override { inner_.SetTimeout(seconds); }
  std::unique_ptr<Communicator> Split(int color, int key) override {
    return inner_.Split(color, key);
  }
  [[noreturn]] void Abort(const std::string& reason) override {
    inner_.Abort(reason);
    std::terminate();
  }

 private:
  Communicator& inner_;
  std::vector<int64_t> bytes_;
};

// Plans of all ranks, which share what they have in common.
class Plans {
 public:
  Plans(const StrategyCase& c, const StrategyOptions& options) : case_(c), options_(options) {
    if (c.ranks > 1) maker_ = std::make_unique<PlanMaker>(DemandOf(c), options);
  }
  std::shared_ptr<const AttentionPlan> Of(int rank) const {
    if (maker_ != nullptr) return maker_->Build(rank);
    return MakePlan(case_.pattern, case_.kv_heads, DocumentsOf(case_), PlacementOf(case_), options_,
                    rank);
  }

 private:
  const StrategyCase& case_;
  const StrategyOptions options_;
  std::unique_ptr<PlanMaker> maker_;
};

}  // namespace

std::string StrategyCase::Describe() const {
  std::string text =
      Str(name, ", ", ends.size(), " rows of ", row_length, " tokens,", " first ends");
  for (const int64_t end : ends[0]) text += Str(" ", end);
  return Str(text, ", ", heads, ":", kv_heads, " heads, ", ToString(placement), ", ",
             ToString(strategy.kind), " nodes of ", strategy.ranks_per_node, " stages ",
             strategy.stages, " groups ", strategy.head_groups, " keep ", strategy.keep_rows,
             " outer ", ToString(strategy.outer), strategy.deduplicate ? "" : " no deduplication",
             ", on ", ranks,
             options.normalization == ops::Normalization::kSigmoid ? ", sigmoid" : "");
}

double Difference(const Vec& got, const Vec& expected) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (got.size() != expected.size()) return kInfinity;
  Vec a = got, b = expected;
  for (size_t i = 0; i < a.size(); ++i) {
    if ((a[i] == -kInfinity) != (b[i] == -kInfinity)) return kInfinity;
    if (a[i] == -kInfinity) a[i] = b[i] = 0;
  }
  return RelMax(a, b);
}

Tensors Inputs(const StrategyCase& c, DType representable) {
  return {Normal(c.tokens() * c.heads * kDim, 1, representable),
          Normal(c.tokens() * c.kv_heads * kDim, 2, representable),
          Normal(c.tokens() * c.kv_heads * kDim, 3, representable),
          Normal(c.tokens() * c.heads * kDim, 4, representable)};
}

std::shared_ptr<const ops::Documents> DocumentsOf(const StrategyCase& c) {
  return std::make_shared<const ops::Documents>(ops::Documents::FromEnds(c.row_length, c.ends));
}

std::shared_ptr<const Placement> PlacementOf(const StrategyCase& c) {
  const auto rows = static_cast<int64_t>(c.ends.size());
  if (c.placement == PlacementKind::kBalanced) {
    const BalanceLayer layer{c.pattern};
    return std::make_shared<const Placement>(
        BalancedPlacement(std::span(&layer, 1), c.kv_heads, DocumentsOf(c), c.ranks));
  }
  return std::make_shared<const Placement>(c.placement, rows, c.row_length, c.ranks);
}

std::shared_ptr<const ContextDemand> DemandOf(const StrategyCase& c) {
  return ContextDemand::Build(c.pattern, c.kv_heads, DocumentsOf(c), PlacementOf(c));
}

Outcome RunCase(const StrategyCase& c, const Tensors& in) {
  StrategyOptions strategy = c.strategy;
  strategy.heads = c.heads;
  const Plans plans(c, strategy);
  const auto placement = PlacementOf(c);
  const bool softmax = c.options.normalization == ops::Normalization::kSoftmax;
  Outcome all;
  all.o.resize(in.q.size()), all.dq.resize(in.q.size());
  all.dk.resize(in.k.size()), all.dv.resize(in.k.size());
  if (softmax) all.lse.resize(static_cast<size_t>(c.tokens() * c.heads));
  all.forward.resize(static_cast<size_t>(c.ranks)), all.backward.resize(all.forward.size());
  std::mutex mutex;
  RunLocal(c.ranks, [&](Communicator& world) {
    Recorder recorder(world);
    CountingCommunicator comm(recorder);
    Context ctx(ContextOptions{.device = c.device, .threads = 1, .poison_buffers = true});
    comm.UseDevice(ctx.runtime());
    ctx.SetProgress([&] { comm.Progress(); });
    const int rank = comm.rank();
    const std::vector<int64_t> mine = LocalTokens(*placement, rank);
    auto local = [&](const Vec& global, int64_t heads) {
      return FromVec(ctx, {static_cast<int64_t>(mine.size()), heads, kDim}, c.dtype,
                     Pick(mine, heads * kDim, global));
    };
    const Tensor q = local(in.q, c.heads), d_out = local(in.d_out, c.heads);
    const Tensor k = local(in.k, c.kv_heads), v = local(in.v, c.kv_heads);
    const auto plan = plans.Of(rank);
    const auto traffic =
        PlannedTraffic(*plan, c.heads, c.kv_heads, kDim, c.dtype, c.options.normalization);

    const auto saved = ContextAttentionForward(ctx, comm, *plan, q, k, v, c.options);
    EXPECT_EQ(softmax, saved.lse.defined());
    EXPECT_EQ(comm.counts().Total().bytes, traffic.forward_bytes) << "forward, rank " << rank;
    std::vector<int64_t> forward = recorder.TakeBytes();
    comm.ResetCounts();
    const auto grads = ContextAttentionBackward(ctx, comm, *plan, d_out, q, k, v, saved, c.options);
    EXPECT_EQ(comm.counts().Total().bytes, traffic.backward_bytes) << "backward, rank " << rank;

    std::lock_guard lock(mutex);
    all.forward[static_cast<size_t>(rank)] = std::move(forward);
    all.backward[static_cast<size_t>(rank)] = recorder.TakeBytes();
    Scatter(mine, c.heads * kDim, ToVec(saved.o), all.o);
    if (softmax) Scatter(mine, c.heads, ToVec(saved.lse), all.lse);
    Scatter(mine, c.heads * kDim, ToVec(grads.dq), all.dq);
    Scatter(mine, c.kv_heads * kDim, ToVec(grads.dk), all.dk);
    Scatter(mine, c.kv_heads * kDim, ToVec(grads.dv), all.dv);
  });
  return all;
}

std::vector<std::pair<std::string, ops::AttentionPattern>> Patterns(int64_t kv_heads) {
  using ops::AttentionPattern;
  const ops::S2Options s2{.block_size = 64, .local_blocks = 1, .stride_blocks = 2};
  const ops::S2Options wide{
      .block_size = 128, .local_blocks = 1, .stride_blocks = kv_heads + 1, .dense_heads = 1};
  std::vector<ops::HeadSpan> spans(static_cast<size_t>(kv_heads));
  spans.back() = {50, 3};
  return {
      {"causal", AttentionPattern::Causal()},
      {"full", AttentionPattern::Full()},
      {"window", AttentionPattern::Window(100, 5)},
      {"window_both", AttentionPattern::Window(90, 0, true)},
      {"s2", AttentionPattern::S2(s2)},
      {"s2_wide", AttentionPattern::S2(wide)},
      {"global", AttentionPattern::GlobalWindow(70, 5, true)},
      {"power", AttentionPattern::Power({16, 2, 1})},
      {"dilated", AttentionPattern::Dilated({.block_size = 64, .neighbours = 2, .dilation = 3})},
      {"prefix", AttentionPattern::Prefix(90)},
      {"question", AttentionPattern::SharedQuestion({100, 40})},
      {"blockwise", AttentionPattern::CausalBlockwise({100, 70})},
      {"block_causal", AttentionPattern::BlockCausal(128)},
      {"random", AttentionPattern::RandomBlocks({.density = 0.3, .per_head = true})},
      {"random_uneven",
       AttentionPattern::RandomBlocks(
           {.density = 0.4, .seed = 5, .mean_blocks = 2, .min_blocks = 1, .per_head = true})},
      {"spans", AttentionPattern::Spans(spans)}};
}

}  // namespace longspan::test
