#include <algorithm>

#include "ops/attention/block_mask.h"
#include "ops/core/check.h"

namespace longspan::ops {
namespace {

// The entries of one row, with their kinds, that `kept` (ascending ids) names.
void KeepEntries(std::span<const BlockRun> runs, std::span<const int32_t> kept,
                 std::vector<BlockRun>& out) {
  for (const BlockRun& run : runs) {
    for (int32_t n = 0; n < run.count; ++n) {
      const int32_t block = run.block(n);
      if (!std::binary_search(kept.begin(), kept.end(), block)) continue;
      // Neighbours that are visible throughout share a run; partial ones need not be equally so.
      const bool joins = !run.partial && !out.empty() && !out.back().partial &&
                         out.back().step == 1 && out.back().first + out.back().count == block;
      if (joins) {
        ++out.back().count;
      } else {
        out.push_back({.first = block, .count = 1, .step = 1, .partial = run.partial});
      }
    }
  }
}

bool FullFirst(const BlockRun& a, const BlockRun& b) {
  return a.partial != b.partial ? a.partial < b.partial : a.first < b.first;
}

}  // namespace

std::shared_ptr<const BlockMask> BlockMask::Restrict(const KeptBlocks& kept) const {
  const int64_t rows = queries_.size(), heads = kv_heads();
  LONGSPAN_CHECK(static_cast<int64_t>(kept.offsets.size()) == heads * rows + 1 &&
                 kept.offsets.back() == static_cast<int64_t>(kept.blocks.size()))
      << "Restrict: lists for " << static_cast<int64_t>(kept.offsets.size()) - 1 << " rows of "
      << heads << " kv heads x " << rows << " query blocks";
  auto mask = std::make_shared<BlockMask>();
  mask->patterns_ = heads;
  for (int64_t h = 0; h < heads; ++h) {
    mask->pattern_of_head_.push_back(static_cast<int32_t>(h));
    mask->head_of_pattern_.push_back(rule_head(h));
  }
  mask->queries_ = queries_;
  mask->keys_ = keys_;
  mask->documents_ = documents_;
  mask->pattern_ = pattern_;
  mask->rule_heads_ = rule_heads_;
  mask->rule_ = MakeVisibleRule(mask->pattern_, rule_heads_, *mask->documents_);

  const auto place_of = [](const BlockList& list, int64_t blocks) {
    std::vector<int64_t> place(static_cast<size_t>(blocks), -1);
    for (size_t i = 0; i < list.ids.size(); ++i) {
      place[static_cast<size_t>(list.ids[i])] = static_cast<int64_t>(i);
    }
    return place;
  };
  const std::vector<int64_t> place_of_key =
      place_of(keys_, documents_->rows * BlocksPerRow(documents_->row_length));
  mask->rows_ = {.rows = rows, .offsets = {0}, .runs = {}};
  mask->columns_ = {.rows = keys_.size(), .offsets = {0}, .runs = {}};
  std::vector<std::vector<BlockRun>> columns(static_cast<size_t>(keys_.size()));
  for (int64_t h = 0; h < heads; ++h) {
    for (auto& column : columns) column.clear();
    for (int64_t i = 0; i < rows; ++i) {
      const auto at = static_cast<size_t>(h * rows + i);
      std::vector<BlockRun> row;
      KeepEntries(
          rows_.Row(pattern_of(h), i),
          {kept.blocks.data() + kept.offsets[at], kept.blocks.data() + kept.offsets[at + 1]}, row);
      std::sort(row.begin(), row.end(), FullFirst);
      mask->rows_.runs.insert(mask->rows_.runs.end(), row.begin(), row.end());
      mask->rows_.offsets.push_back(static_cast<int64_t>(mask->rows_.runs.size()));
      const int32_t query = queries_.ids[static_cast<size_t>(i)];
      for (const BlockRun& run : row) {
        for (int32_t n = 0; n < run.count; ++n) {
          const auto j = static_cast<size_t>(place_of_key[static_cast<size_t>(run.block(n))]);
          columns[j].push_back({.first = query, .count = 1, .step = 1, .partial = run.partial});
        }
      }
    }
    for (std::vector<BlockRun>& column : columns) {
      std::sort(column.begin(), column.end(), FullFirst);
      const size_t begin = mask->columns_.runs.size();
      for (const BlockRun& run : column) {
        std::vector<BlockRun>& runs = mask->columns_.runs;
        const bool joins = runs.size() > begin && !run.partial && !runs.back().partial &&
                           runs.back().first + runs.back().count == run.first;
        if (joins) {
          ++runs.back().count;
        } else {
          runs.push_back(run);
        }
      }
      mask->columns_.offsets.push_back(static_cast<int64_t>(mask->columns_.runs.size()));
    }
  }
  return mask;
}

}  // namespace longspan::ops
