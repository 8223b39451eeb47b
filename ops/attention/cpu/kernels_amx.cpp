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

// `rows` x 32 lanes of a product joins what is there in one addition: small terms would be lost one
// by one in the sum of a long row.
inline void AddTiles(const float* product, int rows, float* c) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < 2 * kTile; n += kTile) {
      float* at = c + r * kLanes + n;
      _mm512_store_ps(
          at, _mm512_add_ps(_mm512_load_ps(at), _mm512_load_ps(product + r * 2 * kTile + n)));
    }
  }
}

// 32 (or, without a second row of tiles, 16) rows x 32 lanes of the product stay in tiles over the
// whole inner sum.
template <bool kTwo>
inline void Tiles(const Bf16Gemm& g, int row, int lane) {
  constexpr int kRows = kTwo ? 2 * kTile : kTile;
  constexpr long kPairStride = kLaneRow * sizeof(uint16_t);
  const long a_stride = static_cast<long>(g.a_row) * static_cast<long>(sizeof(uint16_t));
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < g.count; ++i) {
    const uint16_t* a = g.products[i].a + row * g.a_row;
    const uint16_t* b = g.products[i].b + 2 * lane;
    for (int t = 0; t < g.products[i].inner; t += kInner) {
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
  }
  alignas(64) float product[kRows * 2 * kTile];
  float* c = g.c + row * kLanes + lane;
  float* to = g.add ? product : c;
  const long ld = g.add ? 2 * kTile : kLanes, stride = ld * static_cast<long>(sizeof(float));
  _tile_stored(0, to, stride);
  _tile_stored(1, to + kTile, stride);
  if constexpr (kTwo) {
    _tile_stored(2, to + kTile * ld, stride);
    _tile_stored(3, to + kTile * ld + kTile, stride);
  }
  if (g.add) AddTiles(product, kRows, c);
}

}  // namespace

void Configure() { _tile_loadconfig(&kConfig); }
void Release() { _tile_release(); }

void Gemm(const Bf16Gemm& g) {
  const int parts = kLanes / (2 * kTile) * ((g.rows + 2 * kTile - 1) / (2 * kTile));
  int part = 0;
  for (int lane = 0; lane < kLanes; lane += 2 * kTile) {
    for (int row = 0; row < g.rows; row += 2 * kTile) {
      AskFor(g, part++, parts);
      if (g.rows - row > kTile) {
        Tiles<true>(g, row, lane);
      } else {
        Tiles<false>(g, row, lane);
      }
    }
  }
}

}  // namespace longspan::ops::amx
