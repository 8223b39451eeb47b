#include "parallel/context/routed.h"

#include <utility>
#include <vector>

#include "ops/elementwise/elementwise.h"
#include "parallel/context/executor.h"
#include "parallel/context/strategy_scope.h"

namespace longspan::parallel {
namespace {

void CheckOperands(const Communicator& comm, const RoutedPlan& plan, const Tensor& q,
                   const Tensor& k, const Tensor& v) {
  LONGSPAN_CHECK(comm.rank() == plan.rank && comm.size() == plan.ranks)
      << "plan of rank " << plan.rank << " of " << plan.ranks << " used on rank " << comm.rank()
      << " of " << comm.size();
  LONGSPAN_CHECK(q.rank() == 3 && k.rank() == 3 && k.shape() == v.shape() && q.dim(0) == k.dim(0) &&
                 q.dim(2) == k.dim(2) && q.dtype() == k.dtype() && k.dtype() == v.dtype() &&
                 q.dim(1) % plan.kv_heads == 0)
      << "q " << q.Describe() << ", k " << k.Describe() << ", v " << v.Describe();
  LONGSPAN_CHECK(q.dim(0) == plan.local_tokens && k.dim(1) == plan.kv_heads)
      << "k " << k.Describe() << " but the plan is of " << plan.local_tokens << " tokens and "
      << plan.kv_heads << " kv heads";
}

void WaitFor(Context& ctx, Work& work) {
  const TraceScope scope(ctx.trace(), "communication wait");
  work.Wait();
}

// One message for each entry of the lists, between `to_send` and `to_receive`.
Work Post(Communicator& comm, const Transfer& transfer, const Tensor& to_send,
          const Tensor& to_receive) {
  std::vector<Send> sends;
  std::vector<Recv> recvs;
  for (const Message& m : transfer.sends) {
    sends.push_back(SendOf(m.peer, to_send.Rows(m.span.begin, m.span.end)));
  }
  for (const Message& m : transfer.recvs) {
    recvs.push_back(RecvInto(m.peer, to_receive.Rows(m.span.begin, m.span.end)));
  }
  return comm.Exchange(std::move(sends), std::move(recvs));
}

// K and V (dK and dV) of rows [R, 2, D]: offsets count from the first row, and values lie one
// vector behind keys.
std::pair<Tensor, Tensor> Halves(const Tensor& rows) {
  const int64_t vectors = 2 * rows.dim(0);
  const Tensor flat = rows.Reshape({vectors, rows.dim(2)});
  if (vectors == 0) return {flat, flat};
  return {flat.Rows(0, vectors - 1), flat.Rows(1, vectors)};
}

// Mean keys of all blocks, on every rank.
Tensor GatherMeans(Context& ctx, Communicator& comm, const RoutedPlan& plan, const Tensor& k) {
  const Tensor parts = ops::BlockMeans(
      ctx, k, *plan.blocks, plan.shares[static_cast<size_t>(plan.rank)], plan.most_blocks);
  const Tensor all = ctx.Empty({plan.ranks * plan.most_blocks, k.dim(1), k.dim(2)}, parts.dtype());
  {
    const ControlTraffic control(comm);
    Work work = comm.AllGather(parts, all);
    WaitFor(ctx, work);
  }
  const Tensor means = ctx.Empty({plan.blocks->count(), k.dim(1), k.dim(2)}, parts.dtype());
  GatherHeads(ctx, plan.means, all, means, k.dim(2));
  return means;
}

// Who needs which pieces.
std::shared_ptr<const RoutedExchange> GatherRequests(Context& ctx, Communicator& comm,
                                                     const RoutedPlan& plan,
                                                     const ops::RoutedLists& lists) {
  const Tensor request = ops::ListedBlocks(ctx, lists, plan.kv_heads);
  const Tensor all = ctx.Empty({plan.ranks * request.dim(0), request.dim(1)}, DType::kU8);
  {
    const ControlTraffic control(comm);
    Work work = comm.AllGather(request, all);
    WaitFor(ctx, work);
  }
  std::vector<uint8_t> bytes(all.bytes());
  all.ReadTo(bytes.data());
  return std::make_shared<const RoutedExchange>(plan, bytes);
}

// The arena of keys: first its messages travel, then the pieces are put together. One that was
// `kept` is complete; this rank then only sends.
class KeyArena {
 public:
  KeyArena(Context& ctx, const RoutedExchange& exchange, const Tensor& k, const Tensor& v,
           const Tensor& kept = {})
      : ctx_(ctx),
        exchange_(exchange),
        k_(k),
        v_(v),
        complete_(kept.defined()),
        rows_(complete_ ? kept : ctx.Empty({exchange.arena_rows(), 2, k.dim(2)}, k.dtype())) {}

