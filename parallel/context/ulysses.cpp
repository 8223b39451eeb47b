// Execution of ulysses and hybrid. Both passes are the same chain: the heads of step s + 1 are on
// their way while step s computes, and its results travel back while step s + 1 computes.
#include <cstring>

#include "ops/core/cuda/backend.h"
#include "ops/elementwise/elementwise.h"
#include "parallel/context/executor.h"
#include "parallel/context/ulysses_run.h"

namespace longspan::parallel {
namespace {

using Heads = std::vector<int32_t> UlyssesShare::*;

int64_t Size(const std::vector<int32_t>& v) { return static_cast<int64_t>(v.size()); }

Tensor Part(const Tensor& t, int64_t begin, int64_t elements) {
  return t.Reshape({t.numel()}).Rows(begin, begin + elements);
}

void Copy(Context& ctx, const Tensor& from, const Tensor& to) {
  if (from.bytes() == 0) return;
  if (ctx.device().kind == DeviceKind::kCuda) {
    cuda::CopyOnDevice(ctx.cuda(), to.raw(), from.raw(), from.bytes());
  } else {
    std::memcpy(to.raw(), from.raw(), from.bytes());
  }
}

void WaitTraced(Context& ctx, Work& work) {
  const TraceScope scope(ctx.trace(), "communication wait");
  work.Wait();
}

// One exchange in the group: several tensors, some towards heads and some home.
class Freight {
 public:
  Freight(Context& ctx, Communicator& comm, const UlyssesPlan& plan, const UlyssesStep& step)
      : ctx_(ctx), comm_(comm), plan_(plan), step_(step) {}

  // `home`, from element `at` on, is [this rank's tokens, heads of rank r] for r = 0, 1, ... of the
  // group; `away` is [tokens of the group, this rank's heads]. A head has `elements` a token.
  void ToHeads(const Tensor& home, const Tensor& away, Heads heads, int64_t elements) {
    Add(home, 0, away, heads, elements, /*to_heads=*/true);
  }
  void Home(const Tensor& away, const Tensor& home, int64_t at, Heads heads, int64_t elements) {
    Add(home, at, away, heads, elements, /*to_heads=*/false);
  }

  Work Post() { return comm_.Exchange(std::move(sends_), std::move(recvs_)); }

 private:
  void Add(const Tensor& home, int64_t at, const Tensor& away, Heads heads, int64_t elements,
           bool to_heads) {
    const int ranks = plan_.ranks();
    const int64_t mine = Size(step_.share(plan_.index).*heads);
    std::vector<Tensor> here, there;  // by rank; undefined where there is nothing
    int64_t away_at = 0;
    for (int r = 0; r < ranks; ++r) {
      const int64_t sent = plan_.local_tokens() * Size(step_.share(r).*heads) * elements;
      const int64_t taken = plan_.tokens[static_cast<size_t>(r)] * mine * elements;
      here.push_back(sent > 0 ? Part(home, at, sent) : Tensor());
      there.push_back(taken > 0 ? Part(away, away_at, taken) : Tensor());
      at += sent;
      away_at += taken;
    }
    for (int d = 0; d < ranks; ++d) {  // starting with this rank, so that not all send to one
      const auto r = static_cast<size_t>((plan_.index + d) % ranks);
      if (d == 0) {
        if (here[r].defined()) Keep(here[r], there[r], to_heads);
        continue;
      }
      const int peer = plan_.first_rank + static_cast<int>(r);
      if (here[r].defined()) Message(peer, here[r], to_heads);
      if (there[r].defined()) Message(peer, there[r], !to_heads);
    }
  }
  void Keep(const Tensor& home, const Tensor& away, bool to_heads) {
    Copy(ctx_, to_heads ? home : away, to_heads ? away : home);
  }
  void Message(int peer, const Tensor& part, bool send) {
    if (send) {
      sends_.push_back(SendOf(peer, part));
    } else {
      recvs_.push_back(RecvInto(peer, part));
    }
  }

