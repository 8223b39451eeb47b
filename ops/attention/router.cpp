#include "ops/attention/router.h"

#include <algorithm>

#include "ops/attention/arguments.h"
#include "ops/attention/block_mask.h"
#include "ops/attention/cuda/routed_cuda.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops {
namespace {

constexpr int64_t kGrain = 4;  // blocks of one task

template <class T>
void MeanOfBlock(const Tensor& k, const RoutedBlocks& blocks, int64_t block, Tensor& means) {
  using A = Accumulator<T>;
  const int64_t width = k.dim(1) * k.dim(2);
  A* mean = means.data<A>() + block * width;
  std::fill(mean, mean + width, A{0});
  const size_t b = static_cast<size_t>(block);
  for (int64_t t = blocks.begin[b]; t < blocks.begin[b + 1]; ++t) {
    const T* row = k.data<T>() + t * width;
    for (int64_t i = 0; i < width; ++i) mean[i] += static_cast<A>(row[i]);
  }
  const A share = A{1} / static_cast<A>(blocks.TokensOf(block));
  for (int64_t i = 0; i < width; ++i) mean[i] *= share;
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

std::vector<RoutedTile> QueryTilesOf(const RoutedBlocks& blocks) {
  std::vector<RoutedTile> tiles;
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const size_t i = static_cast<size_t>(b);
    for (int64_t t = blocks.begin[i]; t < blocks.begin[i + 1]; t += 64) {
      tiles.push_back({t, blocks.first_candidate[i], blocks.CandidatesOf(b),
                       static_cast<int32_t>(std::min<int64_t>(64, blocks.begin[i + 1] - t))});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const RoutedTile& a, const RoutedTile& b) {
    return a.candidates > b.candidates;
  });
  return tiles;
}

Tensor BlockMeans(Context& ctx, const Tensor& k, const RoutedBlocks& blocks) {
  constexpr const char* kOp = "BlockMeans";
  if (!k.defined() || k.rank() != 3 || !IsFloat(k.dtype()) || k.dim(0) != blocks.tokens()) {
    throw InvalidArgument(Str(kOp, ": k is ", k.defined() ? k.Describe() : "undefined",
                              " but must be f32, bf16 or f64 [", blocks.tokens(),
                              ", kv heads, head_dim]"));
  }
  internal::RequireDevice(ctx, kOp, "k", k);
  Tensor means = ctx.Empty({blocks.count(), k.dim(1), k.dim(2)}, AccumulatorOf(k.dtype()));
  if (ctx.device().kind == DeviceKind::kCuda) {
    internal::BlockMeansCuda(ctx, k, blocks, means);
    return means;
  }
  DispatchFloat(k.dtype(), kOp, [&]<class T>() {
    ParallelRanges(ctx, blocks.count(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) MeanOfBlock<T>(k, blocks, b, means);
    });
  });
  return means;
}

}  // namespace longspan::ops