  void Start(Communicator& comm, const Transfer& transfer) {
    if (!transfer.sends.empty()) {
      sent_ = ctx_.Empty({exchange_.sent_rows(), 2, k_.dim(2)}, k_.dtype());
      ops::PackKv(ctx_, exchange_.pack(), k_, v_, sent_);
    }
    work_ = Post(comm, transfer, sent_, rows_);
    if (!complete_ && !exchange_.own().empty()) {
      ops::PackKv(ctx_, exchange_.own(), k_, v_, rows_);
    }
  }
  Tensor Finish() {
    WaitFor(ctx_, work_);
    sent_ = {};
    if (!complete_ && !exchange_.assemble().empty()) {
      ops::CopyRows(ctx_, exchange_.assemble(), rows_, rows_);
    }
    return rows_;
  }

 private:
  Context& ctx_;
  const RoutedExchange& exchange_;
  const Tensor &k_, &v_;
  const bool complete_;
  Tensor rows_, sent_;
  Work work_;
};

ops::KvView ViewOf(const Tensor& rows, std::shared_ptr<const ops::KvTable> table) {
  const auto [k, v] = Halves(rows);
  return {k, v, rows.dim(2), std::move(table)};
}

// Operations of the attention to chosen blocks; how many keys they really have is in the lists.
double NominalFlops(const RoutedPlan& plan, const Tensor& q, double per_pair) {
  const int64_t pairs = ops::NominalChosenPairs(plan.options, *plan.blocks,
                                                plan.shares[static_cast<size_t>(plan.rank)]);
  return per_pair * static_cast<double>(pairs) * static_cast<double>(q.dim(1) * q.dim(2));
}

RoutedResult WholeForward(Context& ctx, const ops::MobaPlan& plan, const Tensor& q, const Tensor& k,
                          const Tensor& v, const ops::AttentionOptions& options) {
  const ops::MobaResult result = ops::MobaForward(ctx, q, k, v, plan, options);
  return {.o = ops::Cast(ctx, result.o, q.dtype()), .lse = result.lse, .lists = result.lists};
}

// dK and dV of chosen blocks: own ones into dk and dv, and the others on their way home.
class KeyGradients {
 public:
  KeyGradients(Context& ctx, const RoutedExchange& exchange, const ops::RoutedBackward& in,
               const ops::AttentionOptions& options)
      : ctx_(ctx),
        exchange_(exchange),
        rows_(ctx.Zeros({exchange.arena_rows(), 2, in.q.dim(2)}, AccumulatorOf(in.q.dtype()))) {
    const auto [dk, dv] = Halves(rows_);
    ops::RoutedKeyGradient(ctx, in, {dk, dv, in.kv.table}, options);
    if (!exchange.spread().empty()) ops::CopyRows(ctx, exchange.spread(), rows_, rows_);
  }
  void Start(Communicator& comm) {
    received_ = ctx_.Empty({exchange_.sent_rows(), 2, rows_.dim(2)}, rows_.dtype());
    work_ = Post(comm, exchange_.grads(), rows_, received_);
  }
  void AddHome(Tensor& dk, Tensor& dv) {
    if (!exchange_.home_own().empty()) ops::AddToKv(ctx_, exchange_.home_own(), rows_, dk, dv);
    WaitFor(ctx_, work_);
    if (!exchange_.home().empty()) ops::AddToKv(ctx_, exchange_.home(), received_, dk, dv);
  }

