#include "tests/parallel/context/strategy_cases.h"

#include <gtest/gtest.h>

#include <mutex>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"

namespace longspan::test {

using namespace parallel;

namespace {

// Gathers a [rows * length, width] array into global order from the rank-local parts.
void Scatter(const Placement& placement, int rank, int64_t width, const Vec& local, Vec& global) {
  std::vector<int64_t> index(static_cast<size_t>(placement.rows() * placement.row_length()));
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
  const auto mine = placement.Slice(index, rank);
  ASSERT_EQ(local.size(), mine.size() * static_cast<size_t>(width));
  for (size_t t = 0; t < mine.size(); ++t) {
    for (int64_t d = 0; d < width; ++d) {
      global[static_cast<size_t>(mine[t] * width + d)] =
          local[t * static_cast<size_t>(width) + static_cast<size_t>(d)];
    }
  }
}

Vec Pick(const Placement& placement, int rank, int64_t width, const Vec& global) {
  std::vector<int64_t> index(static_cast<size_t>(placement.rows() * placement.row_length()));
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
  Vec local;
  for (int64_t t : placement.Slice(index, rank)) {
    local.insert(local.end(), global.begin() + t * width, global.begin() + (t + 1) * width);
  }
  return local;
}

}  // namespace

Tensors Inputs(int64_t tokens, DType representable) {
  return {Normal(tokens * kHeads * kDim, 1, representable),
          Normal(tokens * kKvHeads * kDim, 2, representable),
          Normal(tokens * kKvHeads * kDim, 3, representable),
          Normal(tokens * kHeads * kDim, 4, representable)};
}

Outcome RunCase(const StrategyCase& c, const Tensors& in) {
  auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::FromEnds(c.row_length, c.ends));
  const int64_t rows = static_cast<int64_t>(c.ends.size()), tokens = rows * c.row_length;
  const Placement placement(c.placement, rows, c.row_length, c.ranks);
  Outcome all;
  all.o.resize(static_cast<size_t>(tokens * kHeads * kDim));
  all.dq = all.o;
  const bool softmax = c.options.normalization == ops::Normalization::kSoftmax;
  if (softmax) all.lse.resize(static_cast<size_t>(tokens * kHeads));
  all.dk.resize(static_cast<size_t>(tokens * kKvHeads * kDim));
  all.dv = all.dk;
  std::mutex mutex;
  RunLocal(c.ranks, [&](Communicator& world) {
    CountingCommunicator comm(world);
    Context ctx(ContextOptions{.device = c.device, .threads = 1, .poison_buffers = true});
    comm.UseDevice(ctx.runtime());
    ctx.SetProgress([&] { comm.Progress(); });
    const int rank = comm.rank();
    const int64_t t = placement.local_tokens();
    auto local = [&](const Vec& global, int64_t heads) {
      return FromVec(ctx, {t, heads, kDim}, c.dtype, Pick(placement, rank, heads * kDim, global));
    };
    const Tensor q = local(in.q, kHeads), k = local(in.k, kKvHeads), v = local(in.v, kKvHeads);
    const Tensor d_out = local(in.d_out, kHeads);
    const auto plan = MakePlan(c.pattern, kKvHeads, documents, placement, c.strategy, rank);
    const auto traffic = PlannedTraffic(*plan, t, kKvHeads, kDim, c.dtype);

    const auto saved = ContextAttentionForward(ctx, comm, *plan, q, k, v, c.options);
    EXPECT_EQ(softmax, saved.lse.defined());
    EXPECT_EQ(comm.counts().Total().bytes, traffic.forward_bytes);
    comm.ResetCounts();
    const auto grads = ContextAttentionBackward(ctx, comm, *plan, d_out, q, k, v, saved, c.options);
    EXPECT_EQ(comm.counts().Total().bytes, traffic.backward_bytes);

    std::lock_guard lock(mutex);
    Scatter(placement, rank, kHeads * kDim, ToVec(saved.o), all.o);
    if (softmax) Scatter(placement, rank, kHeads, ToVec(saved.lse), all.lse);
    Scatter(placement, rank, kHeads * kDim, ToVec(grads.dq), all.dq);
    Scatter(placement, rank, kKvHeads * kDim, ToVec(grads.dk), all.dk);
    Scatter(placement, rank, kKvHeads * kDim, ToVec(grads.dv), all.dv);
  });
  return all;
}

std::vector<std::pair<std::string, ops::AttentionPattern>> Patterns() {
  ops::S2Options s2{.block_size = 64, .local_blocks = 1, .stride_blocks = 2};
  ops::S2Options wide{.block_size = 128, .local_blocks = 1, .stride_blocks = 3, .dense_heads = 1};
  return {{"causal", ops::AttentionPattern::Causal()},
          {"full", ops::AttentionPattern::Full()},
          {"window", ops::AttentionPattern::Window(100, 5)},
          {"s2", ops::AttentionPattern::S2(s2)},
          {"s2_wide", ops::AttentionPattern::S2(wide)},
          {"global", ops::AttentionPattern::GlobalWindow(70, 5, true)},
          {"power", ops::AttentionPattern::Power({16, 2, 1})},
          {"prefix", ops::AttentionPattern::Prefix(90)},
          {"question", ops::AttentionPattern::SharedQuestion({100, 40})},
          {"random", ops::AttentionPattern::RandomBlocks({.density = 0.3, .per_head = true})},
          {"spans", ops::AttentionPattern::Spans({{}, {50, 3}})}};
}

}  // namespace longspan::test
