#include "tests/parallel/context/routed_cases.h"

#include <gtest/gtest.h>

#include <mutex>
#include <set>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "tests/support/device.h"

namespace longspan::test {

using namespace parallel;

namespace {

// Global tokens of a rank in local order, from the definition of blocks.
std::vector<int64_t> TokensOf(const Placement& placement, int rank) {
  std::vector<int64_t> tokens;
  const int64_t length = placement.row_length(), per_row = (length + 63) / 64;
  for (const int32_t id : placement.blocks(rank).ids) {
    const int64_t row = id / per_row * length, first = id % per_row * 64;
    for (int64_t t = first; t < std::min(length, first + 64); ++t) tokens.push_back(row + t);
  }
  return tokens;
}

Vec Pick(const std::vector<int64_t>& tokens, int64_t width, const Vec& global) {
  Vec local;
  for (const int64_t t : tokens) {
    local.insert(local.end(), global.begin() + t * width, global.begin() + (t + 1) * width);
  }
  return local;
}

void Put(const std::vector<int64_t>& tokens, int64_t width, const Tensor& from, Vec& global) {
  const Vec local = ToVec(from);
  ASSERT_EQ(local.size(), tokens.size() * static_cast<size_t>(width));
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::copy(local.begin() + static_cast<int64_t>(i) * width,
              local.begin() + static_cast<int64_t>(i + 1) * width,
              global.begin() + tokens[i] * width);
  }
}

RoutedBytes BytesOf(const CommCounts& counts) {
  RoutedBytes bytes{counts.Total().bytes, counts.control.bytes,
                    counts.bytes_of[static_cast<size_t>(Traffic::kRouted)]};
  for (const CommCount& op : counts.ops) bytes.calls.push_back(op.calls);
  bytes.calls.push_back(counts.control.calls);
  return bytes;
}

}  // namespace

std::string RoutedCase::Name() const {
  std::string text = Str(moba.Name(), " documents");
  const ops::Documents& d = *moba.problem.documents;
  for (size_t t = 0; t < d.doc_end.size(); t = static_cast<size_t>(d.doc_end[t])) {
    text += Str(" ", d.doc_end[t]);
  }
  return Str(text, " ", ToString(placement), " on ", ranks, " keep ", keep_rows, " ",
             implementation);
}

std::shared_ptr<const Placement> PlacementOf(const RoutedCase& c) {
  const ops::Documents& d = *c.moba.problem.documents;
  if (c.placement != PlacementKind::kBalanced) {
    return std::make_shared<const Placement>(c.placement, d.rows, d.row_length, c.ranks);
  }
  std::vector<int64_t> work;  // in no order
  for (int64_t b = 0; b < d.rows * ((d.row_length + 63) / 64); ++b) work.push_back(1 + b * 7 % 5);
  return std::make_shared<const Placement>(
      Placement::Balanced(d.rows, d.row_length, c.ranks, work));
}