 private:
  Context& ctx_;
  const RoutedExchange& exchange_;
  Tensor rows_, received_;
  Work work_;
};

}  // namespace

RoutedResult RoutedContextForward(Context& ctx, Communicator& comm, const RoutedPlan& plan,
                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                  const ops::AttentionOptions& options) {
  CheckOperands(comm, plan, q, k, v);
  const TraceScope scope(ctx.trace(), "context attention");
  const StrategyScope counted(ctx, comm, Traffic::kRouted, kRoutedWait);
  if (plan.whole != nullptr) return WholeForward(ctx, *plan.whole, q, k, v, options);
  RoutedResult result;
  const auto attend_own = [&](bool round_output) {
    ForwardOutput own = RunForward(ctx, comm, plan.own->forward, q, k, v, options, round_output);
    result.o = own.o;
    result.lse = own.lse;
    result.own_kept = own.kept;
  };
  if (plan.width() == 0) {
    attend_own(/*round_output=*/true);
    return result;
  }
  const Tensor means = GatherMeans(ctx, comm, plan, k);
  const Tensor selected = ops::SelectBlocks(ctx, q, means, *plan.queries, plan.width(), options);
  result.lists = ops::BuildRoutedLists(ctx, selected, plan.blocks->count());
  result.exchange = GatherRequests(ctx, comm, plan, result.lists);

  KeyArena arena(ctx, *result.exchange, k, v);
  arena.Start(comm, result.exchange->keys());
  attend_own(/*round_output=*/false);
  const Tensor keys = arena.Finish();
  ops::RoutedForward(ctx, q, ViewOf(keys, result.exchange->MakeTable(k.dim(2))), *plan.blocks,
                     *plan.queries, result.lists, result.o, result.lse, options);
  comm.Computed(NominalFlops(plan, q, 4));
  result.o = ops::Cast(ctx, result.o, q.dtype());
  if (result.exchange->keeps()) result.keys = keys;
  return result;
}

ContextAttentionGrads RoutedContextBackward(Context& ctx, Communicator& comm,
                                            const RoutedPlan& plan, const Tensor& d_out,
                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                            const RoutedResult& saved,
                                            const ops::AttentionOptions& options) {
  CheckOperands(comm, plan, q, k, v);
  LONGSPAN_CHECK(d_out.shape() == q.shape())
      << "d_out " << d_out.Describe() << " but q " << q.Describe();
  const TraceScope scope(ctx.trace(), "context attention");
  const StrategyScope counted(ctx, comm, Traffic::kRouted, kRoutedWait);
  const Tensor delta = ops::AttentionDelta(ctx, d_out, saved.o);
  const auto cast = [&](const Tensor& dq, const Tensor& dk, const Tensor& dv) {
    return ContextAttentionGrads{ops::Cast(ctx, dq, q.dtype()), ops::Cast(ctx, dk, q.dtype()),
                                 ops::Cast(ctx, dv, q.dtype())};
  };
  if (plan.whole != nullptr) {
    const ops::MobaGradients grads =
        ops::MobaBackward(ctx, d_out, q, k, v, saved.lse, delta, saved.lists, *plan.whole, options);
    return cast(grads.dq, grads.dk, grads.dv);
  }
  const auto attend_own = [&] {
    return RunBackward(ctx, comm, plan.own->backward, d_out, q, k, v, saved.lse, delta,
                       saved.own_kept, options);
  };
  if (plan.width() == 0) {
    const BackwardOutput own = attend_own();
    return cast(own.dq, own.dk, own.dv);
  }
  LONGSPAN_CHECK(saved.exchange != nullptr) << "the saved result is not of this plan";
  const RoutedExchange& exchange = *saved.exchange;
  KeyArena arena(ctx, exchange, k, v, saved.keys);
  arena.Start(comm, exchange.again());  // all ranks alike, also where nothing is fetched again
  BackwardOutput grads = attend_own();
  const ops::KvView kv = ViewOf(arena.Finish(), exchange.MakeTable(k.dim(2)));
  const ops::RoutedBackward in{.d_out = d_out,
                               .q = q,
                               .kv = kv,
                               .lse = saved.lse,
                               .delta = delta,
                               .blocks = *plan.blocks,
                               .queries = *plan.queries,
                               .lists = saved.lists};
  KeyGradients chosen(ctx, exchange, in, options);
  chosen.Start(comm);
  ops::RoutedQueryGradient(ctx, in, grads.dq, options);
  comm.Computed(NominalFlops(plan, q, 10));
  chosen.AddHome(grads.dk, grads.dv);
  return cast(grads.dq, grads.dk, grads.dv);
}

}  // namespace longspan::parallel
