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

// Arrays on the GPU and the struct that points to them.
template <class View>
struct Copy {
  Tensor first, second;
  View view;
};

template <class T>
const T* At(const Tensor& copy) {
  return reinterpret_cast<const T*>(copy.raw());
}

}  // namespace

const DeviceRoutedBlocks& OnDevice(Context& ctx, const RoutedBlocks& blocks) {
  using Blocks = Copy<DeviceRoutedBlocks>;
  return blocks.device_copies
      .Get<Blocks>(ctx,
                   [&] {
                     Blocks copy{Uploaded(ctx, blocks.begin), {}, {}};
                     copy.view = {blocks.count(), At<int64_t>(copy.first)};
                     return copy;
                   })
      .view;
}

const DeviceRoutedShare& OnDevice(Context& ctx, const RoutedShare& share) {
  using Share = Copy<DeviceRoutedShare>;
  return share.device_copies
      .Get<Share>(ctx,
                  [&] {
                    Share copy{Uploaded(ctx, share.block), Uploaded(ctx, share.begin), {}};
                    copy.view = {share.count(), At<int32_t>(copy.first), At<int64_t>(copy.second)};
                    return copy;
                  })
      .view;
}

const DeviceRoutedQueries& OnDevice(Context& ctx, const RoutedQueries& queries) {
  using Queries = Copy<DeviceRoutedQueries>;
  return queries.device_copies
      .Get<Queries>(ctx,
                    [&] {
                      Queries copy{Uploaded(ctx, queries.tiles),
                                   Uploaded(ctx, queries.RangesOf(DeviceRoutedQueries::kStretch)),
                                   {}};
                      copy.view = {static_cast<int64_t>(queries.tiles.size()),
                                   At<RoutedTile>(copy.first),
                                   At<RoutedQueries::Range>(copy.second)};
                      return copy;
                    })
      .view;
}

}  // namespace longspan::ops