  Context& ctx_;
  Communicator& comm_;
  const UlyssesPlan& plan_;
  const UlyssesStep& step_;
  std::vector<Send> sends_;
  std::vector<Recv> recvs_;
};

// A transfer under way, with what it reads.
struct Transit {
  Work work;
  std::vector<Tensor> sent;
};

void WaitAll(Context& ctx, std::vector<Transit>& transits) {
  for (Transit& t : transits) {
    WaitTraced(ctx, t.work);
    t.sent.clear();
  }
}

// Runs a chain of steps: bring(s) posts what step s needs, compute(s) runs it and posts its
// results.
template <class Bring, class Compute>
void RunChain(Context& ctx, size_t steps, const Bring& bring, const Compute& compute) {
  std::vector<Transit> results;
  Transit coming = steps > 0 ? bring(0) : Transit{};
  for (size_t s = 0; s < steps; ++s) {
    Transit next = s + 1 < steps ? bring(s + 1) : Transit{};
    WaitTraced(ctx, coming.work);
    coming = std::move(next);
    results.push_back(compute(s));
  }
  WaitAll(ctx, results);
}

// The heads of a rank's tokens in the order in which they leave.
Tensor Packed(Context& ctx, const HeadGather& gather, const Tensor& t, int64_t elements) {
  const auto heads = static_cast<int64_t>(gather.outputs.size());
  const MemoryScope scope(ctx.allocator(), MemoryCategory::kCommunication);
  const Tensor packed = ctx.Empty({gather.tokens * heads * elements}, t.dtype());
  GatherHeads(ctx, gather, t, packed, elements);
  return packed;
}

// A tensor of the heads that this rank has at a step.
Tensor OfHeads(Context& ctx, const UlyssesPlan& plan, const std::vector<int32_t>& heads,
               int64_t elements, DType dtype) {
  const MemoryScope scope(ctx.allocator(), MemoryCategory::kCommunication);
  return ctx.Empty({plan.group_tokens(), Size(heads), elements}, dtype);
}

// What comes home, before its heads are put in their places.
Tensor Arriving(Context& ctx, int64_t elements, DType dtype) {
  const MemoryScope scope(ctx.allocator(), MemoryCategory::kCommunication);
  return ctx.Empty({elements}, dtype);
}

// Virtual kv heads that are not the keys themselves, one for one.
bool Repeats(const UlyssesShare& share, int64_t keys) {
  if (Size(share.slots) != keys) return true;
  for (size_t i = 0; i < share.slots.size(); ++i) {
    if (share.slots[i] != static_cast<int32_t>(i)) return true;
  }
  return false;
}

// Keys of a step for its mask: virtual kv heads read the keys of theirs where they lie.
ops::KvView KeysOf(const UlyssesStep& step, const UlyssesShare& share, const Tensor& k,
                   const Tensor& v) {
  const int64_t keys = k.dim(1), dim = k.dim(2);
  if (!Repeats(share, keys)) return ops::MakeKvView(k, v, *step.mask);
  const auto make = [&] {
    const ops::BlockList& list = step.mask->keys();
    const int64_t blocks = list.size();
    std::vector<int64_t> offsets(share.slots.size() * static_cast<size_t>(blocks));
    for (size_t h = 0; h < share.slots.size(); ++h) {
      for (int64_t i = 0; i < blocks; ++i) {  // all blocks are there, so that ids are places
        const auto id = static_cast<size_t>(list.ids[static_cast<size_t>(i)]);
        offsets[h * static_cast<size_t>(blocks) + id] =
            (list.token_begin[static_cast<size_t>(i)] * keys + share.slots[h]) * dim;
      }
    }
    return std::make_shared<const ops::KvTable>(Size(share.slots), keys * dim, 0,
                                                std::move(offsets));
  };
  return {k, v, dim, step.tables->Get({keys, dim, {}}, make)};
}

// What a rank without heads does in the place of a program.
void PassBy(Context& ctx, Communicator& comm, const Program& program) {
  for (size_t i = 0; i < program.transfers.size(); ++i) {
    Work work = comm.Exchange({}, {});
    WaitTraced(ctx, work);
  }
}

double Flops(const UlyssesStep& step, const UlyssesShare& share, int64_t dim, double per_pair) {
  return per_pair * static_cast<double>(step.pairs * share.group * dim);
}

Tensor Half(const Tensor& pair, int64_t half) {
  return pair.Rows(half, half + 1).Reshape({pair.dim(1), pair.dim(2), pair.dim(3)});
}

// ---- forward ----------------------------------------------------------------------------------

class ForwardPass {
 public:
  ForwardPass(Context& ctx, Communicator& comm, const UlyssesPlan& plan, const Tensor& q,
              const Tensor& k, const Tensor& v, const ops::AttentionOptions& options)
      : ctx_(ctx), comm_(comm), plan_(plan), q_(q), k_(k), v_(v), options_(options) {
    options_.round_output = true;
    saved_->steps.resize(plan.steps.size());
  }

