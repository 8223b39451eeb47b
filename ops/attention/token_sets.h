#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention/documents.h"
#include "ops/attention/visible.h"

namespace longspan::ops {

// Sets of tokens of one row as a few intervals and one strided family, instead of token by token.
// Tokens here are positions in their row.

struct TokenRange {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
  bool contains(int64_t t) const { return t >= begin && t < end; }
  bool operator==(const TokenRange&) const = default;
};
inline TokenRange Intersect(TokenRange a, TokenRange b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

// The tokens of `range` in blocks J (of `block` tokens) with J mod stride == residue.
struct StridedTokens {
  TokenRange range;
  int64_t block = 1, stride = 1, residue = 0;
  bool contains(int64_t t) const { return range.contains(t) && t / block % stride == residue; }
  // First block >= j of the family.
  int64_t NextBlock(int64_t j) const {
    const int64_t m = (residue - j) % stride;
    return j + (m < 0 ? m + stride : m);
  }
  bool Intersects(TokenRange tokens) const {
    const TokenRange common = Intersect(range, tokens);
    return !common.empty() && NextBlock(common.begin / block) * block < common.end;
  }
};

// The union of `parts` (ascending, not touching, none of them empty) and `strided`, which ends
// before they begin and is empty for all patterns but S2.
struct TokenSet {
  std::vector<TokenRange> parts;
  StridedTokens strided;

  void Clear() {
    parts.clear();
    strided = {};
  }
  // Adds a range that begins no earlier than any part.
  void Append(TokenRange range) {
    if (range.empty()) return;
    if (!parts.empty() && range.begin <= parts.back().end) {
      parts.back().end = std::max(parts.back().end, range.end);
    } else {
      parts.push_back(range);
    }
  }
  // Keeps what lies in `range`.
  void Clip(TokenRange range);
  // Adds ascending ranges; keeps what lies in one of them (of `parts`, the strided family must be
  // empty).
  void Unite(std::span<const TokenRange> ranges);
  void IntersectWith(std::span<const TokenRange> ranges);

  // Bit i: token first + i is in the set, for i in [0, 64).
  uint64_t Bits(int64_t first) const;
};

// Asks about ranges of tokens from left to right; each answer takes amortised constant time.
class SetCursor {
 public:
  explicit SetCursor(const TokenSet& set) : set_(set) {}
  // In a part. Tokens must not descend from call to call, here and below.
  bool InParts(int64_t token) {
    while (at_ < set_.parts.size() && set_.parts[at_].end <= token) ++at_;
    return at_ < set_.parts.size() && set_.parts[at_].begin <= token;
  }
  bool Intersects(TokenRange tokens) {
    return InParts(tokens.begin) ||
           (at_ < set_.parts.size() && set_.parts[at_].begin < tokens.end) ||
           set_.strided.Intersects(tokens);
  }
  bool Covers(TokenRange tokens);

 private:
  const TokenSet& set_;
  size_t at_ = 0;
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
