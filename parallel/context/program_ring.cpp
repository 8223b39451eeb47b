// Ring attention (arXiv 2310.01889) and its double ring (LoongTrain, arXiv 2406.18485) over any
// placement. The plain ring is the double ring of one node.
//
// Ranks are (node a, inner i), `window` ranks a node. Forward, in window o and inner step s, a rank
// computes with the keys of (a - o, i - s); they go on to (a, i + 1), and what the window started
// with goes to (a + 1, i) until the window ends. Backward runs through the same steps in reverse
// order and sends keys the other way. The sum of dK/dV of those keys follows one step behind them
// in the ring of the node, so that the window's sum ends at (a, i), the inner index of the keys'
// owner; the sums of windows are passed from node to node during the next window and end at home.
#include <memory>
#include <optional>
#include <vector>

#include "parallel/context/builder.h"
#include "parallel/context/program_writer.h"

namespace longspan::parallel::internal {
namespace {

class RingWriter {
 public:
  RingWriter(const ContextDemand& demand, int rank, int window, bool with_masks)
      : demand_(demand),
        steps_(demand, rank, with_masks),
        rank_(rank),
        window_(window),
        nodes_(static_cast<int>(demand.ranks()) / window),
        with_masks_(with_masks),
        made_(static_cast<size_t>(demand.ranks())) {}

  Programs Write() {
    Program forward = Forward();
    return {std::move(forward), Backward()};
  }

 private:
  static int Mod(int a, int n) { return ((a % n) + n) % n; }
  // Whose keys this rank computes with at inner step s of window o.
  int Source(int o, int s) const {
    return Mod(rank_ / window_ - o, nodes_) * window_ + Mod(rank_ % window_ - s, window_);
  }
  int InnerPeer(int direction) const {
    return rank_ / window_ * window_ + Mod(rank_ % window_ + direction, window_);
  }
  int OuterPeer(int direction) const {
    return Mod(rank_ / window_ + direction, nodes_) * window_ + rank_ % window_;
  }
  int64_t Rows(int source) const {
    return demand_.placement().local_tokens(source) * demand_.kv_heads();
  }
  std::vector<Piece> Pieces(int source, const RowSpan& span) const {
    std::vector<Piece> pieces;
    if (with_masks_) {
      AppendShard(demand_.placement().blocks(source), 0, demand_.kv_heads(), span.begin, pieces);
    }
    return pieces;
  }
  bool Last(int o, int s) const { return o == nodes_ - 1 && s == window_ - 1; }

  // The step against the keys of `source` at `held`; both passes share its mask.
  ComputeStep Step(int source, const RowSpan& held) {
    std::optional<ComputeStep>& made = made_[static_cast<size_t>(source)];
    if (!made.has_value()) {
      made = source == rank_
                 ? steps_.OwnStep()
                 : steps_.Step(demand_.placement().blocks(source), steps_.Pairs(source));
    }
    ComputeStep step = *made;
    if (source != rank_ && step.pairs > 0) {
      step.keys = {held.arena, Pieces(source, held)};
      SortPieces(step.keys.pieces);
    }
    return step;
  }

  Program Forward() {
    ProgramWriter writer(demand_, rank_, with_masks_);
    RowSpan held = writer.Allocate(Arena::kWork, Rows(rank_));
    writer.Pack({held.arena, Pieces(rank_, held)});
    const auto place = [&](int o, int s) {  // of the keys that arrive for a step
      return writer.Allocate(Last(o, s) ? Arena::kKept : Arena::kWork, Rows(Source(o, s)));
    };
    for (int o = 0; o < nodes_; ++o) {
      const RowSpan first = held;
      RowSpan next_first;
      int32_t outer = -1;
      if (o + 1 < nodes_) {
        next_first = place(o + 1, 0);
        outer = PostHop(writer, OuterPeer(+1), first, OuterPeer(-1), next_first);
      }
      for (int s = 0; s < window_; ++s) {
        RowSpan next;
        int32_t inner = -1;
        if (s + 1 < window_) {
          next = place(o, s + 1);
          inner = PostHop(writer, InnerPeer(+1), held, InnerPeer(-1), next);
        }
        writer.Compute(Step(Source(o, s), held));
        if (inner < 0) break;
        writer.Wait(inner);
        if (s > 0 || outer < 0) writer.Free(held);
        held = next;
      }
      if (window_ > 1 || outer < 0) writer.Free(held);
      if (outer >= 0) {
        writer.Wait(outer);
        writer.Free(first);
      }
      held = next_first;
    }
    return writer.Finish();
  }

  static int32_t PostHop(ProgramWriter& writer, int to, const RowSpan& out, int from,
                         const RowSpan& in) {
    Transfer transfer;
    AddMessage(transfer.sends, to, out);
    AddMessage(transfer.recvs, from, in);
    return writer.Post(std::move(transfer));
  }

