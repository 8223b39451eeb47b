#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "ops/attention/block_mask.h"
#include "parallel/context/timeline.h"

namespace longspan::parallel {

// What one rank does for one pass (forward or backward) of attention whose queries stay at home:
// pure data, the same list of transfers on every rank. The executor (executor.h) runs it and knows
// nothing of masks, placements and strategies; Timelines for forecasts come from the same list.
//
// Memory is counted in rows: one row is K and V (in kGrad dK and dV) of one token of one kv head,
// [2, head_dim] side by side, so that plans depend on neither head_dim nor dtype. A piece is one
// key block of one kv head: as many rows as the block has tokens, one after another. Messages are
// whole spans of rows.
enum class Arena : uint8_t {
  kWork,  // of this pass alone; dtype of k
  kKept,  // forward: stays until the backward pass, which finds it as the forward pass left it
  kGrad,  // backward: partial dK and dV, f32 (f64)
};

struct RowSpan {
  Arena arena = Arena::kWork;
  int64_t begin = 0, end = 0;
  int64_t rows() const { return end - begin; }
  bool operator==(const RowSpan&) const = default;
};

struct Piece {
  int32_t kv_head = 0, block = 0;
  int64_t row = 0;  // of its first token, in the arena of the list
  bool operator==(const Piece&) const = default;
};
struct PieceList {
  Arena arena = Arena::kWork;
  std::vector<Piece> pieces;
};

struct Message {
  int peer = 0;
  RowSpan span;
};
// One Communicator::Exchange. Messages of no rows are left out on both sides.
struct Transfer {
  std::vector<Message> sends, recvs;
};

struct RowMove {
  int64_t from = 0, to = 0, rows = 0;
};
struct RowMoves {
  Arena from = Arena::kWork, to = Arena::kWork;
  std::vector<RowMove> moves;
};

// This rank's queries against some keys, for kv heads [head_begin, head_end) and their query heads.
// The mask has all kv heads; its keys are the union over heads of what is there, and a block that
// is visible to one of the heads is there for that head.
struct ComputeStep {
  std::shared_ptr<const ops::BlockMask> mask;  // null in programs of other ranks, made for forecasts
  int64_t head_begin = 0, head_end = 0;
  int64_t pairs = 0;  // visible (query, key) pairs over these kv heads
  bool own = false;   // keys and values are this rank's k and v, gradients its dk and dv
  PieceList keys{};   // otherwise; sorted by (kv_head, block)
  PieceList grads{};  // backward: where their gradients are added, the same pieces in kGrad
};

// The order of instructions is the order of execution. kPost starts a transfer, which is in flight
// until its kWait; spans of a transfer in flight are not touched in between.
struct Instruction {
  enum class Op : uint8_t {
    kPack,     // packs[index]: pieces of this rank's k and v are copied to the list's arena
    kMove,     // moves[index]: rows are copied
    kPost,     // transfers[index]
    kWait,     // transfers[index]
    kZero,     // spans[index] becomes 0
    kCompute,  // computes[index]
    kAddRows,  // moves[index]: rows are added, kGrad to kGrad
    kAddHome,  // packs[index]: rows of kGrad are added to this rank's dk and dv
  };
  Op op;
  int32_t index;
};

struct Program {
  std::vector<Instruction> instructions;
  std::vector<Transfer> transfers;
  std::vector<ComputeStep> computes;
  std::vector<PieceList> packs;
  std::vector<RowMoves> moves;
  std::vector<RowSpan> spans;
  int64_t work_rows = 0, kept_rows = 0, grad_rows = 0;  // sizes of the arenas

  int64_t SentRows(Arena arena) const;  // kGrad: rows of gradients; kWork: those of kWork and kKept
  int64_t ReceivedRows(Arena arena) const;
  int64_t VisiblePairs() const;  // over kv heads
};

// Sizes that turn a program into bytes and floating-point operations.
struct ProgramSizes {
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  int64_t key_bytes = 0;   // of one element of k
  int64_t grad_bytes = 0;  // of one element of a partial gradient
  bool backward = false;   // 10 instead of 4 operations a pair, query head and element
};
Timeline MakeTimeline(const Program& program, const ProgramSizes& sizes);

}  // namespace longspan::parallel
