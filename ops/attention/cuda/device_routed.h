#pragma once
#include <cstdint>

#include "ops/attention/router.h"
#include "ops/core/context.h"

namespace longspan::ops {

// RoutedBlocks in memory of a GPU.
struct DeviceRoutedBlocks {
  int64_t count, tile_count;
  const int64_t* begin;            // [count + 1]
  const int32_t* first_candidate;  // [count]
  const RoutedTile* tiles;
};

// Uploaded at the first use and kept with the blocks.
const DeviceRoutedBlocks& OnDevice(Context& ctx, const RoutedBlocks& blocks);

}  // namespace longspan::ops
