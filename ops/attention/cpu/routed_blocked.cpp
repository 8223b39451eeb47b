#include "ops/attention/cpu/routed_blocked.h"

#include <limits>

namespace longspan::ops::cpu {
namespace {

// Rows of an average list of one segment that are worth gathering: several full tiles.
constexpr int64_t kRowsWanted = 512;
constexpr int64_t kSmallestSegment = 1024;

}  // namespace

BlockedShape RoutedShape(const Tensor& q, int64_t kv_heads) {
  const int64_t dim = q.dim(2), padded = (dim + 15) / 16 * 16;
  return {.heads = q.dim(1),
          .kv_heads = kv_heads,
          .group = q.dim(1) / kv_heads,
          .dim = dim,
          .padded = padded,
          .ld = padded + 16};
}

void GatherRows(const BlockKernels& kernels, const BlockedShape& shape, const Tensor& from,
                std::span<const FlatRow> rows, float* to) {
  const int64_t step = shape.heads;  // from a token's row to the next token's
  for (size_t i = 0; i < rows.size();) {
    size_t end = i + 1;
    while (end < rows.size() && rows[end] == rows[end - 1] + step) ++end;
    PackBlock(kernels, shape, from, rows[i] * shape.dim, step * shape.dim,
              static_cast<int64_t>(end - i), to + static_cast<int64_t>(i) * shape.ld);
    i = end;
  }
}

void TransposeTo(const BlockKernels& kernels, const BlockedShape& shape, const float* from,
                 int64_t rows, float* to) {
  kernels.transpose(from, shape.ld, static_cast<int>(rows), static_cast<int>(shape.dim), to);
}

std::vector<Segment> SegmentsOf(const RoutedQueries& queries, const RoutedLists& lists,
                                int64_t kv_heads) {
  const int64_t wanted = kRowsWanted * std::max<int64_t>(1, queries.most_candidates) /
                         (lists.width * (lists.heads / kv_heads));
  const int64_t rows = (std::max(kSmallestSegment, wanted) + 63) / 64 * 64;
  std::vector<Segment> segments;
  int64_t begin = 0;
  for (const RoutedQueries::Range& range : queries.RangesOf(rows)) {
    const int64_t end = std::min(lists.rows, begin + rows);
    for (int64_t h = 0; h < kv_heads; ++h) {
      segments.push_back({begin, end, h, range.first, range.last});
    }
    begin = end;
  }
  // Later tokens have more blocks to choose from.
  std::reverse(segments.begin(), segments.end());
  return segments;
}

void RowsOfSegment(const RoutedLists& lists, const Segment& segment, int64_t block, int64_t group,
                   std::vector<FlatRow>& rows) {
  rows.clear();
  const int64_t* offsets = lists.offsets.data<int64_t>();
  const int32_t* list = lists.query_rows.data<int32_t>();
  for (int64_t h = segment.kv_head * group; h < (segment.kv_head + 1) * group; ++h) {
    const int32_t* end = list + offsets[block * lists.heads + h + 1];
    for (const int32_t* row =
             std::lower_bound(list + offsets[block * lists.heads + h], end, segment.begin);
         row < end && *row < segment.end; ++row) {
      rows.push_back(*row * lists.heads + h);
    }
  }
}

std::vector<KeyTask> KeyTasks(const RoutedBlocks& blocks, const RoutedLists& lists,
                              int64_t kv_heads) {
  const int64_t* offsets = lists.offsets.data<int64_t>();
  const int64_t group = lists.heads / kv_heads;
  std::vector<KeyTask> tasks;
  for (int64_t block = 0; block < blocks.count(); ++block) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t list = block * lists.heads + h * group;
      const int64_t entries = offsets[list + group] - offsets[list];
      if (entries == 0) continue;
      const int64_t tokens = blocks.TokensOf(block);
      for (int64_t first = 0; first < tokens; first += kGradientKeys) {
        tasks.push_back({block, h, first, std::min(kGradientKeys, tokens - first), entries});
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const KeyTask& a, const KeyTask& b) { return a.entries > b.entries; });
  return tasks;
}

void LoadRowStatistics(const RoutedBackwardArgs& args, std::span<const FlatRow> rows, float* lse,
                       float* delta) {
  for (size_t i = 0; i < rows.size(); ++i) {
    lse[i] = static_cast<float>(kLog2E * static_cast<double>(args.lse.data<float>()[rows[i]]));
    delta[i] = args.delta.data<float>()[rows[i]];
  }
  std::fill(lse + rows.size(), lse + 64, std::numeric_limits<float>::infinity());
  std::fill(delta + rows.size(), delta + 64, 0.0f);
}

}  // namespace longspan::ops::cpu
