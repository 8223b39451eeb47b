#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ops/attention/documents.h"
#include "ops/attention/kv_table.h"
#include "ops/attention/pattern.h"
#include "ops/attention/visible.h"

namespace longspan::ops {

// Tokens per mask block, whatever the pattern's own block size.
inline constexpr int64_t kMaskBlock = 64;

// Whether blocks of `tokens` tokens can be chosen by a gate: multiples of kMaskBlock up to 2^31.
constexpr bool IsChoiceBlock(int64_t tokens) {
  return tokens >= kMaskBlock && tokens % kMaskBlock == 0 && tokens <= int64_t{1} << 31;
}

// Blocks cut each row of a micro-batch: block b of row r covers positions [64 b, 64 b + 64) of the
// row (the last may be short) and has the global id r * blocks_per_row + b. A shard is a list of
// ids in local storage order: the tokens of each block follow right after those of the one before.
struct BlockList {
  std::vector<int32_t> ids;          // ascending or permuted; no duplicates
  std::vector<int64_t> token_begin;  // [ids + 1] prefix sums: local token offset of each block

  int64_t size() const { return static_cast<int64_t>(ids.size()); }
  int64_t tokens() const { return token_begin.empty() ? 0 : token_begin.back(); }
  bool operator==(const BlockList&) const = default;

  static BlockList FromIds(const Documents& documents, std::vector<int32_t> ids);
  static BlockList All(const Documents& documents);
};

int64_t BlocksPerRow(int64_t row_length);
// Global token index of the first token of a block, and the number of its tokens.
int64_t BlockFirstToken(int64_t row_length, int32_t id);
int64_t BlockTokens(int64_t row_length, int32_t id);

enum class BlockKind : uint8_t { kFull, kPartial };

// Blocks {first, first + step, ..., first + (count - 1) * step} by global id, all of one kind.
// FULL: every query token of the row's block sees every key token. PARTIAL: some pair is visible
// and Visible() decides each.
struct BlockRun {
  int32_t first;
  int32_t count;
  int32_t step : 31;
  uint32_t partial : 1;
  LONGSPAN_HD BlockKind kind() const { return partial ? BlockKind::kPartial : BlockKind::kFull; }
  LONGSPAN_HD int32_t block(int32_t i) const { return first + i * step; }
};
static_assert(sizeof(BlockRun) == 12);

// Runs of one axis in compressed form: row i of pattern p owns runs
// [offsets[p * rows + i], offsets[p * rows + i + 1]).
struct BlockRuns {
  int64_t rows = 0;
  std::vector<int64_t> offsets;
  std::vector<BlockRun> runs;
  std::span<const BlockRun> Row(int64_t pattern, int64_t row) const {
    const size_t i = static_cast<size_t>(pattern * rows + row);
    return {runs.data() + offsets[i], runs.data() + offsets[i + 1]};
  }
};

// Key blocks that a choice leaves to each query block of each kv head: row h * queries + i owns
// blocks [offsets[row], offsets[row + 1]), global ids in ascending order.
struct KeptBlocks {
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> blocks;
};

// The form of a mask that kernels, balancing and communication read, for one layer kind and one
// micro-batch: queries of `queries()` against keys of `keys()` (any two block lists: a whole row, a
// shard, one ring step).
//
// Tight: an entry exists exactly when some (query, key) pair of the two blocks is visible. Rows
// and columns hold the same entries with the same kinds; entries of a row do not overlap. Runs of
// a row are ordered FULL first, then PARTIAL, each by first block; the entries of a PARTIAL run of
// a row hold equally many visible pairs. Run elements are always in keys() (queries() for columns).
// Heads with equal rules share a pattern. Immutable and shareable between threads; holds its
// Documents alive. Build throws InvalidArgument for a pattern with Problems().
//
// Memory is O(runs) for every pattern, and so is time, except that random blocks ask for every pair
// of tiles. A row of a mask on one long document has a few runs for intervals and S2 and about
// log2(blocks) for power; for dilated and random blocks one for each group of adjacent FULL blocks
// and at most one for each PARTIAL block.
class BlockMask {
 public:
  BlockMask() = default;
  BlockMask(const BlockMask&) = delete;  // the rule points into the pattern
  BlockMask& operator=(const BlockMask&) = delete;

