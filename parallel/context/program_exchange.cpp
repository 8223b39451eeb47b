// Exchange of needed pieces straight from their owners, in groups of which the next one is in
// flight while one computes. Where several ranks of another node need a piece, it crosses once and
// is forwarded one transfer later; gradients go back over the same way, summed where it forked.
#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "parallel/context/exchange_routes.h"
#include "parallel/context/program_writer.h"

namespace longspan::parallel::internal {
namespace {

// The pieces of one message: per head pattern, ascending blocks.
struct Parcel {
  int peer = 0;
  std::vector<std::vector<int32_t>> blocks;
  int64_t rows = 0;
};

// A group of keys as this rank takes part in it; parcels ascend by peer.
struct Group {
  std::vector<Parcel> in, out;                  // from owners, and to ranks that owners send to
  std::vector<Parcel> in_forward, out_forward;  // inside the node: from, and as, who forwards
  int64_t pairs = 0;
  ComputeStep step{};  // without pieces
};

int64_t RowsOf(const std::vector<Parcel>& parcels) {
  int64_t rows = 0;
  for (const Parcel& parcel : parcels) rows += parcel.rows;
  return rows;
}

// When groups travel and compute in one pass.
struct Schedule {
  std::vector<size_t> order;      // of computing
  std::vector<int> fetch, ready;  // [group] transfer that leaves the owner; that completes it
  int transfers = 0;
};

// Transfers of keys under way in one pass.
struct Fetch {
  struct Buffers {
    RowSpan in, forward;  // parcels one after another
  };
  std::vector<Buffers> buffers;             // [group]
  std::vector<int32_t> posted;              // [transfer] index in the program
  std::vector<std::vector<RowSpan>> temps;  // [transfer] freed when it is done
  int waited = 0;
};

class ExchangeWriter {
 public:
  ExchangeWriter(const ContextDemand& demand, const ExchangeRoutes& routes, int rank,
                 bool with_masks)
      : demand_(demand),
        routes_(routes),
        rank_(rank),
        with_masks_(with_masks),
        remote_(static_cast<size_t>(routes.groups())),
        groups_(remote_ + (routes.neighbours() ? 1 : 0)) {
    CollectIn();
    CollectOut();
    if (routes.forwards()) CollectForwards();
    const StepMaker maker(demand, rank, with_masks);
    own_ = maker.OwnStep();
    for (Group& group : groups_) group.step = maker.Step(KeysOf(group), group.pairs);
  }

  Program Forward();
  Program Backward();

 private:
  // Partial gradients of a group, on the way to who forwarded the keys, then to their owners.
  struct Sums {
    RowSpan forward, in;            // partial, as Fetch::Buffers
    RowSpan from_forward, from_in;  // arriving from neighbours, and from those we sent keys to
  };
  // Sums under way: of the group computed last the first hop (to who forwarded the keys, or home),
  // of the one before the second (home).
  struct Flight {
    std::vector<Sums> sums;  // [group]
    int32_t transfer = -1;
    std::optional<size_t> first_hop, second_hop;
  };

  bool Relayed(size_t g) const { return g < remote_ && routes_.forwards(); }
  size_t GroupOf(int rank, int owner) const {
    const int unit = routes_.unit_of(rank);
    return unit == routes_.unit_of(owner) ? remote_
                                          : static_cast<size_t>(routes_.group_of(unit, owner));
  }
  int64_t RowsOfBlocks(int64_t pattern, const std::vector<int32_t>& blocks) const {
    int64_t tokens = 0;
    const int64_t row_length = demand_.placement().row_length();
    for (const int32_t block : blocks) tokens += ops::BlockTokens(row_length, block);
    return tokens * demand_.heads_of(pattern);
  }
  std::vector<Parcel> Parcels(std::map<int, std::vector<std::vector<int32_t>>>&& by_peer) const;

  void CollectIn();
  void CollectOut();
  void CollectForwards();
  ops::BlockList KeysOf(const Group& group) const;
  void AppendPieces(const Parcel& parcel, int64_t row, std::vector<Piece>& to) const;
  std::vector<Piece> PiecesOf(const std::vector<Parcel>& parcels, int64_t row) const;
  // What a group brings, by (kv head, block), with the rows of both kinds of parcels.
  PieceList PiecesOf(const Group& group, const RowSpan& in, const RowSpan& forward) const;
  std::vector<RowMove> MovesBetween(const std::vector<Parcel>& forwards, int64_t forward_row,
                                    const std::vector<Parcel>& in, int64_t in_row,
                                    bool to_in) const;

