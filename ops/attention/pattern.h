#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longspan::ops {

// Which tokens a layer lets attend to which, before documents are known. Plain data, comparable, so
// that masks can be cached by (pattern, documents).
//
// Within one document that starts at token s (s = 0 for formulas), for a query q and a key k:
//   kFull    always
//   kCausal  k <= q
//   kWindow  k <= q and (q - k < window or k < sinks)                (k counted from s)
//   kS2      k <= q and, with I = q / B, J = k / B in blocks of the row's grid,
//            I - J < local_blocks   or   (J - J0 + h * head_step + head_offset) mod stride == 0
//            where h is the kv head, J0 the block that holds the document's first token
//            (phase kDocument) or block 0 of the row (phase kRow). [S2-Attention, arXiv
//            2407.17678.] The last `dense_heads` kv heads see everything causal.
enum class PatternKind { kFull, kCausal, kWindow, kS2 };
enum class StridePhase { kDocument, kRow };

struct S2Options {
  int64_t block_size = 64;    // tokens; power of two >= 16
  int64_t local_blocks = 1;   // includes the diagonal block; >= 1
  int64_t stride_blocks = 1;  // >= 1; 1 is plain causal
  bool homogeneous = false;   // every head uses h = 0; forbids dense_heads
  int64_t head_step = 0;      // 0: the default, max(1, stride_blocks / kv heads)
  int64_t head_offset = 0;
  int64_t dense_heads = 0;  // kv heads, the last ones
  bool allow_incomplete_coverage = false;
  StridePhase phase = StridePhase::kDocument;
  bool operator==(const S2Options&) const = default;
};

struct AttentionPattern {
  PatternKind kind = PatternKind::kCausal;
  int64_t window = 0;  // kWindow: tokens, >= 1, counts the query itself
  int64_t sinks = 0;   // kWindow: tokens, >= 0
  S2Options s2{};      // kS2
  bool operator==(const AttentionPattern&) const = default;

  static AttentionPattern Full() { return {.kind = PatternKind::kFull}; }
  static AttentionPattern Causal() { return {}; }
  static AttentionPattern Window(int64_t window, int64_t sinks = 0) {
    return {.kind = PatternKind::kWindow, .window = window, .sinks = sinks};
  }
  static AttentionPattern S2(const S2Options& s2) { return {.kind = PatternKind::kS2, .s2 = s2}; }

  // All problems of this pattern with `kv_heads` heads, each one sentence that names the field and
  // what would be right; empty when usable. The S2 heads must together cover every residue of the
  // stride (sparse heads with head_step 1 need stride_blocks <= their number, or a dense head)
  // unless the pattern is homogeneous or allows incomplete coverage.
  std::vector<std::string> Problems(int64_t kv_heads) const;
  // Effective head_step (resolves the default).
  int64_t HeadStep(int64_t kv_heads) const;
  // Share of the stride's residues that the union of heads covers, in (0, 1]; 1 for other kinds.
  double Coverage(int64_t kv_heads) const;
  std::string ToString() const;  // "s2 block 64 local 4 stride 4"
};

}  // namespace longspan::ops
