#pragma once
#include <cstdint>

#include "ops/attention/router.h"
#include "ops/core/context.h"

namespace longspan::ops {

// RoutedBlocks, RoutedShare and RoutedQueries in memory of a GPU.
struct DeviceRoutedBlocks {
  int64_t count;
  const int64_t* begin;  // [count + 1]
};
struct DeviceRoutedShare {
  int64_t count;
  const int32_t* block;  // [count]
  const int64_t* begin;  // [count + 1]
};
struct DeviceRoutedQueries {
  static constexpr int64_t kStretch = 64;  // rows
  int64_t tile_count;
  const RoutedTile* tiles;
  const RoutedQueries::Range* ranges;  // RangesOf(kStretch)
};

// Uploaded at the first use and kept with the object.
const DeviceRoutedBlocks& OnDevice(Context& ctx, const RoutedBlocks& blocks);
const DeviceRoutedShare& OnDevice(Context& ctx, const RoutedShare& share);
const DeviceRoutedQueries& OnDevice(Context& ctx, const RoutedQueries& queries);

}  // namespace longspan::ops