RoutedOutcome RunRouted(const RoutedCase& c, const MobaInputs& in) {
  const MobaProblem& p = c.moba.problem;
  const auto placement = PlacementOf(c);
  const auto ranks = static_cast<size_t>(c.ranks);
  RoutedOutcome all;
  all.o.resize(in.q.size()), all.dq.resize(in.q.size());
  all.dk.resize(in.k.size()), all.dv.resize(in.k.size());
  all.lse.resize(static_cast<size_t>(p.tokens() * p.heads));
  all.forward.resize(ranks), all.backward.resize(ranks);
  all.own_forward.resize(ranks), all.own_backward.resize(ranks), all.planned_control.resize(ranks);
  std::mutex mutex;
  RunLocal(c.ranks, [&](Communicator& world) {
    CountingCommunicator comm(world);
    Context ctx(ContextOptions{.device = c.device, .threads = 1, .poison_buffers = true});
    comm.UseDevice(ctx.runtime());
    ctx.SetProgress([&] { comm.Progress(); });
    const auto rank = static_cast<size_t>(comm.rank());
    const std::vector<int64_t> mine = TokensOf(*placement, comm.rank());
    const auto t = static_cast<int64_t>(mine.size());
    const auto local = [&](const Vec& global, int64_t heads) {
      return FromVec(ctx, {t, heads, p.dim}, c.moba.dtype, Pick(mine, heads * p.dim, global));
    };
    const Tensor q = local(in.q, p.heads), d_out = local(in.d_out, p.heads);
    const Tensor k = local(in.k, p.kv_heads), v = local(in.v, p.kv_heads);
    const auto plan =
        MakeRoutedPlan({.block_size = p.block_size, .top_k = p.top_k}, p.kv_heads, p.documents,
                       placement, {.keep_rows = c.keep_rows}, comm.rank());
    const ops::AttentionOptions options{.scale = p.scale, .implementation = c.implementation};
    const RoutedResult saved = RoutedContextForward(ctx, comm, *plan, q, k, v, options);
    const RoutedBytes forward = BytesOf(comm.counts());
    comm.ResetCounts();
    const auto grads = RoutedContextBackward(ctx, comm, *plan, d_out, q, k, v, saved, options);

    const std::lock_guard lock(mutex);
    all.forward[rank] = forward;
    all.backward[rank] = BytesOf(comm.counts());
    all.planned_control[rank] = plan->ControlBytes(p.dim, c.moba.dtype);
    if (plan->own != nullptr) {
      const ContextTraffic own =
          PlannedTraffic(*plan->own, p.heads, p.kv_heads, p.dim, c.moba.dtype);
      all.own_forward[rank] = own.forward_bytes;
      all.own_backward[rank] = own.backward_bytes;
    }
    Put(mine, p.heads * p.dim, saved.o, all.o);
    Put(mine, p.heads, saved.lse, all.lse);
    Put(mine, p.heads * p.dim, grads.dq, all.dq);
    Put(mine, p.kv_heads * p.dim, grads.dk, all.dk);
    Put(mine, p.kv_heads * p.dim, grads.dv, all.dv);
    const int64_t width = plan->width();
    all.selected.resize(static_cast<size_t>(p.heads * p.tokens() * width));
    if (width == 0 || t == 0) return;
    std::vector<int32_t> selected(static_cast<size_t>(saved.lists.selected.numel()));
    CopyToHost(saved.lists.selected, selected.data());
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t i = 0; i < t; ++i) {
        std::copy_n(selected.begin() + (h * t + i) * width, width,
                    all.selected.begin() + (h * p.tokens() + mine[static_cast<size_t>(i)]) * width);
      }
    }
  });
  return all;
}

RoutedNeed CountNeed(const RoutedCase& c, const MobaChoice& choice) {
  const MobaProblem& p = c.moba.problem;
  const auto placement = PlacementOf(c);
  const auto ranks = static_cast<size_t>(c.ranks);
  std::vector<int> owner(static_cast<size_t>(p.tokens()));
  RoutedNeed need;
  std::set<int64_t> all;  // first tokens of blocks
  for (int r = 0; r < c.ranks; ++r) {
    std::set<int64_t> touched;
    for (const int64_t t : TokensOf(*placement, r)) {
      owner[static_cast<size_t>(t)] = r;
      const int64_t row = t - t % p.documents->row_length;
      touched.insert(std::max<int64_t>(t - (t - row) % p.block_size,
                                       p.documents->doc_begin[static_cast<size_t>(t)]));
    }
    need.most_blocks = std::max(need.most_blocks, static_cast<int64_t>(touched.size()));
    all.insert(touched.begin(), touched.end());
  }
  need.blocks = static_cast<int64_t>(all.size());
  // (rank, kv head, token)
  std::vector<char> wanted(ranks * static_cast<size_t>(p.kv_heads * p.tokens()));
  for (int64_t t = 0; t < p.tokens(); ++t) {
    const std::vector<MobaCandidate> candidates = MobaCandidates(p, t);
    need.width =
        std::max(need.width, std::min(p.top_k - 1, static_cast<int64_t>(candidates.size())));
    for (int64_t h = 0; h < p.heads; ++h) {
      for (const size_t i : choice[static_cast<size_t>(t * p.heads + h)]) {
        const int64_t kv_head = h * p.kv_heads / p.heads;
        char* row =
            wanted.data() + (owner[static_cast<size_t>(t)] * p.kv_heads + kv_head) * p.tokens();
        std::fill(row + candidates[i].begin, row + candidates[i].end, 1);
      }
    }
  }
  need.received.resize(ranks), need.sent.resize(ranks);
  need.between.assign(ranks, std::vector<int64_t>(ranks));
  for (size_t to = 0; to < ranks; ++to) {
    for (int64_t i = 0; i < p.kv_heads * p.tokens(); ++i) {
      const auto from = static_cast<size_t>(owner[static_cast<size_t>(i % p.tokens())]);
      if (from == to ||
          wanted[to * static_cast<size_t>(p.kv_heads * p.tokens()) + static_cast<size_t>(i)] == 0) {
        continue;
      }
      ++need.received[to], ++need.sent[from], ++need.between[from][to];
    }
  }
  return need;
}

}  // namespace longspan::test
