#include "parallel/context/demand.h"

#include <algorithm>
#include <bit>
#include <mutex>

#include "ops/attention/block_rows.h"
#include "ops/core/check.h"
#include "parallel/context/block_bits.h"
#include "parallel/context/fingerprint.h"

namespace longspan::parallel {

struct ContextDemand::Data {
  Data(const ops::AttentionPattern& p, int64_t kv_head_count,
       std::shared_ptr<const ops::Documents> d, std::shared_ptr<const Placement> where);

  void FindNeeds(int64_t head_pattern);
  std::vector<int64_t> FindPairsBetween(int64_t head_pattern, int rank) const;
  // Tokens of the blocks of `bits(word)`, a function of the word's index.
  template <class Bits>
  int64_t TokensOf(const Bits& bits) const;

  const ops::AttentionPattern pattern;
  const int64_t kv_heads;
  const std::shared_ptr<const ops::Documents> documents;
  const std::shared_ptr<const Placement> placement;
  const ops::BlockRowWalk walk;
  const int64_t ranks, blocks;
  BlockBits owned;               // by rank
  BlockBits last;                // of one rank: the last block of each micro-batch row
  std::vector<BlockBits> needs;  // [head pattern], by rank
  std::vector<int64_t> pairs;    // [head pattern, rank]
  struct Between {
    std::once_flag once;
    std::vector<int64_t> pairs;  // [owner]
  };
  mutable std::vector<Between> between;  // [head pattern, rank]
};

ContextDemand::Data::Data(const ops::AttentionPattern& p, int64_t kv_head_count,
                          std::shared_ptr<const ops::Documents> d,
                          std::shared_ptr<const Placement> where)
    : pattern(p),
      kv_heads(kv_head_count),
      documents(std::move(d)),
      placement(std::move(where)),
      walk(pattern, kv_heads, documents),
      ranks(placement->ranks()),
      blocks(static_cast<int64_t>(placement->owners().size())),
      owned(ranks, blocks),
      last(1, blocks),
      pairs(static_cast<size_t>(walk.patterns() * ranks)),
      between(pairs.size()) {
  LONGSPAN_CHECK(documents->rows == placement->rows() &&
                 documents->row_length == placement->row_length())
      << "ContextDemand: documents of " << documents->rows << " rows of " << documents->row_length
      << " tokens with a placement of " << placement->rows() << " rows of "
      << placement->row_length();
  for (int64_t b = 0; b < blocks; ++b) owned.Add(placement->owner(b), b);
  const int64_t per_row = ops::BlocksPerRow(documents->row_length);
  for (int64_t b = per_row - 1; b < blocks; b += per_row) last.Add(0, b);
  for (int64_t h = 0; h < walk.patterns(); ++h) FindNeeds(h);
}

void ContextDemand::Data::FindNeeds(int64_t head_pattern) {
  BlockBits& bits = needs.emplace_back(ranks, blocks);
  walk.ForEach(head_pattern, [&](int32_t block, std::span<const ops::BlockRun> runs) {
    const int rank = placement->owner(block);
    int64_t seen = 0;
    for (const ops::BlockRun& run : runs) {
      bits.Add(rank, run);
      seen += walk.Pairs(head_pattern, block, run);
    }
    pairs[static_cast<size_t>(head_pattern * ranks + rank)] += seen;
  });
}

std::vector<int64_t> ContextDemand::Data::FindPairsBetween(int64_t head_pattern, int rank) const {
  std::vector<int64_t> found(static_cast<size_t>(ranks));
  // Queries that see all of a block, as the differences from one block to the next.
  std::vector<int64_t> queries(static_cast<size_t>(blocks + 1));
  walk.ForEach(head_pattern, placement->blocks(rank).ids,
               [&](int32_t block, std::span<const ops::BlockRun> runs) {
                 const int64_t tokens = ops::BlockTokens(documents->row_length, block);
                 for (const ops::BlockRun& run : runs) {
                   if (run.kind() == ops::BlockKind::kFull && run.step == 1) {
                     queries[static_cast<size_t>(run.first)] += tokens;
                     queries[static_cast<size_t>(run.first + run.count)] -= tokens;
                     continue;
                   }
                   // Of one run only the last block can differ, by the tokens that it has.
                   const int64_t all = walk.Pairs(head_pattern, block, run);
                   const ops::BlockRun one{run.first, 1, 1, run.partial};
                   const int64_t seen = run.count == 1 ? 0 : walk.Pairs(head_pattern, block, one);
                   for (int32_t n = 0; n + 1 < run.count; ++n) {
                     found[static_cast<size_t>(placement->owner(run.block(n)))] += seen;
                   }
                   found[static_cast<size_t>(placement->owner(run.block(run.count - 1)))] +=
                       all - seen * (run.count - 1);
                 }
               });
  int64_t seeing = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    seeing += queries[static_cast<size_t>(b)];
    if (seeing == 0) continue;
    found[static_cast<size_t>(placement->owner(b))] +=
        seeing * ops::BlockTokens(documents->row_length, static_cast<int32_t>(b));
  }
  return found;
}