  UlyssesOutput Run() {
    const int64_t tokens = plan_.local_tokens(), dim = q_.dim(2);
    const bool softmax = options_.normalization == ops::Normalization::kSoftmax;
    const DType wide = AccumulatorOf(q_.dtype());
    arrived_o_ = Arriving(ctx_, tokens * plan_.heads * dim, q_.dtype());
    if (softmax) arrived_lse_ = Arriving(ctx_, tokens * plan_.heads, wide);
    RunChain(
        ctx_, plan_.steps.size(), [&](size_t s) { return Bring(s); },
        [&](size_t s) { return Compute(s); });
    UlyssesOutput out{ctx_.Empty(q_.shape(), q_.dtype()), {}, saved_};
    GatherHeads(ctx_, plan_.unpack_queries, arrived_o_, out.o, dim);
    if (softmax) {
      out.lse = ctx_.Empty({tokens, plan_.heads}, wide);
      GatherHeads(ctx_, plan_.unpack_queries, arrived_lse_, out.lse, 1);
    }
    return out;
  }

 private:
  Transit Bring(size_t s) {
    const UlyssesStep& step = plan_.steps[s];
    const UlyssesShare& share = step.share(plan_.index);
    UlyssesSaved::Step& saved = saved_->steps[s];
    const int64_t dim = q_.dim(2);
    saved.q = OfHeads(ctx_, plan_, share.queries, dim, q_.dtype());
    saved.k = OfHeads(ctx_, plan_, share.keys, dim, q_.dtype());
    saved.v = OfHeads(ctx_, plan_, share.keys, dim, q_.dtype());
    Transit transit;
    Freight freight(ctx_, comm_, plan_, step);
    const auto bring = [&](const HeadGather& pack, const Tensor& t, const Tensor& to, Heads heads) {
      transit.sent.push_back(Packed(ctx_, pack, t, dim));
      freight.ToHeads(transit.sent.back(), to, heads, dim);
    };
    bring(step.pack_queries, q_, saved.q, &UlyssesShare::queries);
    bring(step.pack_keys, k_, saved.k, &UlyssesShare::keys);
    bring(step.pack_keys, v_, saved.v, &UlyssesShare::keys);
    transit.work = freight.Post();
    return transit;
  }

  // o [N, heads, D] of the step, rounded; lse stays in saved_.
  Tensor Attend(size_t s) {
    const UlyssesStep& step = plan_.steps[s];
    const UlyssesShare& share = step.share(plan_.index);
    UlyssesSaved::Step& saved = saved_->steps[s];
    if (share.queries.empty()) {
      PassBy(ctx_, comm_, step.forward);
      return {};
    }
    const UlyssesSaved::Step& keys = saved_->steps[static_cast<size_t>(share.key_step)];
    if (plan_.hybrid) {
      if (share.key_step != static_cast<int32_t>(s)) {
        saved.k = keys.k, saved.v = keys.v;
      } else if (Repeats(share, Size(share.keys))) {
        saved.k = Repeated(step, share, saved.k), saved.v = Repeated(step, share, saved.v);
      }
      ForwardOutput out =
          RunForward(ctx_, comm_, step.forward, saved.q, saved.k, saved.v, options_);
      saved.lse = out.lse, saved.kept = out.kept;
      return out.o;
    }
    const auto out = ops::AttentionForward(ctx_, saved.q, KeysOf(step, share, keys.k, keys.v),
                                           *step.mask, options_);
    comm_.Computed(Flops(step, share, q_.dim(2), 4));
    saved.lse = out.lse;
    return out.o;
  }

  Tensor Repeated(const UlyssesStep& step, const UlyssesShare& share, const Tensor& t) {
    const Tensor all = OfHeads(ctx_, plan_, share.kv_heads, t.dim(2), t.dtype());
    GatherHeads(ctx_, step.repeat_keys, t, all, t.dim(2));
    return all;
  }

  Transit Compute(size_t s) {
    const UlyssesStep& step = plan_.steps[s];
    const Tensor o = Attend(s), lse = saved_->steps[s].lse;
    Transit transit;
    transit.sent = {o};
    Freight freight(ctx_, comm_, plan_, step);
    const int64_t dim = q_.dim(2);
    freight.Home(o, arrived_o_, at_ * dim, &UlyssesShare::queries, dim);
    if (arrived_lse_.defined()) {
      freight.Home(lse, arrived_lse_, at_, &UlyssesShare::queries, 1);
    }
    at_ += static_cast<int64_t>(step.pack_queries.outputs.size()) * plan_.local_tokens();
    transit.work = freight.Post();
    return transit;
  }