  static std::shared_ptr<const BlockMask> Build(const AttentionPattern& pattern, int64_t kv_heads,
                                                std::shared_ptr<const Documents> documents,
                                                const BlockList& queries, const BlockList& keys);
  // The same with only some of the kv heads, as SelectHeads(heads) gives it, without the time and
  // memory for the others.
  static std::shared_ptr<const BlockMask> Build(const AttentionPattern& pattern, int64_t kv_heads,
                                                std::shared_ptr<const Documents> documents,
                                                const BlockList& queries, const BlockList& keys,
                                                std::span<const int32_t> heads);

  // A mask of heads.size() kv heads: head i sees what head heads[i] of this mask sees. Any order;
  // heads may repeat and be left out. Throws InvalidArgument for a head that does not exist.
  std::shared_ptr<const BlockMask> SelectHeads(std::span<const int32_t> heads) const;

  // The entries of this mask that `kept` names, one pattern a kv head: a choice made from the data.
  // Kinds stay, and so does who sees whom inside an entry; blocks that this mask lacks are passed
  // over. Time and memory O(entries). Throws InvalidArgument unless `kept` has one row for each kv
  // head and query block.
  std::shared_ptr<const BlockMask> Restrict(const KeptBlocks& kept) const;

  int64_t kv_heads() const { return static_cast<int64_t>(pattern_of_head_.size()); }
  int64_t patterns() const { return patterns_; }
  int32_t pattern_of(int64_t kv_head) const {
    return pattern_of_head_[static_cast<size_t>(kv_head)];
  }
  // The kv head that Visible(rule(), ...) is to be asked with for pattern p. It counts the heads of
  // the rule, which are those of this mask unless heads were selected.
  int64_t head_of(int64_t pattern) const { return head_of_pattern_[static_cast<size_t>(pattern)]; }
  // The same for a kv head of this mask.
  int64_t rule_head(int64_t kv_head) const { return head_of(pattern_of(kv_head)); }
  const BlockList& queries() const { return queries_; }
  const BlockList& keys() const { return keys_; }
  const Documents& documents() const { return *documents_; }
  const AttentionPattern& pattern() const { return pattern_; }
  const VisibleRule& rule() const { return rule_; }
  const BlockRuns& row_runs() const { return rows_; }        // row i = queries().ids[i] -> key ids
  const BlockRuns& column_runs() const { return columns_; }  // row j = keys().ids[j] -> query ids

  bool empty() const { return rows_.runs.empty(); }
  int64_t entries(int64_t pattern) const;                  // blocks
  int64_t VisiblePairs(int64_t kv_head) const;             // exact (query, key) pairs: the area
  int64_t TotalVisiblePairs() const;                       // over kv heads
  int64_t PairsOfRow(int64_t pattern, int64_t row) const;  // of query block queries().ids[row]
  // Ascending global ids of the key blocks that some query of kv_head sees.
  std::vector<int32_t> NeededKeys(int64_t kv_head) const;
  size_t bytes() const;  // memory held, documents excluded
  // One character per (query block, key block): '#' full, '+' partial, '.' none; large masks are
  // scaled down to at most `max_size` rows and columns (a cell shows its strongest entry).
  std::string Ascii(int64_t kv_head, int64_t max_size = 64) const;

  // Made from the mask when first wanted, then shared by all layers and threads that use it.
  const KvTableCache& kv_tables() const { return kv_tables_; }          // kv_view.h
  const DeviceCopies& device_copies() const { return device_copies_; }  // cuda/device_mask.h

 private:
  friend class BlockMaskBuilder;
  int64_t PairsOfPattern(int64_t pattern) const;

  int64_t patterns_ = 0;
  int64_t rule_heads_ = 0;  // kv heads that the rule was made for
  std::vector<int32_t> pattern_of_head_;
  std::vector<int64_t> head_of_pattern_;
  BlockList queries_, keys_;
  std::shared_ptr<const Documents> documents_;
  AttentionPattern pattern_;
  VisibleRule rule_{};
  BlockRuns rows_, columns_;
  KvTableCache kv_tables_;
  DeviceCopies device_copies_;
};

// `pattern` and `documents` must outlive the rule.
VisibleRule MakeVisibleRule(const AttentionPattern& pattern, int64_t kv_heads,
                            const Documents& documents);

// Visible pairs between a query block and the key blocks of one of its runs; `head` counts the
// heads of the rule.
int64_t PairsOfRun(const VisibleRule& rule, const Documents& documents, int64_t head, int32_t query,
                   const BlockRun& run);

}  // namespace longspan::ops