template <class Bits>
int64_t ContextDemand::Data::TokensOf(const Bits& bits) const {
  const int64_t lacking = ops::BlocksPerRow(documents->row_length) * ops::kMaskBlock -
                          documents->row_length;  // tokens of a row's last block
  const std::span<const uint64_t> is_last = last.Of(0);
  int64_t tokens = 0;
  for (size_t w = 0; w < is_last.size(); ++w) {
    const uint64_t word = bits(w);
    tokens += ops::kMaskBlock * std::popcount(word) - lacking * std::popcount(word & is_last[w]);
  }
  return tokens;
}

// Which kv heads of the data a demand is about.
struct ContextDemand::Selection {
  std::vector<int32_t> kv_heads;    // of the data
  std::vector<int32_t> pattern_of;  // by selected kv head
  std::vector<int32_t> walked;      // by pattern: that of the data
  std::vector<int64_t> heads_of;    // by pattern
};

size_t ContextDemand::Walked(int64_t head_pattern) const {
  const auto p = static_cast<size_t>(head_pattern);
  return selection_ == nullptr ? p : static_cast<size_t>(selection_->walked[p]);
}

std::shared_ptr<const ContextDemand> ContextDemand::Build(
    const ops::AttentionPattern& pattern, int64_t kv_heads,
    std::shared_ptr<const ops::Documents> documents, std::shared_ptr<const Placement> placement) {
  LONGSPAN_CHECK(documents != nullptr && placement != nullptr)
      << "ContextDemand: documents or placement are missing";
  auto demand = std::make_shared<ContextDemand>();
  demand->data_ =
      std::make_shared<const Data>(pattern, kv_heads, std::move(documents), std::move(placement));
  return demand;
}

int64_t ContextDemand::ranks() const { return data_->ranks; }
int64_t ContextDemand::blocks() const { return data_->blocks; }
int64_t ContextDemand::kv_heads() const {
  return selection_ == nullptr ? data_->kv_heads
                               : static_cast<int64_t>(selection_->kv_heads.size());
}
int64_t ContextDemand::patterns() const {
  return selection_ == nullptr ? data_->walk.patterns()
                               : static_cast<int64_t>(selection_->walked.size());
}
int32_t ContextDemand::pattern_of(int64_t kv_head) const {
  return selection_ == nullptr ? data_->walk.pattern_of(kv_head)
                               : selection_->pattern_of[static_cast<size_t>(kv_head)];
}
int64_t ContextDemand::heads_of(int64_t head_pattern) const {
  return selection_ == nullptr ? data_->walk.heads_of(head_pattern)
                               : selection_->heads_of[static_cast<size_t>(head_pattern)];
}

std::shared_ptr<const ContextDemand> ContextDemand::SelectHeads(
    std::span<const int32_t> heads) const {
  auto selection = std::make_shared<Selection>();
  std::vector<int32_t> found(static_cast<size_t>(data_->walk.patterns()), -1);
  for (const int32_t head : heads) {
    if (head < 0 || head >= kv_heads()) {
      throw InvalidArgument(
          Str("ContextDemand::SelectHeads: kv head ", head, " of ", kv_heads(), " does not exist"));
    }
    const auto walked = static_cast<int32_t>(Walked(pattern_of(head)));
    int32_t& pattern = found[static_cast<size_t>(walked)];
    if (pattern < 0) {
      pattern = static_cast<int32_t>(selection->walked.size());
      selection->walked.push_back(walked);
      selection->heads_of.push_back(0);
    }
    ++selection->heads_of[static_cast<size_t>(pattern)];
    selection->pattern_of.push_back(pattern);
    selection->kv_heads.push_back(
        selection_ == nullptr ? head : selection_->kv_heads[static_cast<size_t>(head)]);
  }
  auto demand = std::make_shared<ContextDemand>();
  demand->data_ = data_;
  demand->selection_ = std::move(selection);
  return demand;
}