  Schedule MakeSchedule(bool backward) const;
  // Posts transfer `t` of keys. Owners leave out ranks that `skip` says keep theirs.
  void PostFetch(ProgramWriter& writer, const Schedule& schedule, bool backward, Fetch& fetch,
                 int t) const;
  void PackOut(ProgramWriter& writer, const Group& group, bool backward, Transfer& transfer,
               PieceList& pack, std::vector<RowSpan>& temps) const;
  void PostForward(ProgramWriter& writer, const Group& group, const Fetch::Buffers& buffers,
                   Transfer& transfer, std::vector<RowSpan>& temps) const;
  // Waits for the keys of a group; keeps one transfer of keys in flight.
  void AwaitKeys(ProgramWriter& writer, const Schedule& schedule, bool backward, Fetch& fetch,
                 int ready) const;
  ComputeStep WithKeys(size_t g, const Fetch::Buffers& buffers) const;
  std::pair<ComputeStep, ComputeStep> SplitOwn() const;

  void AddParcels(Transfer& transfer, const std::vector<Parcel>& sends, const RowSpan& from,
                  const std::vector<Parcel>& recvs, const RowSpan& to) const;
  void Depart(ProgramWriter& writer, Flight& flight, std::optional<size_t> g) const;
  void Settle(ProgramWriter& writer, Flight& flight) const;
  void SettleForwarded(ProgramWriter& writer, size_t g, Sums& sums) const;
  void SettleHome(ProgramWriter& writer, size_t g, Sums& sums) const;

