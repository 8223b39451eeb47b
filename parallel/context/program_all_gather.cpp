// All-gather of keys and values by groups of kv heads, one kernel over all keys of a group, and
// partial dK/dV sent to their owners (as in the Llama 3 report, arXiv 2407.21783 section 3.3.2,
// streamed by heads). Keys are gathered again for the backward pass.
#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "parallel/context/program_writer.h"

namespace longspan::parallel::internal {
namespace {

constexpr int64_t kDefaultGroups = 4;

class AllGatherWriter {
 public:
  AllGatherWriter(const ContextDemand& demand, int64_t groups, int rank, bool with_masks)
      : demand_(demand),
        rank_(rank),
        ranks_(static_cast<int>(demand.ranks())),
        groups_(std::min(groups > 0 ? groups : kDefaultGroups, demand.kv_heads())),
        with_masks_(with_masks),
        tokens_before_{0} {
    for (int r = 0; r < ranks_; ++r) tokens_before_.push_back(tokens_before_.back() + Tokens(r));
    const StepMaker maker(demand, rank, with_masks);
    std::vector<int32_t> all(static_cast<size_t>(demand.blocks()));
    std::iota(all.begin(), all.end(), 0);
    int64_t pairs = 0;
    for (int64_t h = 0; h < demand.kv_heads(); ++h) {
      pairs += demand.Pairs(demand.pattern_of(h), rank);
    }
    const ComputeStep whole =
        maker.Step(ops::BlockList::FromIds(*demand.documents(), std::move(all)), pairs);
    for (int64_t g = 0; g < groups_; ++g) steps_.push_back(StepOf(whole, g));
  }

  Program Forward() {
    ProgramWriter writer(demand_, rank_, with_masks_);
    const RowSpan own = PackOwn(writer);
    Gather next = PostGather(writer, own, 0);
    for (int64_t g = 0; g < groups_; ++g) {
      Gather gather = next;
      writer.Wait(gather.transfer);
      if (g + 1 < groups_) next = PostGather(writer, own, g + 1);
      writer.Compute(WithKeys(g, own, gather));
      writer.Free(gather.rows);
    }
    return writer.Finish();
  }

  Program Backward() {
    ProgramWriter writer(demand_, rank_, with_masks_);
    const RowSpan own = PackOwn(writer);
    Gather next = PostGather(writer, own, 0);
    std::optional<Scatter> flying;
    for (int64_t g = 0; g < groups_; ++g) {
      Gather gather = next;
      writer.Wait(gather.transfer);
      if (g + 1 < groups_) next = PostGather(writer, own, g + 1);
      // Partial gradients of all ranks' keys, those of this rank's own among them.
      const RowSpan grads = writer.Allocate(Arena::kGrad, RowsBefore(g, ranks_));
      writer.Zero(grads);
      ComputeStep step = WithKeys(g, own, gather);
      if (step.pairs > 0) {
        step.grads.arena = Arena::kGrad;
        for (int r = 0; r < ranks_; ++r) {
          AppendPieces(r, g, grads.begin + RowsBefore(g, r), step.grads.pieces);
        }
        SortPieces(step.grads.pieces);
      }
      writer.Compute(std::move(step));
      writer.Free(gather.rows);
      if (flying.has_value()) Settle(writer, *flying);
      flying = PostScatter(writer, g, grads);
    }
    Settle(writer, *flying);
    return writer.Finish();
  }

 private:
  struct Gather {
    RowSpan rows;  // of the other ranks, ascending
    int32_t transfer = -1;
  };
  struct Scatter {
    int64_t group = 0;
    RowSpan grads, arriving;  // arriving: from the other ranks, ascending
    int32_t transfer = -1;
  };

  int64_t HeadBegin(int64_t g) const { return g * demand_.kv_heads() / groups_; }
  int64_t Heads(int64_t g) const { return HeadBegin(g + 1) - HeadBegin(g); }
  int64_t Tokens(int rank) const { return demand_.placement().local_tokens(rank); }
  int64_t Rows(int64_t g, int rank) const { return Tokens(rank) * Heads(g); }
  // Rows of a group on ranks below `rank`.
  int64_t RowsBefore(int64_t g, int rank) const {
    return tokens_before_[static_cast<size_t>(rank)] * Heads(g);
  }
  RowSpan OwnPart(const RowSpan& own, int64_t g) const {
    return Part(own, Tokens(rank_) * HeadBegin(g), Rows(g, rank_));
  }
  void AppendPieces(int rank, int64_t g, int64_t row, std::vector<Piece>& to) const {
    if (!with_masks_) return;
    AppendShard(demand_.placement().blocks(rank), HeadBegin(g), HeadBegin(g + 1), row, to);
  }

