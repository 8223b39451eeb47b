#include "parallel/context/executor.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "ops/attention/kv_rows.h"
#include "ops/elementwise/elementwise.h"
#include "parallel/context/placement.h"

namespace longspan::parallel {
namespace internal {

// What a program looks like to kernels, for one number of kv heads and one head_dim.
struct ProgramTables {
  struct Step {
    std::shared_ptr<const ops::KvTable> keys, grads;
  };
  std::vector<Step> steps;           // of computes
  std::vector<ops::RowTable> packs;  // of packs: towards rows, or home from them
  std::vector<ops::RowTable> moves;
};

}  // namespace internal

namespace {

using internal::ProgramTables;
using HeadRange = std::pair<int64_t, int64_t>;

// ---- tables -----------------------------------------------------------------------------------

// Local tokens of this rank's blocks, by global id.
using OwnTokens = std::map<int32_t, TokenRange>;

OwnTokens TokensOf(const ops::BlockList& own) {
  OwnTokens tokens;
  for (size_t i = 0; i < own.ids.size(); ++i) {
    tokens[own.ids[i]] = {own.token_begin[i], own.token_begin[i + 1]};
  }
  return tokens;
}

std::shared_ptr<const ops::KvTable> MakeTable(
    int64_t heads, int64_t token_stride, const std::vector<std::pair<Piece, int64_t>>& offsets) {
  int32_t low = 0, high = -1;
  for (const auto& [piece, offset] : offsets) {
    low = high < low ? piece.block : std::min(low, piece.block);
    high = std::max(high, piece.block);
  }
  const int64_t blocks = high - low + 1;
  std::vector<int64_t> table(static_cast<size_t>(heads * blocks), -1);
  for (const auto& [piece, offset] : offsets) {
    table[static_cast<size_t>(piece.kv_head * blocks + piece.block - low)] = offset;
  }
  return std::make_shared<const ops::KvTable>(heads, token_stride, low, std::move(table));
}

// Pieces in rows [2, head_dim]; heads count from those of the step.
std::shared_ptr<const ops::KvTable> TableOfPieces(const ComputeStep& step, const PieceList& list,
                                                  int64_t head_dim) {
  std::vector<std::pair<Piece, int64_t>> offsets;
  offsets.reserve(list.pieces.size());
  for (Piece piece : list.pieces) {
    piece.kv_head -= static_cast<int32_t>(step.head_begin);
    offsets.emplace_back(piece, piece.row * 2 * head_dim);
  }
  return MakeTable(step.head_end - step.head_begin, 2 * head_dim, offsets);
}

// The step's heads of k and v [T, kv_heads, head_dim] themselves.
std::shared_ptr<const ops::KvTable> TableOfOwn(const ComputeStep& step, const OwnTokens& own,
                                               int64_t kv_heads, int64_t head_dim) {
  std::vector<std::pair<Piece, int64_t>> offsets;
  for (int64_t h = step.head_begin; h < step.head_end; ++h) {
    for (const int32_t block : step.mask->keys().ids) {
      const Piece piece{static_cast<int32_t>(h - step.head_begin), block, 0};
      offsets.emplace_back(piece, (own.at(block).begin * kv_heads + h) * head_dim);
    }
  }
  return MakeTable(step.head_end - step.head_begin, kv_heads * head_dim, offsets);
}

ops::RowTable TableOfPack(const PieceList& list, const OwnTokens& own, int64_t kv_heads,
                          bool home) {
  std::vector<ops::RowRun> runs;
  runs.reserve(list.pieces.size());
  for (const Piece& piece : list.pieces) {
    const TokenRange tokens = own.at(piece.block);
    const int64_t vector = tokens.begin * kv_heads + piece.kv_head, row = 2 * piece.row;
    const int64_t count = tokens.end - tokens.begin;
    runs.push_back(home ? ops::RowRun{row, vector, count} : ops::RowRun{vector, row, count});
  }
  return home ? ops::RowTable(std::move(runs), 2, kv_heads)
              : ops::RowTable(std::move(runs), kv_heads, 2);
}

std::shared_ptr<const ProgramTables> MakeTables(const Program& program, int64_t kv_heads,
                                                int64_t head_dim) {
  auto tables = std::make_shared<ProgramTables>();
  const OwnTokens own = TokensOf(*program.own);
  for (const ComputeStep& step : program.computes) {
    ProgramTables::Step made;
    if (step.own) {
      made.keys = made.grads = TableOfOwn(step, own, kv_heads, head_dim);
    } else {
      made.keys = TableOfPieces(step, step.keys, head_dim);
      if (!step.grads.pieces.empty()) made.grads = TableOfPieces(step, step.grads, head_dim);
    }
    tables->steps.push_back(std::move(made));
  }
  for (const PieceList& list : program.packs) {
    tables->packs.push_back(TableOfPack(list, own, kv_heads, list.arena == Arena::kGrad));
  }
  for (const RowMoves& list : program.moves) {
    std::vector<ops::RowRun> runs;
    for (const RowMove& move : list.moves) runs.push_back({2 * move.from, 2 * move.to, move.rows});
    tables->moves.emplace_back(std::move(runs), 2, 2);
  }
  return tables;
}

// ---- one pass ---------------------------------------------------------------------------------

void CheckOperands(const Program& program, const Tensor& q, const Tensor& k, const Tensor& v) {
  LONGSPAN_CHECK(program.own != nullptr)
      << "a program without masks is for forecasts and cannot run";
  LONGSPAN_CHECK(q.rank() == 3 && k.rank() == 3 && k.shape() == v.shape() && q.dim(0) == k.dim(0) &&
                 q.dim(2) == k.dim(2) && k.dim(1) > 0 && q.dim(1) % k.dim(1) == 0 &&
                 q.dtype() == k.dtype() && k.dtype() == v.dtype())
      << "q " << q.Describe() << ", k " << k.Describe() << ", v " << v.Describe();
  LONGSPAN_CHECK(q.dim(0) == program.own->tokens())
      << "q " << q.Describe() << " has not the program's " << program.own->tokens() << " tokens";
  for (const ComputeStep& step : program.computes) {
    LONGSPAN_CHECK(step.head_end <= k.dim(1) && step.mask != nullptr &&
                   step.mask->kv_heads() == step.head_end - step.head_begin)
        << "the program computes kv heads " << step.head_begin << " to " << step.head_end
        << " of k " << k.Describe();
  }
}

// The part of both passes that is not attention: arenas, messages, copies and sums.
class Pass {
 public:
  Pass(Context& ctx, Communicator& comm, const Program& program, const Tensor& k, const Tensor& v,
       const Tensor& kept)
      : ctx_(ctx),
        comm_(comm),
        program_(program),
        k_(k),
        v_(v),
        tables_(program.cache.Get({k.dim(1), k.dim(2)},
                                  [&] { return MakeTables(program, k.dim(1), k.dim(2)); })),
        pending_(program.transfers.size()) {
    arenas_[0] = Rows(program.work_rows, k.dtype());
    arenas_[1] = kept.defined() ? kept : Rows(program.kept_rows, k.dtype());
    arenas_[2] = Rows(program.grad_rows, AccumulatorOf(k.dtype()));
  }

