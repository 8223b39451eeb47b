#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/attention/kv_view.h"
#include "ops/attention/tasks.h"
#include "ops/core/device_code.h"

// BlockMask and KvTable as kernels read them: plain structs with pointers, taken by value. No CUDA
// header is needed, so the accessors are tested on the host with arrays in host memory.
namespace longspan::ops {

// Steps through the blocks of the other axis that one block meets: FULL ones first, then PARTIAL.
class EntryCursor {
 public:
  LONGSPAN_HD EntryCursor(const BlockRun* begin, const BlockRun* end) : run_(begin), end_(end) {}
  LONGSPAN_HD bool done() const { return run_ == end_; }
  LONGSPAN_HD int32_t block() const { return run_->first + at_ * run_->step; }  // global id
  LONGSPAN_HD bool partial() const { return run_->partial != 0; }
  LONGSPAN_HD void Next() {
    if (++at_ == run_->count) {
      ++run_;
      at_ = 0;
    }
  }

  // Next() n times; stays at the end.
  LONGSPAN_HD void Skip(int32_t n) {
    for (at_ += n; run_ != end_ && at_ >= run_->count; ++run_) at_ -= run_->count;
  }

 private:
  const BlockRun* run_;
  const BlockRun* end_;
  int32_t at_ = 0;  // in the run
};

// Query blocks (rows) or key blocks (columns) in local storage order.
struct DeviceAxis {
  int64_t blocks;
  const int32_t* ids;          // [blocks], global
  const int64_t* token_begin;  // [blocks + 1], local token offsets
  const int64_t* offsets;      // [patterns * blocks + 1] into runs
  const BlockRun* runs;
  const BlockTask* tasks;  // [tasks()], those with most entries first
  int64_t task_count;      // kv heads x blocks
  int64_t busy_tasks;      // how many of them, the first ones, have an entry
};

struct DeviceMask {
  VisibleRule rule;  // with pointers into the device
  int64_t kv_heads, patterns, blocks_per_row;
  const int32_t* pattern_of;   // [kv_heads]
  const int32_t* rule_head;    // [kv_heads]: the head to ask `rule` with
  const int64_t* query_begin;  // [rows of the micro-batch * blocks_per_row] by id: local token
                               // offset in queries(), -1 for blocks that are not there
  DeviceAxis rows, columns;

  LONGSPAN_HD EntryCursor Entries(const DeviceAxis& axis, BlockTask task) const {
    const int64_t row = pattern_of[task.kv_head] * axis.blocks + task.index;
    return {axis.runs + axis.offsets[row], axis.runs + axis.offsets[row + 1]};
  }
  // Global index of a block's first token, and the number of its tokens.
  LONGSPAN_HD int64_t FirstToken(int32_t id) const {
    return id / blocks_per_row * rule.row_length + id % blocks_per_row * kMaskBlock;
  }
  LONGSPAN_HD int32_t Tokens(int32_t id) const {
    const int64_t rest = rule.row_length - id % blocks_per_row * kMaskBlock;
    return static_cast<int32_t>(rest < kMaskBlock ? rest : kMaskBlock);
  }
  LONGSPAN_HD int64_t QueryBegin(int32_t id) const { return query_begin[id]; }
  // q and k are global token indices.
  LONGSPAN_HD bool Sees(int64_t kv_head, int64_t q, int64_t k) const {
    return Visible(rule, rule_head[kv_head], q, k);
  }
};

// Where the key blocks of a KvView or KvGradView lie.
struct DeviceKvTable {
  int64_t token_stride;  // elements
  int64_t first_block, blocks;
  const int64_t* offsets;  // [kv_heads, blocks], elements
  LONGSPAN_HD int64_t Offset(int64_t kv_head, int32_t id) const {
    return offsets[kv_head * blocks + id - first_block];
  }
};

// Documents' [tokens] arrays.
struct DocumentArrays {
  const int32_t* begin;
  const int32_t* end;
};

// All arrays of a mask one after another, each at 16 bytes, as they are uploaded.
class FlatMask {
 public:
  explicit FlatMask(const BlockMask& mask);
  const std::vector<std::byte>& bytes() const { return bytes_; }
  // The mask whose arrays are a copy of bytes() at `base`.
  DeviceMask At(const void* base, DocumentArrays documents) const;

 private:
  struct Axis {
    int64_t blocks = 0, task_count = 0, busy_tasks = 0;
    size_t ids = 0, token_begin = 0, offsets = 0, runs = 0, tasks = 0;  // byte offsets
  };
  Axis AddAxis(const BlockMask& mask, const BlockList& list, const BlockRuns& runs);
  template <class T>
  size_t Add(const std::vector<T>& values);

  std::vector<std::byte> bytes_;
  VisibleRule rule_;
  int64_t kv_heads_, patterns_, blocks_per_row_;
  size_t pattern_of_ = 0, rule_head_ = 0, query_begin_ = 0, segment_ends_ = 0, spans_ = 0;
  Axis rows_, columns_;
};

// The same on the GPU of `ctx`: uploaded in stream order at the first call, then kept with the mask
// (the table) for later calls of any layer. The pointers are good for all work that `ctx` enqueues
// while the mask (the table) lives.
const DeviceMask& OnDevice(Context& ctx, const BlockMask& mask);
const DeviceKvTable& OnDevice(Context& ctx, const KvTable& table);

}  // namespace longspan::ops
