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
// The mask has these kv heads, as its heads 0, 1, ...; its keys are the union over heads of what is
// there, and a block that is visible to one of the heads is there for that head. Ranges of heads of
// two steps of a pass are equal or disjoint.
struct ComputeStep {
  std::shared_ptr<const ops::BlockMask>
      mask;  // null in programs of other ranks, made for forecasts
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
    kAddRows,  // moves[index]: rows are added, kGrad to kGrad, in the order of the list
    kAddHome,  // packs[index]: rows of kGrad are added to this rank's dk and dv, in list order
  };
  Op op;
  int32_t index;
};

namespace internal {
struct ProgramTables;  // executor.cpp
}

// What the executor derives from a program when it first runs it (tables of rows and of pieces, and
// their copies on GPUs), one for each number of kv heads and head_dim; shared by the layers and
// threads that run the program. A copy of the program starts without.
class ProgramCache {
 public:
  ProgramCache() = default;
  ProgramCache(const ProgramCache&) {}
  ProgramCache& operator=(const ProgramCache&) {
    const std::lock_guard lock(mutex_);
    tables_.clear();
    return *this;
  }
  using Key = std::pair<int64_t, int64_t>;  // kv heads of k and v, head_dim
  template <class Make>
  std::shared_ptr<const internal::ProgramTables> Get(Key key, const Make& make) const {
    const std::lock_guard lock(mutex_);
    for (const auto& [have, tables] : tables_) {
      if (have == key) return tables;
    }
    tables_.emplace_back(key, make());
    return tables_.back().second;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<Key, std::shared_ptr<const internal::ProgramTables>>> tables_;
};

// Without masks (ProgramBuilder::Build, for forecasts) all transfers, amounts of rows and pairs are
// there, but lists of pieces and moves are empty: such a program cannot run.
struct Program {
  std::shared_ptr<const ops::BlockList> own;  // this rank's blocks in local order; null: cannot run
  std::vector<Instruction> instructions;
  std::vector<Transfer> transfers;
  std::vector<ComputeStep> computes;
  std::vector<PieceList> packs;
  std::vector<RowMoves> moves;
  std::vector<RowSpan> spans;
  int64_t work_rows = 0, kept_rows = 0, grad_rows = 0;  // sizes of the arenas
  ProgramCache cache;

  int64_t SentRows(Arena arena) const;  // kGrad: rows of gradients; else those of kWork and kKept
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
// Floating-point operations of a step of `pairs` visible pairs over kv heads.
double StepFlops(int64_t pairs, const ProgramSizes& sizes);
Timeline MakeTimeline(const Program& program, const ProgramSizes& sizes);

}  // namespace longspan::parallel