  const Tensor& arena(Arena arena) const { return arenas_[static_cast<size_t>(arena)]; }
  const ProgramTables::Step& tables(int32_t step) const {
    return tables_->steps[static_cast<size_t>(step)];
  }
  // K and V (dK and dV) of an arena as kernels take them: offsets count from the first row, and
  // values lie one vector behind keys.
  std::pair<Tensor, Tensor> Halves(Arena arena) const {
    const Tensor& rows = this->arena(arena);
    const int64_t vectors = 2 * rows.dim(0);
    const Tensor flat = rows.Reshape({vectors, rows.dim(2)});
    return {flat.Rows(0, vectors - 1), flat.Rows(1, vectors)};
  }

  // All instructions but kCompute. dk and dv: undefined in a forward pass.
  void Do(const Instruction& instruction, Tensor& dk, Tensor& dv) {
    const auto index = static_cast<size_t>(instruction.index);
    switch (instruction.op) {
      case Instruction::Op::kPack:
        ops::PackKv(ctx_, tables_->packs[index], k_, v_, At(program_.packs[index].arena));
        break;
      case Instruction::Op::kMove:
        ops::CopyRows(ctx_, tables_->moves[index], At(program_.moves[index].from),
                      At(program_.moves[index].to));
        break;
      case Instruction::Op::kPost:
        Post(program_.transfers[index], pending_[index]);
        break;
      case Instruction::Op::kWait: {
        const TraceScope scope(ctx_.trace(), "communication wait");
        pending_[index].Wait();
        break;
      }
      case Instruction::Op::kZero:
        ctx_.SetZero(View(program_.spans[index]));
        break;
      case Instruction::Op::kAddRows:
        ops::AddRows(ctx_, tables_->moves[index], At(program_.moves[index].from),
                     At(program_.moves[index].to));
        break;
      case Instruction::Op::kAddHome:
        ops::AddToKv(ctx_, tables_->packs[index], At(Arena::kGrad), dk, dv);
        break;
      case Instruction::Op::kCompute:
        break;
    }
  }

