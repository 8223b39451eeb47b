#pragma once
#include <memory>
#include <string>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/routed_attention.h"

namespace longspan::ops {

// Mixture of block attention (MoBA, arXiv 2502.13189). Query head h of token t attends, in one
// softmax, to
//   the tokens up to t of its own block, and
//   all tokens of the top_k - 1 earlier blocks J with the largest gate  q[t, h] . mean(K of J).
// Each query head chooses for itself, with the keys of its kv head. Blocks are those of the row's
// grid, cut by documents (router.h); the mean is that of the part inside t's document. The gate is
// unscaled, in f32 (f64), reads q and k as attention does (after RoPE), and is not differentiated:
// gradients reach q, k and v through the attention to what was chosen. With fewer earlier blocks
// than top_k - 1 all are taken: top_k >= their number + 1 is causal attention. top_k = 1 is causal
// attention inside each block.
struct MobaOptions {
  int64_t block_size = 512;  // tokens, a multiple of 64 up to 2^31
  int64_t top_k = 4;         // blocks, the token's own included; from 1 to 2^31
  bool operator==(const MobaOptions&) const = default;

  // Each one sentence that names the field and what would be right; empty when usable.
  std::vector<std::string> Problems() const;
  std::string ToString() const;  // "moba block 512 top 4"
};

// Chosen blocks of a token at most: top_k - 1, or fewer when no token has that many to choose from.
int64_t ChosenWidth(const MobaOptions& options, const RoutedBlocks& blocks);
// The blocks as documents: causal attention under these is attention to the own block.
std::shared_ptr<const Documents> BlocksAsDocuments(const RoutedBlocks& blocks);
// (query, key) pairs of one query head and the tokens of `share` with chosen blocks, taking every
// such block as block_size tokens or, where that is less, all tokens of the document before the own
// block. What is really chosen depends on the data: a document's first block can be shorter.
int64_t NominalChosenPairs(const MobaOptions& options, const RoutedBlocks& blocks,
                           const RoutedShare& share);

// What all layers of one micro-batch share: integers only. Immutable.
struct MobaPlan {
  MobaOptions options;
  std::shared_ptr<const RoutedBlocks> blocks;
  RoutedShare share;                             // all tokens
  std::shared_ptr<const RoutedQueries> queries;  // all tokens
  std::shared_ptr<const BlockMask> own;          // causal attention inside each block

  int64_t width() const { return ChosenWidth(options, *blocks); }
  // (query, key) pairs of one query head: of the own block, and NominalChosenPairs.
  int64_t NominalPairs() const;

  // Errors    InvalidArgument with the first of options.Problems()
  static std::shared_ptr<const MobaPlan> Build(const MobaOptions& options, int64_t kv_heads,
                                               std::shared_ptr<const Documents> documents);
};

// Shapes    q, o, d_out [T, Hq, D]; k, v [T, Hkv, D]; lse [T, Hq]; T = the micro-batch's tokens
// Dtypes    q, k, v all f32, bf16 or f64; o, lse f32 (f64); d_out that of o or of q
// Numerics  f32 arithmetic (f64 for f64). Gates that differ by less than their rounding error may
//           be ranked either way by different implementations; each ranks equal ones alike, and
//           gives the same bits for any number of threads.
// Memory    beside operands and results: the lists, [Hq, T, width] i32 twice, and tiles; never
//           T x blocks. Making the lists takes up to 8 bytes an entry more, 16 in all
// Errors    InvalidArgument naming the argument, before anything is computed; Unsupported for what
//           no implementation of the device takes
// Devices   cpu, cuda
struct MobaResult {
  Tensor o;
  Tensor lse;
  RoutedLists lists;           // what was chosen; no rows for width 0
  const char* implementation;  // of the attention to chosen blocks
};
// options.round_output must be false and options.normalization softmax; options.implementation also
// forces that of the own block.
MobaResult MobaForward(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const MobaPlan& plan, const AttentionOptions& options = {});

struct MobaGradients {
  Tensor dq, dk, dv;  // f32 (f64)
};
// `lse` and `lists` from the forward pass; delta = AttentionDelta(d_out, o).
MobaGradients MobaBackward(Context& ctx, const Tensor& d_out, const Tensor& q, const Tensor& k,
                           const Tensor& v, const Tensor& lse, const Tensor& delta,
                           const RoutedLists& lists, const MobaPlan& plan,
                           const AttentionOptions& options = {});

// The choice alone: i32 [Hq, T, plan.width()], as RoutedLists::selected.
Tensor MobaSelect(Context& ctx, const Tensor& q, const Tensor& k, const MobaPlan& plan,
                  const AttentionOptions& options = {});

// RoutedImplementations, which the attention to chosen blocks has.
std::vector<std::string> MobaImplementations(DeviceKind device);

}  // namespace longspan::ops
