#pragma once
#include <cstdint>
#include <vector>

#include "ops/attention/token_sets.h"

namespace longspan::ops {

// Visible() in closed form inside one document: which tokens a range of queries sees, and which see
// a range of keys, as token sets instead of pair by pair. Masks, areas and the bit masks of the CPU
// kernels come from here; tests compare all of it with Visible().

// Whose tokens a set holds: the keys that queries see, or the queries that see keys.
enum class Axis { kKeys, kQueries };

// What the tokens of a range meet on the other axis. `borders` has, in ascending order, the mask
// blocks in which anything can change: between two of them all tokens are alike for `any`, for
// `all` and for every single token of the range.
struct VisibleSets {
  TokenSet any;  // met by some token of the range
  TokenSet all;  // met by every token of the range
  std::vector<int64_t> borders;
};

class DocumentRule {
 public:
  // The rule of one kv head inside a document; `rule` must outlive this.
  DocumentRule(const VisibleRule& rule, int64_t kv_head, TokenRange document);

  // The tokens [t, end) of the document meet, each of them, the tokens of `fixed` and those less
  // than `window` away; if `causal`, of both only those in order (queries not before keys).
  struct Unit {
    int64_t end;
    bool causal;
    int64_t window;
  };
  // The unit of token t. Only tokens inside `within` (a part of the document) have to be right.
  Unit At(Axis axis, int64_t t, TokenRange within, TokenSet& fixed) const {
    return axis == Axis::kKeys ? KeysAt(t, within, fixed) : QueriesAt(t, within, fixed);
  }
  // What is in order with token t: keys up to it, queries from it on.
  static TokenRange InOrder(Axis axis, int64_t t) {
    constexpr int64_t kFar = int64_t{1} << 40;
    return axis == Axis::kKeys ? TokenRange{-kFar, t + 1} : TokenRange{t, kFar};
  }

  // For at most 64 tokens of the document.
  void Collect(Axis axis, TokenRange tokens, TokenRange within, VisibleSets& out) const;

 private:
  Unit KeysAt(int64_t t, TokenRange within, TokenSet& fixed) const;
  Unit QueriesAt(int64_t t, TokenRange within, TokenSet& fixed) const;
  Unit BlockKeysAt(int64_t t, TokenRange within, TokenSet& fixed) const;
  Unit BlockQueriesAt(int64_t t, TokenRange within, TokenSet& fixed) const;
  void CollectStrided(TokenRange tokens, TokenRange within, VisibleSets& out) const;
  void AppendRandom(Axis axis, int64_t block, TokenRange within, TokenSet& fixed) const;
  void AppendDilated(Axis axis, int64_t block, TokenRange within, TokenSet& fixed) const;
  // Blocks [from, to) as far as they lie in the document.
  void AppendBlocks(int64_t from, int64_t to, TokenSet& fixed) const {
    fixed.Append(Intersect({from * rule_.block, to * rule_.block}, document_));
  }
  TokenRange SegmentOf(int64_t t) const;

  const VisibleRule& rule_;
  PatternKind kind_;
  TokenRange document_;
  bool causal_ = true;
  int64_t window_ = 0, first_end_ = 0;  // tokens; the end of sinks, global tokens or prefix
  int64_t first_block_ = 0, origin_ = 0, residue_ = 0;
  RandomKey key_{};
};

}  // namespace longspan::ops