  Context& ctx_;
  Communicator& comm_;
  const UlyssesPlan& plan_;
  const Tensor &q_, &k_, &v_;
  ops::AttentionOptions options_;
  std::shared_ptr<UlyssesSaved> saved_ = std::make_shared<UlyssesSaved>();
  Tensor arrived_o_, arrived_lse_;
  int64_t at_ = 0;  // vectors that earlier steps sent back
};

// ---- backward ---------------------------------------------------------------------------------

class BackwardPass {
 public:
  BackwardPass(Context& ctx, Communicator& comm, const UlyssesPlan& plan, const Tensor& d_out,
               const Tensor& delta, const UlyssesSaved& saved, DType dtype,
               const ops::AttentionOptions& options)
      : ctx_(ctx),
        comm_(comm),
        plan_(plan),
        d_out_(d_out),
        delta_(delta),
        saved_(saved),
        dtype_(dtype),
        wide_(AccumulatorOf(dtype)),
        options_(options),
        coming_(plan.steps.size()),
        key_grads_(plan.steps.size()) {}

  UlyssesGrads Run() {
    const int64_t tokens = plan_.local_tokens(), dim = d_out_.dim(2);
    const auto arriving = [&](const HeadGather& gather, DType dtype) {
      return Arriving(ctx_, tokens * static_cast<int64_t>(gather.sources.size()) * dim, dtype);
    };
    arrived_dq_ = arriving(plan_.unpack_queries, dtype_);
    arrived_whole_ = arriving(plan_.unpack_whole, dtype_);
    arrived_partial_ = arriving(plan_.unpack_partial, wide_);
    RunChain(
        ctx_, plan_.steps.size(), [&](size_t s) { return Bring(s); },
        [&](size_t s) { return Compute(s); });
    const Tensor dq = ctx_.Empty({tokens, plan_.heads, dim}, dtype_);
    const Tensor dkv = ctx_.Empty({2, tokens, plan_.kv_heads, dim}, dtype_);
    GatherHeads(ctx_, plan_.unpack_queries, arrived_dq_, dq, dim);
    GatherHeads(ctx_, plan_.unpack_whole, arrived_whole_, dkv, dim);
    GatherHeads(ctx_, plan_.unpack_partial, arrived_partial_, dkv, dim);
    return {dq, Half(dkv, 0), Half(dkv, 1)};
  }

 private:
  struct Coming {
    Tensor d_out, delta;  // of the step's heads
  };

  Transit Bring(size_t s) {
    const UlyssesStep& step = plan_.steps[s];
    const UlyssesShare& share = step.share(plan_.index);
    const int64_t dim = d_out_.dim(2);
    Transit transit;
    Freight freight(ctx_, comm_, plan_, step);
    const auto bring = [&](const Tensor& t, Tensor& to, int64_t elements) {
      to = OfHeads(ctx_, plan_, share.queries, elements, t.dtype());
      transit.sent.push_back(Packed(ctx_, step.pack_queries, t, elements));
      freight.ToHeads(transit.sent.back(), to, &UlyssesShare::queries, elements);
    };
    bring(d_out_, coming_[s].d_out, dim);
    if (delta_.defined()) bring(delta_, coming_[s].delta, 1);
    transit.work = freight.Post();
    return transit;
  }

  // dq of the step's heads, f32 (f64); adds to key_grads_ of the step whose keys it used.
  Tensor Differentiate(size_t s) {
    const UlyssesStep& step = plan_.steps[s];
    const UlyssesShare& share = step.share(plan_.index);
    const UlyssesSaved::Step& saved = saved_.steps[s];
    if (share.queries.empty()) {
      PassBy(ctx_, comm_, step.backward);
      return {};
    }
    const int64_t tokens = plan_.group_tokens(), dim = d_out_.dim(2);
    const Tensor d_out = coming_[s].d_out;
    const Tensor delta = coming_[s].delta.defined()
                             ? coming_[s].delta.Reshape({tokens, Size(share.queries)})
                             : Tensor();
    coming_[s] = {};
    Tensor& grads = key_grads_[static_cast<size_t>(share.key_step)];
    if (plan_.hybrid) {
      const BackwardOutput out = RunBackward(ctx_, comm_, step.backward, d_out, saved.q, saved.k,
                                             saved.v, saved.lse, delta, saved.kept, options_);
      AddKeyGradients(grads, out);
      return out.dq;
    }
    if (!grads.defined()) grads = ctx_.Zeros({2, tokens, Size(share.kv_heads), dim}, wide_);
    Tensor dq = ctx_.Zeros(saved.q.shape(), wide_);
    const UlyssesSaved::Step& keys = saved_.steps[static_cast<size_t>(share.key_step)];
    ops::AttentionBackward(
        ctx_, d_out, saved.q, KeysOf(step, share, keys.k, keys.v), saved.lse, delta, *step.mask, dq,
        ops::MakeKvGradView(Half(grads, 0), Half(grads, 1), *step.mask), options_);
    comm_.Computed(Flops(step, share, dim, 10));
    return dq;
  }

