#include "ops/attention/block_mask.h"

#include <algorithm>

#include "ops/attention/token_sets.h"
#include "ops/core/check.h"

namespace longspan::ops {
namespace {

int64_t EntriesOf(std::span<const BlockRun> runs) {
  int64_t n = 0;
  for (const BlockRun& run : runs) n += run.count;
  return n;
}

template <class T>
size_t BytesOf(const std::vector<T>& v) {
  return v.capacity() * sizeof(T);
}

size_t BytesOf(const BlockList& list) { return BytesOf(list.ids) + BytesOf(list.token_begin); }
size_t BytesOf(const BlockRuns& runs) { return BytesOf(runs.offsets) + BytesOf(runs.runs); }

}  // namespace

int64_t BlocksPerRow(int64_t row_length) { return (row_length + kMaskBlock - 1) / kMaskBlock; }

int64_t BlockFirstToken(int64_t row_length, int32_t id) {
  const auto place = TokensOfBlock(row_length, id);
  return place.row + place.range.begin;
}

int64_t BlockTokens(int64_t row_length, int32_t id) {
  return TokensOfBlock(row_length, id).range.size();
}

BlockList BlockList::FromIds(const Documents& documents, std::vector<int32_t> ids) {
  const int64_t blocks = documents.rows * BlocksPerRow(documents.row_length);
  std::vector<bool> seen(static_cast<size_t>(blocks));
  BlockList list{.ids = std::move(ids), .token_begin = {0}};
  list.token_begin.reserve(list.ids.size() + 1);
  for (const int32_t id : list.ids) {
    if (id < 0 || id >= blocks) {
      throw InvalidArgument(
          Str("BlockList: block ", id, " does not exist; ids run from 0 to ", blocks - 1));
    }
    if (seen[static_cast<size_t>(id)]) {
      throw InvalidArgument(Str("BlockList: block ", id, " occurs twice; list each block once"));
    }
    seen[static_cast<size_t>(id)] = true;
    list.token_begin.push_back(list.token_begin.back() + BlockTokens(documents.row_length, id));
  }
  return list;
}

BlockList BlockList::All(const Documents& documents) {
  std::vector<int32_t> ids(
      static_cast<size_t>(documents.rows * BlocksPerRow(documents.row_length)));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  return FromIds(documents, std::move(ids));
}

int64_t BlockMask::entries(int64_t pattern) const {
  int64_t n = 0;
  for (int64_t i = 0; i < rows_.rows; ++i) n += EntriesOf(rows_.Row(pattern, i));
  return n;
}

int64_t PairsOfRun(const VisibleRule& rule, const Documents& documents, int64_t head, int32_t query,
                   const BlockRun& run) {
  if (run.kind() == BlockKind::kPartial) {
    // The builder makes a run of partial entries only where all of them are equally visible.
    return run.count * VisiblePairsOfBlocks(rule, documents, head, query, run.first);
  }
  const int64_t row_length = documents.row_length, last = run.block(run.count - 1);
  const int64_t tokens =
      (run.count - 1) * kMaskBlock + BlockTokens(row_length, static_cast<int32_t>(last));
  return BlockTokens(row_length, query) * tokens;
}

int64_t BlockMask::PairsOfRow(int64_t pattern, int64_t row) const {
  const int32_t query = queries_.ids[static_cast<size_t>(row)];
  int64_t pairs = 0;
  for (const BlockRun& run : rows_.Row(pattern, row)) {
    pairs += PairsOfRun(rule_, *documents_, head_of(pattern), query, run);
  }
  return pairs;
}

int64_t BlockMask::PairsOfPattern(int64_t pattern) const {
  int64_t pairs = 0;
  for (int64_t i = 0; i < rows_.rows; ++i) pairs += PairsOfRow(pattern, i);
  return pairs;
}

int64_t BlockMask::VisiblePairs(int64_t kv_head) const {
  return PairsOfPattern(pattern_of(kv_head));
}

int64_t BlockMask::TotalVisiblePairs() const {
  int64_t pairs = 0;
  for (int64_t p = 0; p < patterns_; ++p) {
    const int64_t heads = std::count(pattern_of_head_.begin(), pattern_of_head_.end(), p);
    pairs += heads * PairsOfPattern(p);
  }
  return pairs;
}

std::vector<int32_t> BlockMask::NeededKeys(int64_t kv_head) const {
  std::vector<int32_t> needed;
  for (int64_t j = 0; j < columns_.rows; ++j) {
    if (!columns_.Row(pattern_of(kv_head), j).empty()) {
      needed.push_back(keys_.ids[static_cast<size_t>(j)]);
    }
  }
  std::sort(needed.begin(), needed.end());
  return needed;
}

std::shared_ptr<const BlockMask> BlockMask::SelectHeads(std::span<const int32_t> heads) const {
  auto mask = std::make_shared<BlockMask>();
  std::vector<int32_t> place(static_cast<size_t>(patterns_), -1);  // of a pattern in the new mask
  std::vector<int64_t> taken;
  for (const int32_t head : heads) {
    LONGSPAN_CHECK(head >= 0 && head < kv_heads())
        << "SelectHeads: head " << head << " of a mask with " << kv_heads() << " kv heads";
    int32_t& at = place[static_cast<size_t>(pattern_of(head))];
    if (at < 0) {
      at = static_cast<int32_t>(taken.size());
      taken.push_back(pattern_of(head));
      mask->head_of_pattern_.push_back(rule_head(head));
    }
    mask->pattern_of_head_.push_back(at);
  }
  mask->patterns_ = static_cast<int64_t>(taken.size());
  mask->rule_heads_ = rule_heads_;
  mask->queries_ = queries_;
  mask->keys_ = keys_;
  mask->documents_ = documents_;
  mask->pattern_ = pattern_;
  mask->rule_ = MakeVisibleRule(mask->pattern_, rule_heads_, *documents_);
  const auto copy = [&](const BlockRuns& from, BlockRuns& to) {
    to = {.rows = from.rows, .offsets = {0}, .runs = {}};
    for (const int64_t pattern : taken) {
      for (int64_t i = 0; i < from.rows; ++i) {
        const auto row = from.Row(pattern, i);
        to.runs.insert(to.runs.end(), row.begin(), row.end());
        to.offsets.push_back(static_cast<int64_t>(to.runs.size()));
      }
    }
  };
  copy(rows_, mask->rows_);
  copy(columns_, mask->columns_);
  return mask;
}

size_t BlockMask::bytes() const {
  return sizeof(*this) + BytesOf(pattern_of_head_) + BytesOf(head_of_pattern_) + BytesOf(queries_) +
         BytesOf(keys_) + BytesOf(pattern_.segment_ends) + BytesOf(pattern_.spans) +
         BytesOf(rows_) + BytesOf(columns_);
}

std::string BlockMask::Ascii(int64_t kv_head, int64_t max_size) const {
  LONGSPAN_CHECK(max_size >= 1) << "BlockMask::Ascii: max_size " << max_size;
  const auto cells = [&](int64_t n) { return std::min(n, max_size); };
  const int64_t height = cells(queries_.size()), width = cells(keys_.size());
  std::vector<std::string> picture(static_cast<size_t>(height),
                                   std::string(static_cast<size_t>(width), '.'));
  // Column of the picture of each key id.
  const int64_t blocks = documents_->rows * BlocksPerRow(documents_->row_length);
  std::vector<int32_t> column(static_cast<size_t>(blocks), 0);
  for (int64_t j = 0; j < keys_.size(); ++j) {
    column[static_cast<size_t>(keys_.ids[static_cast<size_t>(j)])] =
        static_cast<int32_t>(j * width / keys_.size());
  }
  for (int64_t i = 0; i < queries_.size(); ++i) {
    std::string& line = picture[static_cast<size_t>(i * height / queries_.size())];
    for (const BlockRun& run : rows_.Row(pattern_of(kv_head), i)) {
      const char mark = run.kind() == BlockKind::kFull ? '#' : '+';
      for (int32_t n = 0; n < run.count; ++n) {
        char& cell = line[static_cast<size_t>(column[static_cast<size_t>(run.block(n))])];
        if (cell != '#') cell = mark;
      }
    }
  }
  std::string text;
  for (const std::string& line : picture) text += line + "\n";
  return text;
}

}  // namespace longspan::ops