  const ContextDemand& demand_;
  const ExchangeRoutes& routes_;
  const int rank_;
  const bool with_masks_;
  const size_t remote_;  // groups from other units; behind them the one of neighbours
  std::vector<Group> groups_;
  ComputeStep own_;
  std::vector<Fetch::Buffers> kept_;  // of the forward pass, when this rank keeps
  int64_t kept_rows_ = 0;
};

// ---- who sends what ---------------------------------------------------------------------------

std::vector<Parcel> ExchangeWriter::Parcels(
    std::map<int, std::vector<std::vector<int32_t>>>&& by_peer) const {
  std::vector<Parcel> parcels;
  for (auto& [peer, blocks] : by_peer) {
    Parcel parcel{peer, std::move(blocks), 0};
    for (size_t p = 0; p < parcel.blocks.size(); ++p) {
      std::sort(parcel.blocks[p].begin(), parcel.blocks[p].end());
      parcel.rows += RowsOfBlocks(static_cast<int64_t>(p), parcel.blocks[p]);
    }
    if (parcel.rows > 0) parcels.push_back(std::move(parcel));
  }
  return parcels;
}

void ExchangeWriter::CollectIn() {
  const auto patterns = static_cast<size_t>(demand_.patterns());
  using ByPeer = std::map<int, std::vector<std::vector<int32_t>>>;
  std::vector<ByPeer> direct(groups_.size()), forwarded(groups_.size());
  for (int owner = 0; owner < routes_.ranks(); ++owner) {
    if (owner == rank_) continue;
    const bool neighbour = routes_.unit_of(owner) == routes_.unit_of(rank_);
    for (size_t p = 0; p < patterns; ++p) {
      const auto pattern = static_cast<int64_t>(p);
      const std::vector<int32_t> blocks = demand_.NeededFrom(rank_, owner, pattern);
      if (blocks.empty()) continue;
      const size_t g = GroupOf(rank_, owner);
      groups_[g].pairs += demand_.heads_of(pattern) * demand_.PairsBetween(pattern, rank_, owner);
      for (const int32_t block : blocks) {
        const int relay = neighbour ? rank_ : routes_.Relay(demand_, rank_, pattern, block);
        auto& lists = relay == rank_ ? direct[g][owner] : forwarded[g][relay];
        lists.resize(patterns);
        lists[p].push_back(block);
      }
    }
  }
  for (size_t g = 0; g < groups_.size(); ++g) {
    groups_[g].in = Parcels(std::move(direct[g]));
    groups_[g].in_forward = Parcels(std::move(forwarded[g]));
  }
}

void ExchangeWriter::CollectOut() {
  const auto patterns = static_cast<size_t>(demand_.patterns());
  std::vector<std::map<int, std::vector<std::vector<int32_t>>>> direct(groups_.size());
  for (int rank = 0; rank < routes_.ranks(); ++rank) {
    if (rank == rank_) continue;
    const bool neighbour = routes_.unit_of(rank) == routes_.unit_of(rank_);
    for (size_t p = 0; p < patterns; ++p) {
      const auto pattern = static_cast<int64_t>(p);
      for (const int32_t block : demand_.NeededFrom(rank, rank_, pattern)) {
        if (!neighbour && routes_.Relay(demand_, rank, pattern, block) != rank) continue;
        auto& lists = direct[GroupOf(rank, rank_)][rank];
        lists.resize(patterns);
        lists[p].push_back(block);
      }
    }
  }
  for (size_t g = 0; g < groups_.size(); ++g) groups_[g].out = Parcels(std::move(direct[g]));
}

// What this rank gets from other nodes and its neighbours need as well.
void ExchangeWriter::CollectForwards() {
  for (size_t g = 0; g < remote_; ++g) {
    std::map<int, std::vector<std::vector<int32_t>>> forwarded;
    for (const Parcel& parcel : groups_[g].in) {
      for (size_t p = 0; p < parcel.blocks.size(); ++p) {
        for (const int32_t block : parcel.blocks[p]) {
          for (int r = routes_.unit_begin(rank_); r < routes_.unit_end(rank_); ++r) {
            if (r == rank_ || !demand_.Needs(r, static_cast<int64_t>(p), block)) continue;
            forwarded[r].resize(parcel.blocks.size());
            forwarded[r][p].push_back(block);
          }
        }
      }
    }
    groups_[g].out_forward = Parcels(std::move(forwarded));
  }
}

// All blocks that some head gets in this group.
ops::BlockList ExchangeWriter::KeysOf(const Group& group) const {
  std::vector<int32_t> ids;
  if (!with_masks_) return {};
  for (const auto* parcels : {&group.in, &group.in_forward}) {
    for (const Parcel& parcel : *parcels) {
      for (const auto& blocks : parcel.blocks) ids.insert(ids.end(), blocks.begin(), blocks.end());
    }
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ops::BlockList::FromIds(*demand_.documents(), std::move(ids));
}

void ExchangeWriter::AppendPieces(const Parcel& parcel, int64_t row, std::vector<Piece>& to) const {
  if (!with_masks_) return;
  const int64_t row_length = demand_.placement().row_length();
  for (int64_t h = 0; h < demand_.kv_heads(); ++h) {
    for (const int32_t block : parcel.blocks[static_cast<size_t>(demand_.pattern_of(h))]) {
      to.push_back({static_cast<int32_t>(h), block, row});
      row += ops::BlockTokens(row_length, block);
    }
  }
}

std::vector<Piece> ExchangeWriter::PiecesOf(const std::vector<Parcel>& parcels, int64_t row) const {
  std::vector<Piece> pieces;
  for (const Parcel& parcel : parcels) {
    AppendPieces(parcel, row, pieces);
    row += parcel.rows;
  }
  return pieces;
}

PieceList ExchangeWriter::PiecesOf(const Group& group, const RowSpan& in,
                                   const RowSpan& forward) const {
  PieceList list{RowsOf(group.in) > 0 ? in.arena : forward.arena, PiecesOf(group.in, in.begin)};
  const std::vector<Piece> more = PiecesOf(group.in_forward, forward.begin);
  list.pieces.insert(list.pieces.end(), more.begin(), more.end());
  SortPieces(list.pieces);
  return list;
}

// For each piece of `forwards`, rows between its place there and its place among `in`, where the
// same piece lies once.
std::vector<RowMove> ExchangeWriter::MovesBetween(const std::vector<Parcel>& forwards,
                                                  int64_t forward_row,
                                                  const std::vector<Parcel>& in, int64_t in_row,
                                                  bool to_in) const {
  std::vector<Piece> places = PiecesOf(in, in_row);
  SortPieces(places);
  const auto before = [](const Piece& a, const Piece& b) {
    return std::tie(a.kv_head, a.block) < std::tie(b.kv_head, b.block);
  };
  std::vector<RowMove> moves;
  const int64_t row_length = demand_.placement().row_length();
  for (const Piece& piece : PiecesOf(forwards, forward_row)) {
    const auto at = std::lower_bound(places.begin(), places.end(), piece, before);
    LONGSPAN_CHECK(at != places.end() && at->kv_head == piece.kv_head && at->block == piece.block)
        << "exchange: block " << piece.block << " of kv head " << piece.kv_head
        << " is to be forwarded by rank " << rank_ << ", which does not get it";
    const int64_t tokens = ops::BlockTokens(row_length, piece.block);
    if (to_in) {
      moves.push_back({piece.row, at->row, tokens});
    } else {
      moves.push_back({at->row, piece.row, tokens});
    }
  }
  return moves;
}

// ---- keys -------------------------------------------------------------------------------------

// Forward: neighbours' keys are there first. Backward: they come last, beside the last forwarding,
// and are computed with while the sums of the last remote group travel.
Schedule ExchangeWriter::MakeSchedule(bool backward) const {
  Schedule s;
  const int remote = static_cast<int>(remote_), late = routes_.forwards() ? 1 : 0;
  const bool neighbours = groups_.size() > remote_;
  s.transfers = remote > 0 ? remote + late : (neighbours ? 1 : 0);
  for (int k = 0; k < remote; ++k) {
    s.order.push_back(static_cast<size_t>(k));
    s.fetch.push_back(k);
    s.ready.push_back(k + late);
  }
  if (neighbours) {
    s.order.insert(backward ? s.order.end() : s.order.begin(), remote_);
    s.fetch.push_back(backward ? s.transfers - 1 : 0);
    s.ready.push_back(s.fetch.back());
  }
  return s;
}

void ExchangeWriter::PackOut(ProgramWriter& writer, const Group& group, bool backward,
                             Transfer& transfer, PieceList& pack,
                             std::vector<RowSpan>& temps) const {
  std::vector<std::pair<const Parcel*, RowSpan>> packed;  // ranks that need the same share it
  for (const Parcel& parcel : group.out) {
    if (backward && routes_.keeps(parcel.peer)) continue;
    const auto same = std::find_if(packed.begin(), packed.end(), [&](const auto& other) {
      return other.first->rows == parcel.rows && other.first->blocks == parcel.blocks;
    });
    RowSpan span;
    if (same != packed.end()) {
      span = same->second;
    } else {
      span = writer.Allocate(Arena::kWork, parcel.rows);
      AppendPieces(parcel, span.begin, pack.pieces);
      packed.emplace_back(&parcel, span);
      temps.push_back(span);
    }
    AddMessage(transfer.sends, parcel.peer, span);
  }
}

void ExchangeWriter::PostForward(ProgramWriter& writer, const Group& group,
                                 const Fetch::Buffers& buffers, Transfer& transfer,
                                 std::vector<RowSpan>& temps) const {
  const RowSpan out = writer.Allocate(Arena::kWork, RowsOf(group.out_forward));
  temps.push_back(out);
  writer.Move({buffers.in.arena, out.arena,
               MovesBetween(group.out_forward, out.begin, group.in, buffers.in.begin,
                            /*to_in=*/false)});
  AddParcels(transfer, group.out_forward, out, group.in_forward, buffers.forward);
}

void ExchangeWriter::PostFetch(ProgramWriter& writer, const Schedule& schedule, bool backward,
                               Fetch& fetch, int t) const {
  const bool here = !(backward && routes_.keeps(rank_));  // keys are fetched to this rank
  const Arena arena = !backward && routes_.keeps(rank_) ? Arena::kKept : Arena::kWork;
  Transfer transfer;
  PieceList pack{Arena::kWork, {}};
  std::vector<RowSpan>& temps = fetch.temps.emplace_back();
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (schedule.fetch[g] != t) continue;
    PackOut(writer, groups_[g], backward, transfer, pack, temps);
    if (!here) continue;
    const RowSpan in = fetch.buffers[g].in = writer.Allocate(arena, RowsOf(groups_[g].in));
    AddParcels(transfer, {}, {}, groups_[g].in, in);
  }
  writer.Pack(std::move(pack));
  for (size_t g = 0; here && g < remote_; ++g) {
    if (!Relayed(g) || schedule.fetch[g] != t - 1) continue;
    fetch.buffers[g].forward = writer.Allocate(arena, RowsOf(groups_[g].in_forward));
    PostForward(writer, groups_[g], fetch.buffers[g], transfer, temps);
  }
  fetch.posted.push_back(writer.Post(std::move(transfer)));
}

void ExchangeWriter::AwaitKeys(ProgramWriter& writer, const Schedule& schedule, bool backward,
                               Fetch& fetch, int ready) const {
  for (; fetch.waited <= ready; ++fetch.waited) {
    const auto t = static_cast<size_t>(fetch.waited);
    writer.Wait(fetch.posted[t]);
    for (const RowSpan& span : fetch.temps[t]) writer.Free(span);
    if (fetch.waited + 1 < schedule.transfers) {
      PostFetch(writer, schedule, backward, fetch, fetch.waited + 1);
    }
  }
}

ComputeStep ExchangeWriter::WithKeys(size_t g, const Fetch::Buffers& buffers) const {
  const Group& group = groups_[g];
  ComputeStep step = group.step;
  if (step.pairs == 0) return step;
  step.keys = PiecesOf(group, buffers.in, buffers.forward);
  return step;
}

Program ExchangeWriter::Forward() {
  ProgramWriter writer(demand_, rank_, with_masks_);
  const Schedule schedule = MakeSchedule(/*backward=*/false);
  Fetch fetch;
  fetch.buffers.resize(groups_.size());
  if (schedule.transfers > 0) PostFetch(writer, schedule, false, fetch, 0);
  writer.Compute(own_);
  for (const size_t g : schedule.order) {
    AwaitKeys(writer, schedule, false, fetch, schedule.ready[g]);
    writer.Compute(WithKeys(g, fetch.buffers[g]));
    writer.Free(fetch.buffers[g].in);
    writer.Free(fetch.buffers[g].forward);
  }
  Program program = writer.Finish();
  if (routes_.keeps(rank_)) {
    kept_ = fetch.buffers;
    kept_rows_ = program.kept_rows;
  }
  return program;
}

// ---- gradients --------------------------------------------------------------------------------

// Parcels lie one after another in `from` and `to`.
void ExchangeWriter::AddParcels(Transfer& transfer, const std::vector<Parcel>& sends,
                                const RowSpan& from, const std::vector<Parcel>& recvs,
                                const RowSpan& to) const {
  int64_t at = 0;
  for (const Parcel& parcel : sends) {
    AddMessage(transfer.sends, parcel.peer, Part(from, at, parcel.rows));
    at += parcel.rows;
  }
  at = 0;
  for (const Parcel& parcel : recvs) {
    AddMessage(transfer.recvs, parcel.peer, Part(to, at, parcel.rows));
    at += parcel.rows;
  }
}

// Posts the first hop of group `g`, if any, and the second one of the group before.
void ExchangeWriter::Depart(ProgramWriter& writer, Flight& flight, std::optional<size_t> g) const {
  Transfer transfer;
  const auto home = [&](size_t which) {
    Sums& sums = flight.sums[which];
    const Group& group = groups_[which];
    sums.from_in = writer.Allocate(Arena::kGrad, RowsOf(group.out));
    AddParcels(transfer, group.in, sums.in, group.out, sums.from_in);
  };
  if (flight.second_hop.has_value()) home(*flight.second_hop);
  if (g.has_value() && Relayed(*g)) {
    Sums& sums = flight.sums[*g];
    const Group& group = groups_[*g];
    sums.from_forward = writer.Allocate(Arena::kGrad, RowsOf(group.out_forward));
    AddParcels(transfer, group.in_forward, sums.forward, group.out_forward, sums.from_forward);
  } else if (g.has_value()) {
    home(*g);
  }
  flight.first_hop = g;
  flight.transfer = writer.Post(std::move(transfer));
}

// Waits for what is under way and adds it up; what has one more hop to go is the second hop then.
void ExchangeWriter::Settle(ProgramWriter& writer, Flight& flight) const {
  if (flight.transfer < 0) return;
  writer.Wait(std::exchange(flight.transfer, -1));
  if (const auto g = std::exchange(flight.second_hop, std::nullopt)) {
    SettleHome(writer, *g, flight.sums[*g]);
  }
  const auto g = std::exchange(flight.first_hop, std::nullopt);
  if (g.has_value() && Relayed(*g)) {
    SettleForwarded(writer, *g, flight.sums[*g]);
    flight.second_hop = g;
  } else if (g.has_value()) {
    SettleHome(writer, *g, flight.sums[*g]);
  }
}

// Neighbours' shares of pieces that this rank forwarded to them join its own.
void ExchangeWriter::SettleForwarded(ProgramWriter& writer, size_t g, Sums& sums) const {
  const Group& group = groups_[g];
  writer.AddRows({Arena::kGrad, Arena::kGrad,
                  MovesBetween(group.out_forward, sums.from_forward.begin, group.in, sums.in.begin,
                               /*to_in=*/true)});
  writer.Free(sums.from_forward);
  writer.Free(sums.forward);
}

void ExchangeWriter::SettleHome(ProgramWriter& writer, size_t g, Sums& sums) const {
  writer.AddHome({Arena::kGrad, PiecesOf(groups_[g].out, sums.from_in.begin)});
  writer.Free(sums.from_in);
  writer.Free(sums.in);
}

// This rank's own keys in two parts of about equal work, as the backward pass takes them when it
// has to wait for keys: the first hides the first transfer, the second the last sums.
std::pair<ComputeStep, ComputeStep> ExchangeWriter::SplitOwn() const {
  const ops::BlockList& own = demand_.placement().blocks(rank_);
  if (own_.pairs == 0 || own.size() < 2) return {{}, own_};
  const auto whole = own_.mask != nullptr ? own_.mask : demand_.Mask(own, own);
  std::vector<int64_t> until{0};  // entries of the mask in the columns before
  for (int64_t j = 0; j < own.size(); ++j) {
    int64_t entries = 0;
    for (int64_t h = 0; h < demand_.kv_heads(); ++h) {
      for (const ops::BlockRun& run : whole->column_runs().Row(whole->pattern_of(h), j)) {
        entries += run.count;
      }
    }
    until.push_back(until.back() + entries);
  }
  const auto cut = std::lower_bound(until.begin(), until.end(), until.back() / 2) - until.begin();
  std::vector<int32_t> first(own.ids.begin(), own.ids.begin() + cut);
  std::vector<int32_t> second(own.ids.begin() + cut, own.ids.end());
  const auto mask = [&](std::vector<int32_t> ids) {
    return demand_.Mask(own, ops::BlockList::FromIds(*demand_.documents(), std::move(ids)));
  };
  std::pair<ComputeStep, ComputeStep> parts{own_, own_};
  const auto before = mask(std::move(first));
  parts.first.pairs = before->TotalVisiblePairs();
  parts.second.pairs = own_.pairs - parts.first.pairs;
  if (with_masks_) {
    parts.first.mask = before;
    parts.second.mask = mask(std::move(second));
  }
  return parts;
}

Program ExchangeWriter::Backward() {
  ProgramWriter writer(demand_, rank_, with_masks_);
  writer.SetKeptRows(kept_rows_);
  const Schedule schedule = MakeSchedule(/*backward=*/true);
  const bool fetched = !routes_.all_keep() && schedule.transfers > 0;
  Fetch fetch;
  fetch.buffers = routes_.keeps(rank_) ? kept_ : std::vector<Fetch::Buffers>(groups_.size());
  if (fetched) PostFetch(writer, schedule, true, fetch, 0);
  const bool waits = fetched && !routes_.keeps(rank_) &&
                     std::any_of(groups_.begin(), groups_.end(),
                                 [](const Group& group) { return group.step.pairs > 0; });
  auto [own_first, own_last] = waits ? SplitOwn() : std::pair(ComputeStep{}, own_);
  writer.Compute(std::move(own_first));

  Flight flight;
  flight.sums.resize(groups_.size());
  for (const size_t g : schedule.order) {
    if (fetched) AwaitKeys(writer, schedule, true, fetch, schedule.ready[g]);
    const Group& group = groups_[g];
    Sums& sums = flight.sums[g];
    sums.forward = writer.Allocate(Arena::kGrad, RowsOf(group.in_forward));
    sums.in = writer.Allocate(Arena::kGrad, RowsOf(group.in));
    writer.Zero(sums.forward);
    writer.Zero(sums.in);
    ComputeStep step = WithKeys(g, fetch.buffers[g]);
    if (step.pairs > 0) step.grads = PiecesOf(group, sums.in, sums.forward);
    writer.Compute(std::move(step));
    writer.Free(fetch.buffers[g].in);
    writer.Free(fetch.buffers[g].forward);
    Settle(writer, flight);
    Depart(writer, flight, g);
  }
  writer.Compute(std::move(own_last));
  Settle(writer, flight);
  if (flight.second_hop.has_value()) {
    Depart(writer, flight, std::nullopt);
    Settle(writer, flight);
  }
  return writer.Finish();
}

}  // namespace

Programs WriteExchange(const ContextDemand& demand, const ExchangeRoutes& routes, int rank,
                       bool with_masks) {
  ExchangeWriter writer(demand, routes, rank, with_masks);
  Program forward = writer.Forward();
  return {std::move(forward), writer.Backward()};
}

}  // namespace longspan::parallel::internal
