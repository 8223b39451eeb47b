#include "ops/attention/router.h"

#include <algorithm>
#include <limits>

#include "ops/attention/arguments.h"
#include "ops/attention/cuda/routed_cuda.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops {
namespace {

constexpr int64_t kGrain = 4;  // parts of one task

template <class T>
void MeanOfPart(const Tensor& k, const RoutedBlocks& blocks, const RoutedShare& share, int64_t part,
                Tensor& means) {
  using A = Accumulator<T>;
  const int64_t width = k.dim(1) * k.dim(2);
  A* mean = means.data<A>() + part * width;
  std::fill(mean, mean + width, A{0});
  const size_t i = static_cast<size_t>(part);
  for (int64_t t = share.begin[i]; t < share.begin[i + 1]; ++t) {
    const T* row = k.data<T>() + t * width;
    for (int64_t d = 0; d < width; ++d) mean[d] += static_cast<A>(row[d]);
  }
  const A weight = A{1} / static_cast<A>(blocks.TokensOf(share.block[i]));
  for (int64_t d = 0; d < width; ++d) mean[d] *= weight;
}

}  // namespace

int64_t RoutedBlocks::MostCandidates() const {
  int64_t most = 0;
  for (int64_t b = 0; b < count(); ++b) most = std::max(most, CandidatesOf(b));
  return most;
}

std::vector<std::vector<int64_t>> RoutedBlocks::EndsByRow() const {
  std::vector<std::vector<int64_t>> ends(static_cast<size_t>(documents->rows));
  for (size_t b = 0; b < first_candidate.size(); ++b) {
    const int64_t row = begin[b] / documents->row_length;
    ends[static_cast<size_t>(row)].push_back(begin[b + 1] - row * documents->row_length);
  }
  return ends;
}

std::shared_ptr<const RoutedBlocks> RoutedBlocks::Build(
    int64_t block_size, std::shared_ptr<const Documents> documents) {
  if (!IsChoiceBlock(block_size)) {
    throw InvalidArgument(Str("routed attention: block_size is ", block_size,
                              "; it must be a multiple of 64 from 64 to 2^31"));
  }
  auto blocks = std::make_shared<RoutedBlocks>();
  blocks->block_size = block_size;
  blocks->begin.push_back(0);
  const int64_t length = documents->row_length;
  int64_t document = -1;
  int32_t first = 0;
  for (int64_t t = 0; t < documents->tokens(); t = blocks->begin.back()) {
    if (documents->doc_begin[static_cast<size_t>(t)] != document) {
      document = documents->doc_begin[static_cast<size_t>(t)];
      first = static_cast<int32_t>(blocks->count());
    }
    const int64_t row = t / length * length;
    const int64_t grid_end = row + ((t - row) / block_size + 1) * block_size;
    const int64_t document_end = documents->doc_end[static_cast<size_t>(t)];
    blocks->first_candidate.push_back(first);
    blocks->begin.push_back(std::min(grid_end, document_end));
  }
  blocks->documents = std::move(documents);
  return blocks;
}

RoutedShare RoutedShare::All(const RoutedBlocks& blocks) {
  RoutedShare share;
  share.begin = blocks.begin;
  for (int64_t b = 0; b < blocks.count(); ++b) share.block.push_back(static_cast<int32_t>(b));
  return share;
}

RoutedShare RoutedShare::Of(const RoutedBlocks& blocks, const BlockList& local) {
  RoutedShare share;
  share.begin.push_back(0);
  const int64_t length = blocks.documents->row_length;
  size_t b = 0;  // the block of the next token
  for (size_t i = 0; i < local.ids.size(); ++i) {
    if (i > 0 && local.ids[i] <= local.ids[i - 1]) {
      throw InvalidArgument(Str("routed attention: mask block ", local.ids[i], " follows block ",
                                local.ids[i - 1], " in local storage; they must ascend"));
    }
    int64_t token = BlockFirstToken(length, local.ids[i]);
    const int64_t end = token + BlockTokens(length, local.ids[i]);
    while (token < end) {
      while (blocks.begin[b + 1] <= token) ++b;
      const int64_t stop = std::min(end, blocks.begin[b + 1]);
      if (share.block.empty() || share.block.back() != static_cast<int32_t>(b)) {
        share.block.push_back(static_cast<int32_t>(b));
        share.begin.push_back(share.begin.back());
      }
      share.begin.back() += stop - token;
      token = stop;
    }
  }
  return share;
}

std::shared_ptr<const RoutedQueries> RoutedQueries::Of(const RoutedBlocks& blocks,
                                                       const RoutedShare& share) {
  auto queries = std::make_shared<RoutedQueries>();
  queries->rows = share.rows();
  queries->most_candidates = blocks.MostCandidates();
  for (size_t i = 0; i < share.block.size(); ++i) {
    const int32_t b = share.block[i];
    for (int64_t t = share.begin[i]; t < share.begin[i + 1]; t += 64) {
      queries->tiles.push_back(
          {t, blocks.first_candidate[static_cast<size_t>(b)], blocks.CandidatesOf(b),
           static_cast<int32_t>(std::min<int64_t>(64, share.begin[i + 1] - t))});
    }
  }
  std::stable_sort(
      queries->tiles.begin(), queries->tiles.end(),
      [](const RoutedTile& a, const RoutedTile& b) { return a.candidates > b.candidates; });
  return queries;
}

std::vector<RoutedQueries::Range> RoutedQueries::RangesOf(int64_t rows_each) const {
  const auto count = static_cast<size_t>((rows + rows_each - 1) / rows_each);
  std::vector<Range> ranges(count, {std::numeric_limits<int64_t>::max(), 0});
  for (const RoutedTile& tile : tiles) {
    const int64_t last = (tile.begin + tile.tokens - 1) / rows_each;
    for (int64_t i = tile.begin / rows_each; i <= last; ++i) {
      Range& range = ranges[static_cast<size_t>(i)];
      range.first = std::min(range.first, tile.first);
      range.last = std::max(range.last, tile.first + tile.candidates);
    }
  }
  return ranges;
}

Tensor BlockMeans(Context& ctx, const Tensor& k, const RoutedBlocks& blocks,
                  const RoutedShare& share, int64_t rows) {
  constexpr const char* kOp = "BlockMeans";
  if (!k.defined() || k.rank() != 3 || !IsFloat(k.dtype()) || k.dim(0) != share.rows()) {
    throw InvalidArgument(Str(kOp, ": k is ", k.defined() ? k.Describe() : "undefined",
                              " but must be f32, bf16 or f64 [", share.rows(),
                              ", kv heads, head_dim]"));
  }
  internal::RequireDevice(ctx, kOp, "k", k);
  rows = std::max(rows, share.count());
  Tensor means = ctx.Empty({rows, k.dim(1), k.dim(2)}, AccumulatorOf(k.dtype()));
  if (rows > share.count()) ctx.SetZero(means.Rows(share.count(), rows));
  if (share.count() == 0 || means.numel() == 0) return means;
  if (ctx.device().kind == DeviceKind::kCuda) {
    internal::BlockMeansCuda(ctx, k, blocks, share, means);
    return means;
  }
  DispatchFloat(k.dtype(), kOp, [&]<class T>() {
    ParallelRanges(ctx, share.count(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) MeanOfPart<T>(k, blocks, share, i, means);
    });
  });
  return means;
}

}  // namespace longspan::ops