  ComputeStep StepOf(const ComputeStep& whole, int64_t g) const {
    ComputeStep step;
    step.head_begin = HeadBegin(g);
    step.head_end = HeadBegin(g + 1);
    for (int64_t h = step.head_begin; h < step.head_end; ++h) {
      step.pairs += demand_.Pairs(demand_.pattern_of(h), rank_);
    }
    if (whole.mask != nullptr && groups_ == 1) step.mask = whole.mask;
    if (whole.mask != nullptr && groups_ > 1) {
      std::vector<int32_t> heads(static_cast<size_t>(Heads(g)));
      std::iota(heads.begin(), heads.end(), static_cast<int32_t>(step.head_begin));
      step.mask = whole.mask->SelectHeads(heads);
    }
    return step;
  }

  RowSpan PackOwn(ProgramWriter& writer) const {
    const RowSpan own = writer.Allocate(Arena::kWork, Tokens(rank_) * demand_.kv_heads());
    PieceList pack{Arena::kWork, {}};
    if (with_masks_) {
      AppendShard(demand_.placement().blocks(rank_), 0, demand_.kv_heads(), own.begin, pack.pieces);
    }
    writer.Pack(std::move(pack));
    return own;
  }

  Gather PostGather(ProgramWriter& writer, const RowSpan& own, int64_t g) const {
    Gather gather;
    gather.rows = writer.Allocate(Arena::kWork, RowsBefore(g, ranks_) - Rows(g, rank_));
    Transfer transfer;
    int64_t at = 0;
    for (int r = 0; r < ranks_; ++r) {
      if (r == rank_) continue;
      AddMessage(transfer.sends, r, OwnPart(own, g));
      AddMessage(transfer.recvs, r, Part(gather.rows, at, Rows(g, r)));
      at += Rows(g, r);
    }
    gather.transfer = writer.Post(std::move(transfer));
    return gather;
  }

  ComputeStep WithKeys(int64_t g, const RowSpan& own, const Gather& gather) const {
    ComputeStep step = steps_[static_cast<size_t>(g)];
    if (step.pairs == 0) return step;
    int64_t at = gather.rows.begin;
    for (int r = 0; r < ranks_; ++r) {
      AppendPieces(r, g, r == rank_ ? OwnPart(own, g).begin : at, step.keys.pieces);
      if (r != rank_) at += Rows(g, r);
    }
    SortPieces(step.keys.pieces);
    return step;
  }

  Scatter PostScatter(ProgramWriter& writer, int64_t g, const RowSpan& grads) const {
    Scatter scatter{g, grads, writer.Allocate(Arena::kGrad, (ranks_ - 1) * Rows(g, rank_)), -1};
    Transfer transfer;
    int64_t at = 0;
    for (int r = 0; r < ranks_; ++r) {
      if (r == rank_) continue;
      AddMessage(transfer.sends, r, Part(grads, RowsBefore(g, r), Rows(g, r)));
      AddMessage(transfer.recvs, r, Part(scatter.arriving, at, Rows(g, rank_)));
      at += Rows(g, rank_);
    }
    scatter.transfer = writer.Post(std::move(transfer));
    return scatter;
  }

  // Adds up what all ranks have found for this rank's keys, in the order of the ranks.
  void Settle(ProgramWriter& writer, const Scatter& scatter) const {
    writer.Wait(scatter.transfer);
    PieceList home{Arena::kGrad, {}};
    int64_t at = scatter.arriving.begin;
    for (int r = 0; r < ranks_; ++r) {
      const bool own = r == rank_;
      AppendPieces(rank_, scatter.group,
                   own ? scatter.grads.begin + RowsBefore(scatter.group, r) : at, home.pieces);
      if (!own) at += Rows(scatter.group, rank_);
    }
    writer.AddHome(std::move(home));
    writer.Free(scatter.grads);
    writer.Free(scatter.arriving);
  }

  const ContextDemand& demand_;
  const int rank_, ranks_;
  const int64_t groups_;
  const bool with_masks_;
  std::vector<int64_t> tokens_before_;  // on lower ranks
  std::vector<ComputeStep> steps_;      // by group, without pieces
};

}  // namespace

Programs WriteAllGather(const ContextDemand& demand, int64_t head_groups, int rank,
                        bool with_masks) {
  AllGatherWriter writer(demand, head_groups, rank, with_masks);
  Program forward = writer.Forward();
  return {std::move(forward), writer.Backward()};
}

}  // namespace longspan::parallel::internal