 private:
  Tensor Rows(int64_t rows, DType dtype) {
    const MemoryScope scope(ctx_.allocator(), MemoryCategory::kCommunication);
    return rows == 0 ? Tensor() : ctx_.Empty({rows, 2, k_.dim(2)}, dtype);
  }
  Tensor& At(Arena arena) { return arenas_[static_cast<size_t>(arena)]; }
  Tensor View(const RowSpan& span) { return At(span.arena).Rows(span.begin, span.end); }

  void Post(const Transfer& transfer, Work& work) {
    std::vector<Send> sends;
    std::vector<Recv> recvs;
    for (const Message& m : transfer.sends) sends.push_back(SendOf(m.peer, View(m.span)));
    for (const Message& m : transfer.recvs) recvs.push_back(RecvInto(m.peer, View(m.span)));
    work = comm_.Exchange(std::move(sends), std::move(recvs));
  }

  Context& ctx_;
  Communicator& comm_;
  const Program& program_;
  const Tensor &k_, &v_;
  const std::shared_ptr<const ProgramTables> tables_;
  std::vector<Work> pending_;  // by transfer
  Tensor arenas_[3];
};

// How many steps of the program work on each range of heads; those of a range make one result.
std::map<HeadRange, int> StepsByHeads(const Program& program) {
  std::map<HeadRange, int> count;
  int64_t end = 0;
  for (const ComputeStep& step : program.computes) ++count[{step.head_begin, step.head_end}];
  for (const auto& [range, steps] : count) {
    LONGSPAN_CHECK(range.first >= end) << "steps of a program have overlapping ranges of heads "
                                       << range.first << " to " << range.second;
    end = range.second;
  }
  return count;
}

// `t` [T, heads, ...] for the query heads of a step; `t` itself where that is all of them.
Tensor HeadsOf(Context& ctx, const Tensor& t, const HeadRange& query_heads) {
  if (!t.defined() || query_heads == HeadRange{0, t.dim(1)}) return t;
  return ops::SliceHeads(ctx, t, query_heads.first, query_heads.second);
}

double FlopsOf(const ComputeStep& step, const Tensor& q, int64_t kv_heads, bool backward) {
  ProgramSizes sizes;
  sizes.heads = q.dim(1);
  sizes.kv_heads = kv_heads;
  sizes.head_dim = q.dim(2);
  sizes.backward = backward;
  return StepFlops(step.pairs, sizes);
}

class ForwardPass {
 public:
  ForwardPass(Context& ctx, const Program& program, const Tensor& q, int64_t group,
              const ops::AttentionOptions& options, bool round_output)
      : ctx_(ctx),
        options_(options),
        dtype_(round_output ? q.dtype() : AccumulatorOf(q.dtype())),
        q_(q),
        group_(group),
        softmax_(options.normalization == ops::Normalization::kSoftmax),
        left_(StepsByHeads(program)) {
    int64_t covered = 0;
    for (const auto& [range, steps] : left_) covered += (range.second - range.first) * group;
    if (left_.size() == 1 && covered == q.dim(1)) return;  // the one result is the output
    const bool gaps = covered < q.dim(1);
    o_ = gaps ? ctx.Zeros(q.shape(), dtype_) : ctx.Empty(q.shape(), dtype_);
    if (!softmax_) return;
    lse_ = ctx.Empty({q.dim(0), q.dim(1)}, AccumulatorOf(q.dtype()));
    if (gaps) ops::Fill(ctx, lse_, -std::numeric_limits<double>::infinity());
  }