std::shared_ptr<const ops::BlockMask> ContextDemand::Mask(const ops::BlockList& queries,
                                                          const ops::BlockList& keys) const {
  const Data& d = *data_;
  if (selection_ == nullptr) {
    return ops::BlockMask::Build(d.pattern, d.kv_heads, d.documents, queries, keys);
  }
  return ops::BlockMask::Build(d.pattern, d.kv_heads, d.documents, queries, keys,
                               selection_->kv_heads);
}

const Placement& ContextDemand::placement() const { return *data_->placement; }
const std::shared_ptr<const Placement>& ContextDemand::shared_placement() const {
  return data_->placement;
}
const std::shared_ptr<const ops::Documents>& ContextDemand::documents() const {
  return data_->documents;
}
const ops::AttentionPattern& ContextDemand::pattern() const { return data_->pattern; }

bool ContextDemand::Needs(int rank, int64_t head_pattern, int64_t block) const {
  return data_->needs[Walked(head_pattern)].Has(rank, block);
}

std::vector<int32_t> ContextDemand::NeededFrom(int rank, int owner, int64_t head_pattern) const {
  std::vector<int32_t> blocks;
  for (const int32_t block : data_->placement->blocks(owner).ids) {
    if (Needs(rank, head_pattern, block)) blocks.push_back(block);
  }
  std::sort(blocks.begin(), blocks.end());  // local order ascends except in groups of ranks
  return blocks;
}

int64_t ContextDemand::PairsBetween(int64_t head_pattern, int rank, int owner) const {
  const auto walked = static_cast<int64_t>(Walked(head_pattern));
  Data::Between& row = data_->between[static_cast<size_t>(walked * ranks() + rank)];
  std::call_once(row.once, [&] { row.pairs = data_->FindPairsBetween(walked, rank); });
  return row.pairs[static_cast<size_t>(owner)];
}

int64_t ContextDemand::Pairs(int64_t head_pattern, int rank) const {
  return data_
      ->pairs[Walked(head_pattern) * static_cast<size_t>(ranks()) + static_cast<size_t>(rank)];
}

int64_t ContextDemand::TotalPairs(int rank) const {
  int64_t pairs = 0;
  for (int64_t h = 0; h < patterns(); ++h) pairs += heads_of(h) * Pairs(h, rank);
  return pairs;
}

int64_t ContextDemand::LowerBoundRows(int rank) const {
  const std::span<const uint64_t> held = data_->owned.Of(rank);
  int64_t rows = 0;
  for (int64_t h = 0; h < patterns(); ++h) {
    const std::span<const uint64_t> needed = data_->needs[Walked(h)].Of(rank);
    rows += heads_of(h) * data_->TokensOf([&](size_t w) { return needed[w] & ~held[w]; });
  }
  return rows;
}

int64_t ContextDemand::NodeLowerBoundRows(int node, int ranks_per_node) const {
  LONGSPAN_CHECK(ranks_per_node >= 1 && node >= 0 &&
                 static_cast<int64_t>(node) * ranks_per_node < ranks())
      << "ContextDemand: node " << node << " of " << ranks() << " ranks, " << ranks_per_node
      << " a node";
  const int64_t begin = static_cast<int64_t>(node) * ranks_per_node;
  const int64_t end = std::min(ranks(), begin + ranks_per_node);
  const auto any = [&](const BlockBits& bits, size_t w) {
    uint64_t word = 0;
    for (int64_t rank = begin; rank < end; ++rank) word |= bits.Of(rank)[w];
    return word;
  };
  int64_t rows = 0;
  for (int64_t h = 0; h < patterns(); ++h) {
    const BlockBits& needed = data_->needs[Walked(h)];
    rows += heads_of(h) *
            data_->TokensOf([&](size_t w) { return any(needed, w) & ~any(data_->owned, w); });
  }
  return rows;
}

uint64_t ContextDemand::Hash() const {
  const ops::Documents& documents = *data_->documents;
  Fingerprint print;
  print.Add(data_->pattern.ToString()).Add(data_->kv_heads);
  if (selection_ != nullptr) print.AddAll(selection_->kv_heads);
  for (int64_t t = 0; t < documents.tokens();) {
    t = documents.doc_end[static_cast<size_t>(t)];
    print.Add(t);
  }
  return print.Add(data_->placement->Hash()).value();
}

}  // namespace longspan::parallel
