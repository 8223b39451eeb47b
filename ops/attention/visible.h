#pragma once
#include <cstdint>

#include "ops/core/device_code.h"

namespace longspan::ops {

// The only definition of who sees whom, for host and device. VisibleRule is AttentionPattern
// flattened for one micro-batch; MakeVisibleRule (block_mask.h) fills it. q and k are global token
// indices (documents.h). Everything else (BlockMask, kernels, balancing) must agree with this
// function, and tests compare with it; token_sets.h has its closed forms.
struct VisibleRule {
  int32_t kind;          // PatternKind
  int32_t s2_phase_row;  // 1: strides count from block 0 of the row
  int64_t row_length;    // tokens
  int64_t window;
  int64_t sinks;
  int64_t s2_block;      // tokens
  int64_t s2_local;      // blocks
  int64_t s2_stride;     // blocks
  int64_t s2_head_step;  // 0 when homogeneous
  int64_t s2_head_offset;
  int64_t s2_first_dense;    // kv heads >= this are dense
  const int32_t* doc_begin;  // [tokens], of Documents
};

LONGSPAN_HD inline bool Visible(const VisibleRule& r, int64_t kv_head, int64_t q, int64_t k) {
  const int64_t begin = r.doc_begin[q];
  if (begin != r.doc_begin[k]) return false;
  if (r.kind == 0) return true;  // kFull
  if (k > q) return false;
  if (r.kind == 1) return true;                                     // kCausal
  if (r.kind == 2) return q - k < r.window || k - begin < r.sinks;  // kWindow
  if (kv_head >= r.s2_first_dense) return true;                     // kS2
  const int64_t row = q / r.row_length * r.row_length;
  const int64_t qb = (q - row) / r.s2_block, kb = (k - row) / r.s2_block;
  if (qb - kb < r.s2_local) return true;
  const int64_t first = r.s2_phase_row ? 0 : (begin - row) / r.s2_block;
  return (kb - first + kv_head * r.s2_head_step + r.s2_head_offset) % r.s2_stride == 0;
}

}  // namespace longspan::ops
