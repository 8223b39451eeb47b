#pragma once
#include <algorithm>
#include <cstdint>

#include "ops/attention/documents.h"
#include "ops/attention/visible.h"

namespace longspan::ops {

// Visible() in closed form: which tokens of a document a range of queries sees, and which see a
// range of keys, as a few intervals and one strided family instead of token by token. Masks, areas
// and the bit masks of kernels come from here; tests compare all of it with Visible().
//
// Tokens here are positions in their row.

struct TokenRange {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
  bool contains(int64_t t) const { return t >= begin && t < end; }
};
inline TokenRange Intersect(TokenRange a, TokenRange b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

// The union of `part` (disjoint, ascending, possibly empty) and those tokens of `strided` that lie
// in blocks of the stride's residue. `strided` ends before the parts begin.
struct TokenSet {
  TokenRange part[2];
  TokenRange strided;
};

// The rule of one kv head inside the document [begin, end) of a row.
class DocumentRule {
 public:
  DocumentRule(const VisibleRule& rule, int64_t kv_head, int64_t begin, int64_t end);

  // Keys that some (every) query of `q` sees. `q` is a non-empty range of at most 64 tokens.
  TokenSet KeysOfAny(TokenRange q) const;
  TokenSet KeysOfAll(TokenRange q) const;
  // Queries that see some (every) key of `k`: always one interval.
  TokenRange QueriesOfAny(TokenRange k) const;
  TokenRange QueriesOfAll(TokenRange k) const;

  bool Intersects(const TokenSet& set, TokenRange tokens) const;
  bool Covers(const TokenSet& set, TokenRange tokens) const;
  int64_t Count(const TokenSet& set, TokenRange tokens) const;
  // Bit i: token first + i is in the set, for i in [0, 64).
  uint64_t Bits(const TokenSet& set, int64_t first) const;

  // The strided family: blocks J of block() tokens with J mod stride() == residue().
  int64_t block() const { return block_; }
  int64_t stride() const { return stride_; }
  int64_t residue() const { return residue_; }

 private:
  // First block >= j of the family.
  int64_t NextStrided(int64_t j) const {
    const int64_t m = (residue_ - j) % stride_;
    return j + (m < 0 ? m + stride_ : m);
  }
  int64_t StridedBelow(int64_t token) const;  // tokens of the family in [0, token)

  int kind_;
  int64_t begin_, end_, window_, sinks_, block_, local_, stride_, residue_;
};

// Bit mask of [range.begin - first, range.end - first) within 64 bits.
inline uint64_t RangeBits(TokenRange range, int64_t first) {
  const int64_t a = std::max<int64_t>(0, range.begin - first);
  const int64_t b = std::min<int64_t>(64, range.end - first);
  if (a >= b) return 0;
  return (~uint64_t{0} >> (64 - (b - a))) << a;
}

// Who sees whom between two mask blocks (by global id): bit j of bits[i] says whether query j of
// the query block sees key i of the key block. `...OfKeys` is indexed by key, `...OfQueries` has
// the roles swapped (bit i of bits[j]). Entries past the tokens of a block are 0.
void VisibleBitsOfKeys(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                       int32_t query_block, int32_t key_block, uint64_t bits[64]);
void VisibleBitsOfQueries(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                          int32_t query_block, int32_t key_block, uint64_t bits[64]);
// Visible pairs between two mask blocks.
int64_t VisiblePairsOfBlocks(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                             int32_t query_block, int32_t key_block);

// A mask block, and its cut into pieces of one document each.
struct BlockPlace {
  int64_t row;       // global index of the row's first token
  TokenRange range;  // in the row
};
BlockPlace TokensOfBlock(int64_t row_length, int32_t id);

struct DocumentPiece {
  TokenRange document, tokens;  // in the row
};
// The piece that starts at `begin`, for tokens before `end`, of the row at global index `row`.
inline DocumentPiece PieceAt(const Documents& documents, int64_t row, int64_t begin, int64_t end) {
  const size_t t = static_cast<size_t>(row + begin);
  const TokenRange document{documents.doc_begin[t] - row, documents.doc_end[t] - row};
  return {document, {begin, std::min(end, document.end)}};
}

}  // namespace longspan::ops
