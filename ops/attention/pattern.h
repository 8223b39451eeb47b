#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longspan::ops {

// Which tokens a layer lets attend to which, before documents are known. Plain data, comparable, so
// that masks can be cached by (pattern, documents). docs/attention.md has the formulas with
// pictures, densities and papers.
//
// Within one document that starts at token s of its row (s = 0 for formulas), for a query q and a
// key k. With I = q / B and J = k / B, blocks of B = block_size tokens of the row's grid; J0 is the
// block that holds the document's first token:
//   kFull             always
//   kCausal           k <= q
//   kWindow           k <= q and (q - k < window or k < sinks);
//                     bidirectional: |q - k| < window or k < sinks
//   kS2               k <= q and (I - J < local_blocks
//                                 or (J - O + h * head_step + head_offset) mod stride_blocks == 0)
//                     for kv head h, O = J0 (phase kDocument) or 0 (phase kRow). The last
//                     `dense_heads` kv heads see everything causal. [arXiv 2407.17678]
//   kGlobalWindow     |q - k| < window or k < global_tokens or q < global_tokens; and k <= q unless
//                     bidirectional [arXiv 2004.05150]
//   kPower            k <= q and with D = I - J: D < local_blocks or D is a power of two or
//                     J - J0 < sink_blocks [arXiv 2503.03588]
//   kDilated          k <= q and (I - J) mod dilation == 0 and (I - J) / dilation < neighbours;
//                     bidirectional: the same of |I - J|, without k <= q [arXiv 2209.15001]
//   kPrefix           k <= q or k < prefix
//   kSharedQuestion   k <= q and (segment(k) == 0 or segment(k) == segment(q))
//   kCausalBlockwise  k <= q and (segment(k) == segment(q) or segment(q) is the document's last)
//   kBlockCausal      J <= I
//   kRandomBlocks     k <= q unless bidirectional, and (own_block and I == J or
//                     PairHash(key, R(I - O), C(J - O)) < density * 2^32), see visible.h; R and C
//                     number tiles of whole blocks
//   kSpans            k <= q and (q - k < window or k < sinks) with the values of the kv head
// Segments are numbered from the document's start; the length of the last one that is given repeats
// to the document's end.
enum class PatternKind {
  kFull,
  kCausal,
  kWindow,
  kS2,
  kGlobalWindow,
  kPower,
  kDilated,
  kPrefix,
  kSharedQuestion,
  kCausalBlockwise,
  kBlockCausal,
  kRandomBlocks,
  kSpans,
};
// Where blocks are counted from when their number matters: the block that holds the document's
// first token, or block 0 of the row.
enum class StridePhase { kDocument, kRow };

// Every block_size is in tokens, a power of two from 16 to 2^24.
struct S2Options {
  int64_t block_size = 64;
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

struct PowerOptions {
  int64_t block_size = 64;
  int64_t local_blocks = 1;  // includes the diagonal block; >= 1
  int64_t sink_blocks = 1;   // first blocks of the document; >= 0
  bool operator==(const PowerOptions&) const = default;
};

struct DilatedOptions {
  int64_t block_size = 64;
  int64_t neighbours = 1;  // blocks on each side, the own one included; >= 1
  int64_t dilation = 1;    // blocks from one to the next; >= 1
  bool bidirectional = false;
  bool operator==(const DilatedOptions&) const = default;
};

struct RandomBlocksOptions {
  int64_t block_size = 64;
  double density = 0.1;     // share of tiles that are visible, in (0, 1]
  int64_t seed = 0;         // >= 0
  int64_t mean_blocks = 1;  // of a tile, along queries and along keys; >= 1
  int64_t min_blocks = 1;   // of a tile; from 1 to mean_blocks, which makes all tiles equal. The
                            // largest has as many more than the mean as the smallest has fewer
  bool bidirectional = false;
  bool per_head = false;  // every kv head draws its own
  bool own_block = true;  // every block sees itself, whatever was drawn
  StridePhase phase = StridePhase::kDocument;
  bool operator==(const RandomBlocksOptions&) const = default;
};

// What one kv head of kSpans sees.
struct HeadSpan {
  int64_t window = 0;  // tokens, the query included; 0: everything causal, then sinks must be 0
  int64_t sinks = 0;   // tokens, >= 0
  bool operator==(const HeadSpan&) const = default;
};

struct AttentionPattern {
  PatternKind kind = PatternKind::kCausal;
  int64_t window = 0;          // kWindow, kGlobalWindow: tokens, >= 1, counts the query itself
  int64_t sinks = 0;           // kWindow: tokens, >= 0
  bool bidirectional = false;  // kWindow, kGlobalWindow
  int64_t global_tokens = 0;   // kGlobalWindow: >= 0
  int64_t prefix = 0;          // kPrefix: tokens, >= 0
  int64_t block_size = 0;      // kBlockCausal
  S2Options s2{};
  PowerOptions power{};
  DilatedOptions dilated{};
  RandomBlocksOptions random{};
  std::vector<int64_t> segment_ends{};  // kSharedQuestion, kCausalBlockwise: ascending, in tokens
  std::vector<HeadSpan> spans{};        // kSpans: one for each kv head
  bool operator==(const AttentionPattern&) const = default;

  static AttentionPattern Full();
  static AttentionPattern Causal();
  static AttentionPattern Window(int64_t window, int64_t sinks = 0, bool bidirectional = false);
  static AttentionPattern S2(const S2Options& s2);
  static AttentionPattern GlobalWindow(int64_t window, int64_t global_tokens,
                                       bool bidirectional = false);
  static AttentionPattern Power(const PowerOptions& power);
  static AttentionPattern Dilated(const DilatedOptions& dilated);
  static AttentionPattern Prefix(int64_t prefix);
  // `lengths` of the segments, in tokens, each >= 1.
  static AttentionPattern SharedQuestion(const std::vector<int64_t>& lengths);
  static AttentionPattern CausalBlockwise(const std::vector<int64_t>& lengths);
  static AttentionPattern BlockCausal(int64_t block_size);
  static AttentionPattern RandomBlocks(const RandomBlocksOptions& random);
  static AttentionPattern Spans(std::vector<HeadSpan> spans);

  // All problems of this pattern with `kv_heads` heads, each one sentence that names the field and
  // what would be right; empty when usable. The S2 heads must together cover every residue of the
  // stride (sparse heads with head_step 1 need stride_blocks <= their number, or a dense head)
  // unless the pattern is homogeneous or allows incomplete coverage.
  std::vector<std::string> Problems(int64_t kv_heads) const;
  // Whether some query may see a later key: such a layer shows a token the one it is to predict.
  bool LooksAhead() const;
  // Effective head_step (resolves the default).
  int64_t HeadStep(int64_t kv_heads) const;
  // Share of the stride's residues that the union of heads covers, in (0, 1]; 1 for other kinds.
  double Coverage(int64_t kv_heads) const;
  std::string ToString() const;  // "s2 block 64 local 4 stride 4"
};

}  // namespace longspan::ops