  void Compute(const ComputeStep& step, const ops::KvView& kv) {
    const HeadRange range{step.head_begin, step.head_end};
    const HeadRange heads{range.first * group_, range.second * group_};
    State& state = states_[range];
    if (!state.q.defined()) state.q = HeadsOf(ctx_, q_, heads);
    int& left = left_.at(range);
    ops::AttentionOptions options = options_;
    // The only step has nothing to merge.
    options.round_output = dtype_ == q_.dtype() && left == 1 && !state.o.defined();
    const auto part = ops::AttentionForward(ctx_, state.q, kv, *step.mask, options);
    if (!state.o.defined()) {
      state.o = part.o;
      state.lse = part.lse;
    } else if (softmax_) {
      ops::MergePartial(ctx_, state.o, state.lse, part.o, part.lse);
    } else {
      ops::AddInto(ctx_, state.o, part.o);
    }
    if (--left > 0) return;
    if (state.o.dtype() != dtype_) state.o = ops::Cast(ctx_, state.o, dtype_);
    if (o_.defined()) {
      ops::PlaceHeads(ctx_, state.o, heads.first, o_);
      if (softmax_) ops::PlaceHeads(ctx_, state.lse, heads.first, lse_);
    } else {
      o_ = state.o;
      lse_ = state.lse;
    }
    states_.erase(range);
  }

  ForwardOutput Output(Tensor kept) { return {o_, lse_, std::move(kept)}; }

 private:
  struct State {
    Tensor q, o, lse;
  };
  Context& ctx_;
  const ops::AttentionOptions& options_;
  const DType dtype_;  // of o
  const Tensor& q_;
  const int64_t group_;
  const bool softmax_;
  std::map<HeadRange, int> left_;
  std::map<HeadRange, State> states_;
  Tensor o_, lse_;
};

class BackwardPass {
 public:
  BackwardPass(Context& ctx, const Program& program, const Tensor& d_out, const Tensor& q,
               const Tensor& lse, const Tensor& delta, int64_t group,
               const ops::AttentionOptions& options)
      : ctx_(ctx),
        options_(options),
        d_out_(d_out),
        q_(q),
        lse_(lse),
        delta_(delta),
        group_(group),
        left_(StepsByHeads(program)),
        dq_(ctx.Zeros(q.shape(), AccumulatorOf(q.dtype()))) {}