  Program Backward() {
    ProgramWriter writer(demand_, rank_, with_masks_);
    const int64_t kept = Rows(Source(nodes_ - 1, window_ - 1));
    writer.SetKeptRows(kept);
    RowSpan first{Arena::kKept, 0, kept};
    RowSpan sum;  // of the windows so far, for the keys of Source(o + 1, 0)
    for (int o = nodes_ - 1; o >= 0; --o) {
      const bool keys_go_on = o > 0 && !(o == 1 && window_ == 1);
      const bool sums_go_on = o < nodes_ - 1;
      RowSpan next_first, arriving;
      int32_t outer = -1;
      if (keys_go_on || sums_go_on) {
        Transfer transfer;
        if (keys_go_on) {
          next_first = writer.Allocate(Arena::kWork, Rows(Source(o - 1, window_ - 1)));
          AddMessage(transfer.sends, OuterPeer(-1), first);
          AddMessage(transfer.recvs, OuterPeer(+1), next_first);
        }
        if (sums_go_on) {
          arriving = writer.Allocate(Arena::kGrad, Rows(Source(o, 0)));
          AddMessage(transfer.sends, OuterPeer(-1), sum);
          AddMessage(transfer.recvs, OuterPeer(+1), arriving);
        }
        outer = writer.Post(std::move(transfer));
      }
      const RowSpan window_sum = BackwardWindow(writer, o, first);
      if (outer >= 0) writer.Wait(outer);
      if (sums_go_on) {
        AddArrived(writer, arriving, o == 0, window_sum);
        writer.Free(arriving);
        writer.Free(sum);
      }
      writer.Free(first);
      first = next_first;
      sum = window_sum;
    }
    return writer.Finish();
  }

  // All inner steps of a window that starts with the keys at `first`. Returns where the node's sum
  // of gradients for the keys of Source(o, 0) is; nowhere when those are this rank's own.
  RowSpan BackwardWindow(ProgramWriter& writer, int o, const RowSpan& first) {
    RowSpan held = first, finished;
    for (int s = window_ - 1; s >= 0; --s) {
      const bool own = o == 0 && s == 0;
      const bool keys_go_on = s > 0 && !(o == 0 && s == 1), sums_go_on = s < window_ - 1;
      const int source = Source(o, s);
      ComputeStep step = Step(source, held);
      const bool sees = step.pairs > 0;
      RowSpan next, share, arriving;
      if (!own) share = writer.Allocate(Arena::kGrad, Rows(source));
      int32_t hop = -1;
      if (keys_go_on || sums_go_on) {
        Transfer transfer;
        if (keys_go_on) {
          next = writer.Allocate(Arena::kWork, Rows(Source(o, s - 1)));
          AddMessage(transfer.sends, InnerPeer(-1), held);
          AddMessage(transfer.recvs, InnerPeer(+1), next);
        }
        if (sums_go_on) {
          // Where this rank has nothing to add, the sum arrives where it is passed on from.
          arriving = own || sees ? writer.Allocate(Arena::kGrad, Rows(source)) : share;
          AddMessage(transfer.sends, InnerPeer(-1), finished);
          AddMessage(transfer.recvs, InnerPeer(+1), arriving);
        }
        hop = writer.Post(std::move(transfer));
      }
      if (!own && (sees || !sums_go_on)) writer.Zero(share);
      if (!own && sees) {
        step.grads = {share.arena, Pieces(source, share)};
        SortPieces(step.grads.pieces);
      }
      writer.Compute(std::move(step));
      if (hop >= 0) writer.Wait(hop);
      if (sums_go_on) {
        if (own || sees) {
          AddArrived(writer, arriving, own, share);
          writer.Free(arriving);
        }
        writer.Free(finished);
      }
      finished = share;
      if (s < window_ - 1) writer.Free(held);
      held = next;
    }
    return finished;
  }

  void AddArrived(ProgramWriter& writer, const RowSpan& arrived, bool home,
                  const RowSpan& to) const {
    if (home) {
      writer.AddHome({arrived.arena, Pieces(rank_, arrived)});
    } else {
      writer.AddSpan(arrived, to);
    }
  }

  const ContextDemand& demand_;
  const StepMaker steps_;
  const int rank_, window_, nodes_;
  const bool with_masks_;
  std::vector<std::optional<ComputeStep>> made_;  // by source, without pieces
};

}  // namespace

Programs WriteRing(const ContextDemand& demand, int rank, int window, bool with_masks) {
  return RingWriter(demand, rank, window, with_masks).Write();
}

}  // namespace longspan::parallel::internal
