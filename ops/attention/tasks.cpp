#include "ops/attention/tasks.h"

#include <algorithm>
#include <bit>

namespace longspan::ops {
namespace {

struct Costed {
  int64_t entries;
  BlockTask task;
};

std::vector<Costed> AllTasks(const BlockMask& mask, const BlockRuns& runs) {
  std::vector<Costed> costed;
  costed.reserve(static_cast<size_t>(runs.rows * mask.kv_heads()));
  for (int64_t h = 0; h < mask.kv_heads(); ++h) {
    for (int64_t i = 0; i < runs.rows; ++i) {
      int64_t entries = 0;
      for (const BlockRun& run : runs.Row(mask.pattern_of(h), i)) entries += run.count;
      costed.push_back({entries, {static_cast<int32_t>(i), static_cast<int32_t>(h)}});
    }
  }
  return costed;
}

template <class Before>
std::vector<BlockTask> Sorted(std::vector<Costed> costed, Before before) {
  std::stable_sort(costed.begin(), costed.end(), before);
  std::vector<BlockTask> tasks;
  tasks.reserve(costed.size());
  for (const Costed& c : costed) tasks.push_back(c.task);
  return tasks;
}

}  // namespace

std::vector<BlockTask> TasksByCost(const BlockMask& mask, const BlockRuns& runs) {
  return Sorted(AllTasks(mask, runs),
                [](const Costed& a, const Costed& b) { return a.entries > b.entries; });
}

std::vector<BlockTask> TasksByCostAndHead(const BlockMask& mask, const BlockRuns& runs) {
  const auto magnitude = [](const Costed& c) {
    return std::bit_width(static_cast<uint64_t>(c.entries));
  };
  return Sorted(AllTasks(mask, runs), [&](const Costed& a, const Costed& b) {
    if (magnitude(a) != magnitude(b)) return magnitude(a) > magnitude(b);
    if (a.task.kv_head != b.task.kv_head) return a.task.kv_head < b.task.kv_head;
    return a.entries > b.entries;
  });
}

std::vector<int32_t> IndexByBlock(const Documents& documents, const BlockList& list) {
  std::vector<int32_t> index(
      static_cast<size_t>(documents.rows * BlocksPerRow(documents.row_length)), -1);
  for (size_t i = 0; i < list.ids.size(); ++i) {
    index[static_cast<size_t>(list.ids[i])] = static_cast<int32_t>(i);
  }
  return index;
}

std::vector<int64_t> QueryTokenOffsets(const BlockMask& mask) {
  const Documents& documents = mask.documents();
  std::vector<int64_t> offsets(
      static_cast<size_t>(documents.rows * BlocksPerRow(documents.row_length)), -1);
  const BlockList& queries = mask.queries();
  for (size_t i = 0; i < queries.ids.size(); ++i) {
    offsets[static_cast<size_t>(queries.ids[i])] = queries.token_begin[i];
  }
  return offsets;
}

}  // namespace longspan::ops