  void Compute(const ComputeStep& step, const ops::KvView& kv, const ops::KvGradView& dkv) {
    const HeadRange range{step.head_begin, step.head_end};
    const HeadRange heads{range.first * group_, range.second * group_};
    State& state = states_[range];
    if (!state.q.defined()) {
      state.q = HeadsOf(ctx_, q_, heads);
      state.d_out = HeadsOf(ctx_, d_out_, heads);
      state.lse = HeadsOf(ctx_, lse_, heads);
      state.delta = HeadsOf(ctx_, delta_, heads);
      state.dq = heads == HeadRange{0, q_.dim(1)} ? dq_ : ctx_.Zeros(state.q.shape(), dq_.dtype());
    }
    ops::AttentionBackward(ctx_, state.d_out, state.q, kv, state.lse, state.delta, *step.mask,
                           state.dq, dkv, options_);
    if (--left_.at(range) > 0) return;
    if (state.dq.raw() != dq_.raw()) ops::PlaceHeads(ctx_, state.dq, heads.first, dq_);
    states_.erase(range);
  }

  const Tensor& dq() const { return dq_; }

 private:
  struct State {
    Tensor q, d_out, lse, delta, dq;
  };
  Context& ctx_;
  const ops::AttentionOptions& options_;
  const Tensor &d_out_, &q_, &lse_, &delta_;
  const int64_t group_;
  std::map<HeadRange, int> left_;
  std::map<HeadRange, State> states_;
  Tensor dq_;
};

// Keys of a step: this rank's, or pieces in an arena.
ops::KvView KeysOf(const Pass& pass, const ComputeStep& step, int32_t index, const Tensor& k,
                   const Tensor& v) {
  const auto& table = pass.tables(index).keys;
  if (step.own) return {k, v, k.dim(2), table};
  auto [keys, values] = pass.Halves(step.keys.arena);
  return {keys, values, k.dim(2), table};
}

}  // namespace

ForwardOutput RunForward(Context& ctx, Communicator& comm, const Program& program, const Tensor& q,
                         const Tensor& k, const Tensor& v, const ops::AttentionOptions& options,
                         bool round_output) {
  CheckOperands(program, q, k, v);
  Pass pass(ctx, comm, program, k, v, {});
  ForwardPass attention(ctx, program, q, q.dim(1) / k.dim(1), options, round_output);
  Tensor none;
  for (const Instruction& instruction : program.instructions) {
    pass.Do(instruction, none, none);
    if (instruction.op != Instruction::Op::kCompute) continue;
    const ComputeStep& step = program.computes[static_cast<size_t>(instruction.index)];
    attention.Compute(step, KeysOf(pass, step, instruction.index, k, v));
    comm.Computed(FlopsOf(step, q, k.dim(1), /*backward=*/false));
  }
  return attention.Output(pass.arena(Arena::kKept));
}

BackwardOutput RunBackward(Context& ctx, Communicator& comm, const Program& program,
                           const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& lse, const Tensor& delta, const Tensor& kept,
                           const ops::AttentionOptions& options) {
  CheckOperands(program, q, k, v);
  LONGSPAN_CHECK((kept.defined() ? kept.dim(0) : 0) == program.kept_rows)
      << "the backward program needs the " << program.kept_rows
      << " rows that the forward pass kept and is given " << (kept.defined() ? kept.dim(0) : 0);
  Pass pass(ctx, comm, program, k, v, kept);
  BackwardPass attention(ctx, program, d_out, q, lse, delta, q.dim(1) / k.dim(1), options);
  Tensor dk = ctx.Zeros(k.shape(), AccumulatorOf(k.dtype()));
  Tensor dv = ctx.Zeros(k.shape(), AccumulatorOf(k.dtype()));
  for (const Instruction& instruction : program.instructions) {
    pass.Do(instruction, dk, dv);
    if (instruction.op != Instruction::Op::kCompute) continue;
    const ComputeStep& step = program.computes[static_cast<size_t>(instruction.index)];
    const auto& table = pass.tables(instruction.index).grads;
    const auto [grad_k, grad_v] = step.own ? std::pair(dk, dv) : pass.Halves(Arena::kGrad);
    attention.Compute(step, KeysOf(pass, step, instruction.index, k, v), {grad_k, grad_v, table});
    comm.Computed(FlopsOf(step, q, k.dim(1), /*backward=*/true));
  }
  return {attention.dq(), dk, dv};
}

}  // namespace longspan::parallel