  void AddKeyGradients(Tensor& grads, const BackwardOutput& out) {
    const bool first = !grads.defined();
    if (first) grads = ctx_.Empty({2, out.dk.dim(0), out.dk.dim(1), out.dk.dim(2)}, wide_);
    Tensor dk = Half(grads, 0), dv = Half(grads, 1);
    if (first) {
      Copy(ctx_, out.dk, dk);
      Copy(ctx_, out.dv, dv);
    } else {
      ops::AddInto(ctx_, dk, out.dk);
      ops::AddInto(ctx_, dv, out.dv);
    }
  }

  Transit Compute(size_t s) {
    const UlyssesStep& step = plan_.steps[s];
    const UlyssesShare& share = step.share(plan_.index);
    const int64_t dim = d_out_.dim(2);
    Transit transit;
    Tensor dq = Differentiate(s);
    if (dq.defined() && dq.dtype() != dtype_) dq = ops::Cast(ctx_, dq, dtype_);
    Freight freight(ctx_, comm_, plan_, step);
    const auto home = [&](const Tensor& from, const Tensor& to, int64_t& at, Heads heads,
                          int64_t elements) {
      transit.sent.push_back(from);
      freight.Home(from, to, at, heads, elements);
      for (const UlyssesShare& other : *step.shares) {
        at += plan_.local_tokens() * Size(other.*heads) * elements;
      }
    };
    home(dq, arrived_dq_, at_dq_, &UlyssesShare::queries, dim);
    const auto leaving = [&](const HeadGather& sum, const std::vector<int32_t>& heads,
                             DType dtype) {
      if (heads.empty()) return Tensor();
      const Tensor& grads = key_grads_[static_cast<size_t>(share.key_step)];
      const Tensor out = OfHeads(ctx_, plan_, heads, 2 * dim, dtype);
      GatherHeads(ctx_, sum, grads, out, dim);
      return out;
    };
    const Tensor whole = leaving(step.sum_whole, share.whole, dtype_);
    const Tensor partial = leaving(step.sum_partial, share.partial, wide_);
    if (whole.defined() || partial.defined()) {
      key_grads_[static_cast<size_t>(share.key_step)] = {};
    }
    home(whole, arrived_whole_, at_whole_, &UlyssesShare::whole, 2 * dim);
    home(partial, arrived_partial_, at_partial_, &UlyssesShare::partial, 2 * dim);
    transit.work = freight.Post();
    return transit;
  }

  Context& ctx_;
  Communicator& comm_;
  const UlyssesPlan& plan_;
  const Tensor &d_out_, &delta_;
  const UlyssesSaved& saved_;
  const DType dtype_, wide_;
  const ops::AttentionOptions& options_;
  std::vector<Coming> coming_;
  std::vector<Tensor> key_grads_;  // [2, N, virtual kv heads, D] of each step that brought keys
  Tensor arrived_dq_, arrived_whole_, arrived_partial_;
  int64_t at_dq_ = 0, at_whole_ = 0, at_partial_ = 0;  // elements that earlier steps sent back
};

}  // namespace

UlyssesOutput UlyssesForward(Context& ctx, Communicator& comm, const UlyssesPlan& plan,
                             const Tensor& q, const Tensor& k, const Tensor& v,
                             const ops::AttentionOptions& options) {
  return ForwardPass(ctx, comm, plan, q, k, v, options).Run();
}

UlyssesGrads UlyssesBackward(Context& ctx, Communicator& comm, const UlyssesPlan& plan,
                             const Tensor& d_out, const Tensor& delta, const UlyssesSaved& saved,
                             DType dtype, const ops::AttentionOptions& options) {
  return BackwardPass(ctx, comm, plan, d_out, delta, saved, dtype, options).Run();
}

}  // namespace longspan::parallel
