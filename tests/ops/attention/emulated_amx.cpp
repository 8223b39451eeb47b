#include "tests/ops/attention/emulated_amx.h"

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ops/attention/cpu/attention_cpu.h"

namespace longspan::test::emulated_amx {
namespace {

constexpr int kTiles = 8;  // of palette 1
constexpr int kMaxRows = 16, kMaxRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  bool written = false;  // since the configuration: hardware would read 0
  alignas(64) unsigned char data[kMaxRows][kMaxRowBytes];
  float F32(int row, int column) const { return Get<float>(row, column); }
  float BF16(int row, int column) const {
    const uint32_t bits = static_cast<uint32_t>(Get<uint16_t>(row, column)) << 16;
    // Denormals count as 0.
    return std::bit_cast<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
  }
  template <class T>
  T Get(int row, int column) const {
    T value;
    std::memcpy(&value, data[row] + column * static_cast<int>(sizeof(T)), sizeof(T));
    return value;
  }
};

struct Unit {
  bool configured = false;
  Config config;
  Tile tiles[kTiles];
};
thread_local Unit unit;
std::atomic<long> configured{0}, loads{0}, products{0};

void Require(bool holds, const char* what, int tile = -1) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s (tile %d)\n", what, tile);
  std::abort();
}

Tile& Configured(int tile) {
  Require(unit.configured, "a tile is used without a configuration", tile);
  Require(tile >= 0 && tile < kTiles, "there is no such tile", tile);
  Require(unit.config.rows[tile] != 0, "the tile is not configured", tile);
  return unit.tiles[tile];
}
const Tile& Written(int tile) {
  const Tile& t = Configured(tile);
  Require(t.written, "a tile is read before it is written", tile);
  return t;
}
void RequireStride(int tile, long stride) {
  Require(stride >= unit.config.row_bytes[tile], "rows in memory overlap", tile);
}

}  // namespace

void LoadConfig(const void* config) {
  Require(!unit.configured, "configured twice without a release between");
  std::memcpy(&unit.config, config, sizeof(Config));
  const Config& c = unit.config;
  Require(c.palette == 1, "the palette is not 1");
  Require(c.start_row == 0, "start_row is not 0");
  for (const uint8_t byte : c.reserved) Require(byte == 0, "a reserved byte is set");
  for (int i = 0; i < 16; ++i) {
    if (i >= kTiles) Require(c.rows[i] == 0 && c.row_bytes[i] == 0, "there is no such tile", i);
    Require((c.rows[i] == 0) == (c.row_bytes[i] == 0), "rows without bytes or bytes without rows",
            i);
    Require(c.rows[i] <= kMaxRows, "more than 16 rows", i);
    Require(c.row_bytes[i] <= kMaxRowBytes && c.row_bytes[i] % 4 == 0,
            "the bytes of a row are not a multiple of 4 up to 64", i);
  }
  unit.configured = true;
  for (Tile& tile : unit.tiles) tile.written = false;
  ++configured;
  ++loads;
}

void Release() {
  Require(unit.configured, "released without a configuration");
  unit.configured = false;
  --configured;
}

void Zero(int tile) {
  Tile& t = Configured(tile);
  std::memset(t.data, 0, sizeof t.data);
  t.written = true;
}

void Load(int tile, const void* base, long stride) {
  Tile& t = Configured(tile);
  RequireStride(tile, stride);
  std::memset(t.data, 0, sizeof t.data);
  for (int r = 0; r < unit.config.rows[tile]; ++r) {
    std::memcpy(t.data[r], static_cast<const char*>(base) + r * stride,
                unit.config.row_bytes[tile]);
  }
  t.written = true;
}

void Store(int tile, void* base, long stride) {
  const Tile& t = Written(tile);
  RequireStride(tile, stride);
  for (int r = 0; r < unit.config.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, t.data[r], unit.config.row_bytes[tile]);
  }
}

// sum[m][n] += the products of even elements, then those of odd ones, each summed in f32.
void DotProduct(int sum, int a, int b) {
  Require(sum != a && sum != b && a != b, "operands share a tile", sum);
  const Tile& left = Written(a);
  const Tile& right = Written(b);
  Written(sum);
  Tile& to = unit.tiles[sum];
  const Config& c = unit.config;
  Require(c.rows[sum] == c.rows[a], "sum and a have different rows", sum);
  Require(c.row_bytes[sum] == c.row_bytes[b], "sum and b have different columns", sum);
  Require(c.row_bytes[a] == 4 * c.rows[b], "a's columns are not b's rows", a);
  for (int m = 0; m < c.rows[sum]; ++m) {
    float even[kMaxRowBytes / 4] = {}, odd[kMaxRowBytes / 4] = {};
    const int columns = c.row_bytes[sum] / 4;
    for (int k = 0; k < c.rows[b]; ++k) {
      const float x0 = left.BF16(m, 2 * k), x1 = left.BF16(m, 2 * k + 1);
      for (int n = 0; n < columns; ++n) {
        even[n] += x0 * right.BF16(k, 2 * n);
        odd[n] += x1 * right.BF16(k, 2 * n + 1);
      }
    }
    for (int n = 0; n < columns; ++n) {
      const float value = to.F32(m, n) + (even[n] + odd[n]);
      std::memcpy(to.data[m] + 4 * n, &value, sizeof value);
    }
  }
  ++products;
}

Counts CountsSoFar() { return {configured, loads, products}; }

}  // namespace longspan::test::emulated_amx

namespace longspan::ops::cpu {

bool AmxTilesUsable() { return true; }

}  // namespace longspan::ops::cpu
