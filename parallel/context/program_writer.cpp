#include "parallel/context/program_writer.h"

#include <algorithm>
#include <tuple>

namespace longspan::parallel::internal {

ProgramWriter::ProgramWriter(const ContextDemand& demand, int rank, bool with_masks)
    : with_masks_(with_masks) {
  if (with_masks) {
    program_.own = std::make_shared<const ops::BlockList>(demand.placement().blocks(rank));
  }
}

int64_t& ProgramWriter::SizeOf(Arena arena) {
  return arena == Arena::kWork   ? program_.work_rows
         : arena == Arena::kKept ? program_.kept_rows
                                 : program_.grad_rows;
}

RowSpan ProgramWriter::Allocate(Arena arena, int64_t rows) {
  std::vector<RowSpan>& live = live_[static_cast<size_t>(arena)];
  RowSpan span{arena, 0, rows};
  auto at = live.begin();
  for (; at != live.end() && at->begin < span.end; ++at) {
    span.begin = std::max(span.begin, at->end);
    span.end = span.begin + rows;
  }
  if (rows > 0) live.insert(at, span);
  SizeOf(arena) = std::max(SizeOf(arena), span.end);
  return span;
}

void ProgramWriter::Free(const RowSpan& span) {
  if (span.rows() == 0 || span.arena == Arena::kKept) return;
  std::vector<RowSpan>& live = live_[static_cast<size_t>(span.arena)];
  const auto at = std::find(live.begin(), live.end(), span);
  LONGSPAN_CHECK(at != live.end())
      << "ProgramWriter: rows " << span.begin << " to " << span.end << " were not given out";
  live.erase(at);
}

void ProgramWriter::Pack(PieceList pieces) {
  if (!with_masks_ || pieces.pieces.empty()) return;
  Add(Instruction::Op::kPack, program_.packs.size());
  program_.packs.push_back(std::move(pieces));
}

void ProgramWriter::Move(RowMoves moves) {
  if (!with_masks_ || moves.moves.empty()) return;
  Add(Instruction::Op::kMove, program_.moves.size());
  program_.moves.push_back(std::move(moves));
}

int32_t ProgramWriter::Post(Transfer transfer) {
  const size_t index = program_.transfers.size();
  Add(Instruction::Op::kPost, index);
  program_.transfers.push_back(std::move(transfer));
  return static_cast<int32_t>(index);
}

void ProgramWriter::Wait(int32_t transfer) {
  Add(Instruction::Op::kWait, static_cast<size_t>(transfer));
}

void ProgramWriter::Zero(const RowSpan& span) {
  if (span.rows() == 0) return;
  Add(Instruction::Op::kZero, program_.spans.size());
  program_.spans.push_back(span);
}

void ProgramWriter::Compute(ComputeStep step) {
  if (step.pairs == 0) return;
  Add(Instruction::Op::kCompute, program_.computes.size());
  program_.computes.push_back(std::move(step));
}

void ProgramWriter::AddRows(RowMoves moves) {
  if (!with_masks_ || moves.moves.empty()) return;
  Add(Instruction::Op::kAddRows, program_.moves.size());
  program_.moves.push_back(std::move(moves));
}

void ProgramWriter::AddSpan(const RowSpan& from, const RowSpan& to) {
  LONGSPAN_CHECK(from.rows() == to.rows())
      << "ProgramWriter: " << from.rows() << " rows added to " << to.rows();
  if (from.rows() > 0) AddRows({from.arena, to.arena, {{from.begin, to.begin, from.rows()}}});
}

void ProgramWriter::AddHome(PieceList pieces) {
  if (!with_masks_ || pieces.pieces.empty()) return;
  Add(Instruction::Op::kAddHome, program_.packs.size());
  program_.packs.push_back(std::move(pieces));
}

void AddMessage(std::vector<Message>& to, int peer, const RowSpan& span) {
  if (span.rows() > 0) to.push_back({peer, span});
}

void AppendShard(const ops::BlockList& blocks, int64_t head_begin, int64_t head_end, int64_t row,
                 std::vector<Piece>& to) {
  for (int64_t h = head_begin; h < head_end; ++h) {
    for (size_t i = 0; i < blocks.ids.size(); ++i) {
      to.push_back({static_cast<int32_t>(h), blocks.ids[i], row + blocks.token_begin[i]});
    }
    row += blocks.tokens();
  }
}

void SortPieces(std::vector<Piece>& pieces) {
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return std::tie(a.kv_head, a.block) < std::tie(b.kv_head, b.block);
  });
}

int64_t StepMaker::Pairs(int owner, int64_t head_begin, int64_t head_end) const {
  int64_t pairs = 0;
  for (int64_t h = head_begin; h < head_end; ++h) {
    pairs += demand_.PairsBetween(demand_.pattern_of(h), rank_, owner);
  }
  return pairs;
}

ComputeStep StepMaker::Step(const ops::BlockList& keys, int64_t pairs) const {
  ComputeStep step;
  step.head_end = demand_.kv_heads();
  step.pairs = pairs;
  if (with_masks_ && pairs > 0) step.mask = demand_.Mask(demand_.placement().blocks(rank_), keys);
  return step;
}

ComputeStep StepMaker::OwnStep() const {
  ComputeStep step = Step(demand_.placement().blocks(rank_), Pairs(rank_));
  step.own = true;
  return step;
}

}  // namespace longspan::parallel::internal
