// Compiled for AMX: nothing here may be shared with code that other processors run, so no standard
// headers and only internal linkage besides what the header declares.
#include <immintrin.h>

#include "ops/attention/cpu/bf16_kernels.h"

namespace longspan::ops::amx {
namespace {

constexpr int kLanes = 64;
constexpr int kLaneRow = 2 * kLanes;  // elements of a row of pairs
constexpr int kTile = 16;             // rows of a tile, f32 of its row
constexpr int kInner = 32;            // bf16 of a tile's row

struct alignas(64) TileConfig {
  unsigned char palette, start_row, reserved[14];
  unsigned short bytes_per_row[16];
  unsigned char rows[16];
};
// All eight tiles complete: 0-3 are results, 4 and 5 rows of a, 6 and 7 lanes of b.
constexpr TileConfig kConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// 32 (or, without a second row of tiles, 16) rows x 32 lanes of the product stay in tiles over the
// whole inner sum.
template <bool kTwo>
inline void Tiles(const Bf16Gemm& g, int row, int lane) {
  constexpr long kResultStride = kLanes * sizeof(float), kPairStride = kLaneRow * sizeof(uint16_t);
  const long a_stride = static_cast<long>(g.a_row) * static_cast<long>(sizeof(uint16_t));
  float* c = g.c + row * kLanes + lane;
  float* lower = c + kTile * kLanes;
  if (g.add) {
    _tile_loadd(0, c, kResultStride);
    _tile_loadd(1, c + kTile, kResultStride);
    if constexpr (kTwo) {
      _tile_loadd(2, lower, kResultStride);
      _tile_loadd(3, lower + kTile, kResultStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const uint16_t* a = g.a + row * g.a_row;
  const uint16_t* b = g.b + 2 * lane;
  for (int t = 0; t < g.inner; t += kInner) {
    _tile_loadd(6, b, kPairStride);
    _tile_loadd(4, a, a_stride);
    _tile_loadd(7, b + 2 * kTile, kPairStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, a + kTile * g.a_row, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += kInner;
    b += kInner / 2 * kLaneRow;
  }
  _tile_stored(0, c, kResultStride);
  _tile_stored(1, c + kTile, kResultStride);
  if constexpr (kTwo) {
    _tile_stored(2, lower, kResultStride);
    _tile_stored(3, lower + kTile, kResultStride);
  }
}

}  // namespace

void Configure() { _tile_loadconfig(&kConfig); }
void Release() { _tile_release(); }

void Gemm(const Bf16Gemm& g) {
  for (int lane = 0; lane < kLanes; lane += 2 * kTile) {
    int row = 0;
    for (; g.rows - row > kTile; row += 2 * kTile) Tiles<true>(g, row, lane);
    if (row < g.rows) Tiles<false>(g, row, lane);
  }
}

}  // namespace longspan::ops::amx
