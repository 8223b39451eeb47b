#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "parallel/context/builder.h"

// What the writers of programs share. Not for use outside parallel/context.
namespace longspan::parallel::internal {

// Appends instructions and gives out spans of the arenas. Spans of kWork and kGrad are reused once
// freed (first fit); those of kKept stay. What has no rows is left out.
class ProgramWriter {
 public:
  // Without `with_masks` lists of pieces and moves are dropped.
  ProgramWriter(const ContextDemand& demand, int rank, bool with_masks);

  bool with_masks() const { return with_masks_; }

  RowSpan Allocate(Arena arena, int64_t rows);
  void Free(const RowSpan& span);
  // For backward programs: what the forward program kept.
  void SetKeptRows(int64_t rows) { program_.kept_rows = rows; }

  void Pack(PieceList pieces);
  void Move(RowMoves moves);
  int32_t Post(Transfer transfer);
  void Wait(int32_t transfer);
  void Zero(const RowSpan& span);
  void Compute(ComputeStep step);
  void AddRows(RowMoves moves);
  // All rows of a span to those of another.
  void AddSpan(const RowSpan& from, const RowSpan& to);
  void AddHome(PieceList pieces);

  Program Finish() { return std::move(program_); }

 private:
  void Add(Instruction::Op op, size_t index) {
    program_.instructions.push_back({op, static_cast<int32_t>(index)});
  }
  int64_t& SizeOf(Arena arena);

  const bool with_masks_;
  Program program_;
  std::array<std::vector<RowSpan>, 3> live_;  // by arena, ascending
};

// A message, unless it has no rows.
void AddMessage(std::vector<Message>& to, int peer, const RowSpan& span);

// The first `rows` rows of a span, or those from `begin` on.
inline RowSpan Part(const RowSpan& span, int64_t begin, int64_t rows) {
  return {span.arena, span.begin + begin, span.begin + begin + rows};
}

// All pieces of `blocks` for kv heads [head_begin, head_end): head by head, the blocks in their
// order, from `row` on. Appends.
void AppendShard(const ops::BlockList& blocks, int64_t head_begin, int64_t head_end, int64_t row,
                 std::vector<Piece>& to);
// By (kv head, block), as kernels find them.
void SortPieces(std::vector<Piece>& pieces);

// The masks and amounts of work of one rank.
class StepMaker {
 public:
  StepMaker(const ContextDemand& demand, int rank, bool with_masks)
      : demand_(demand), rank_(rank), with_masks_(with_masks) {}

  // Pairs of this rank with the keys of `owner`, over kv heads [head_begin, head_end).
  int64_t Pairs(int owner, int64_t head_begin, int64_t head_end) const;
  int64_t Pairs(int owner) const { return Pairs(owner, 0, demand_.kv_heads()); }
  // A step of all kv heads against `keys`; no pieces yet, and no mask where there are no pairs.
  ComputeStep Step(const ops::BlockList& keys, int64_t pairs) const;
  ComputeStep OwnStep() const;

 private:
  const ContextDemand& demand_;
  const int rank_;
  const bool with_masks_;
};

Programs WriteRing(const ContextDemand& demand, int rank, int window, bool with_masks);
Programs WriteAllGather(const ContextDemand& demand, int64_t head_groups, int rank,
                        bool with_masks);

}  // namespace longspan::parallel::internal
