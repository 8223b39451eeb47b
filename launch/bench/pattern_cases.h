#pragma once
#include <cstdint>
#include <string>

#include "launch/bench/case_name.h"
#include "ops/attention/pattern.h"

namespace longspan::launch {

// How case names write attention patterns: a kind, and sizes for the fields
// (ops/attention/pattern.h).
//
//   full, causal      nothing more
//   window, bwindow   W1024 tokens seen, the query included; S64 sinks (default 0)
//   s2                B64 tokens a block, L4 local blocks, V4 stride in blocks; N1 dense heads
//                     (default 0)
//   s2same            the same blocks for all heads: B, L, V
//   global, bglobal   W1024 tokens of window, S64 global tokens
//   power             B64 tokens a block, L4 local blocks, S1 sink blocks (default 1)
//   dilated, bdilated B64 tokens a block, L4 neighbours, V4 dilation
//   prefix            S256 tokens of prefix
//   sharedquestion    Q512 tokens of question, A256 of each answer
//   causalblockwise   A512 tokens a segment
//   blockcausal       B64 tokens a block
//   random, brandom   B64 tokens a block, R10 per mille of the tiles; M4 mean and I1 least blocks a
//                     tile (default 1: all tiles are single blocks), E1 seed (default 0), H1 each
//                     kv head its own (default 0)
//   spans             F1 kv heads see everything causal (the first ones), the others W1024 and S64
//                     (default 0)
//   longgen           the sparse layers of LongGen (arXiv 2410.01485), 2048 tokens of window and
//                     sinks: W (default 1984), S (default 64)
// b...: also sees later keys.
constexpr const char* kPatternKinds =
    "full, causal, window, bwindow, s2, s2same, global, bglobal, power, dilated, bdilated, prefix, "
    "sharedquestion, causalblockwise, blockcausal, random, brandom, spans or longgen";
bool IsPatternKind(const std::string& kind);

// Takes the sizes of the kind from `name`, whose sizes have been read.
ops::AttentionPattern ReadPattern(const std::string& kind, int64_t kv_heads, CaseName& name);

struct SmallPattern {
  ops::AttentionPattern pattern;
  int64_t tokens = 0;  // of a row that shows all it does, fewer than 800
};
// A pattern of the same kind with small sizes.
SmallPattern SmallVersion(const ops::AttentionPattern& pattern);

}  // namespace longspan::launch
