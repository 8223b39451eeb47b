#include "ops/attention/cuda/device_routed.h"

#include "ops/core/cuda/backend.h"

namespace longspan::ops {
namespace {

template <class T>
Tensor Uploaded(Context& ctx, const std::vector<T>& values) {
  const size_t bytes = values.size() * sizeof(T);
  Tensor copy = ctx.Empty({static_cast<int64_t>(bytes)}, DType::kU8);
  if (bytes > 0) cuda::Upload(ctx.cuda(), copy.raw(), values.data(), bytes);
  return copy;
}

struct Copy {
  Tensor begin, first_candidate, tiles;
  DeviceRoutedBlocks view;
};

}  // namespace

const DeviceRoutedBlocks& OnDevice(Context& ctx, const RoutedBlocks& blocks) {
  return blocks.device_copies
      .Get<Copy>(ctx,
                 [&] {
                   const std::vector<RoutedTile> tiles = QueryTilesOf(blocks);
                   Copy copy{Uploaded(ctx, blocks.begin),
                             Uploaded(ctx, blocks.first_candidate),
                             Uploaded(ctx, tiles),
                             {}};
                   copy.view = {.count = blocks.count(),
                                .tile_count = static_cast<int64_t>(tiles.size()),
                                .begin = reinterpret_cast<const int64_t*>(copy.begin.raw()),
                                .first_candidate =
                                    reinterpret_cast<const int32_t*>(copy.first_candidate.raw()),
                                .tiles = reinterpret_cast<const RoutedTile*>(copy.tiles.raw())};
                   return copy;
                 })
      .view;
}

}  // namespace longspan::ops
