#include <emulated_ptx.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "tests/emulated_cuda/block_runner.h"
#include "tests/emulated_cuda/memory.h"

namespace longspan::cuda::ptx {
namespace {

using emulated::BlockRunner;

constexpr uint32_t kWholeWarp = 0xffffffffu;

bool Aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

float LowHalf(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
float HighHalf(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

float Flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

uint32_t RoundToBf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;
  return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

struct Row {
  const void* address;
  uint32_t* registers;
};

template <bool kTransposed>
void LoadMatrices(void* const* operands, uint32_t) {
  uint16_t element[32][8];  // [8 m + row][column]
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(element[lane], static_cast<const Row*>(operands[lane])->address, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    uint32_t* out = static_cast<const Row*>(operands[lane])->registers;
    for (int m = 0; m < 4; ++m) {
      const uint16_t low = kTransposed ? element[8 * m + 2 * t][g] : element[8 * m + g][2 * t];
      const uint16_t high =
          kTransposed ? element[8 * m + 2 * t + 1][g] : element[8 * m + g][2 * t + 1];
      out[m] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
}

void CheckRow(const void* row) {
  BlockRunner& runner = BlockRunner::Current();
  if (!Aligned16(row)) runner.Fail("ldmatrix of a row that is not at a multiple of 16 bytes");
  if (!runner.MayBeShared(row, 16)) runner.Fail("ldmatrix of a row outside shared memory");
}

struct MmaOperand {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

void Multiply(void* const* operands, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
      a[row][column] = LowHalf(mine.a[i]);
      a[row][column + 1] = HighHalf(mine.a[i]);
      d[g + 8 * (i / 2)][2 * t + i % 2] = mine.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = i == 0 ? mine.b0 : mine.b1;
      b[2 * t + 8 * i][g] = LowHalf(pair);
      b[2 * t + 8 * i + 1][g] = HighHalf(pair);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[row][n] += a[row][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) mine.d[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

}  // namespace

void CopyAsync16(void* shared, const void* global, bool valid) {
  BlockRunner& runner = BlockRunner::Current();
  if (!Aligned16(shared)) runner.Fail("cp.async to an address that is not a multiple of 16");
  if (valid && !Aligned16(global)) {
    runner.Fail("cp.async from an address that is not a multiple of 16");
  }
  if (!runner.MayBeShared(shared, 16)) runner.Fail("cp.async to a place outside shared memory");
  if (valid && !emulated::MayBeDevice(global)) runner.Fail("cp.async from host memory");
  runner.StartCopy(shared, valid ? global : nullptr);
}
void CopyAsyncCommit() { BlockRunner::Current().CommitCopies(); }
void CopyAsyncWaitNewest(int groups) { BlockRunner::Current().FinishCopies(groups); }

void LoadMatrix4(uint32_t (&r)[4], const void* row) {
  CheckRow(row);
  Row mine{row, r};
  emulated::WarpCollective("ldmatrix", kWholeWarp, LoadMatrices<false>, &mine);
}
void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) {
  CheckRow(row);
  Row mine{row, r};
  emulated::WarpCollective("ldmatrix.trans", kWholeWarp, LoadMatrices<true>, &mine);
}
void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperand mine{d, a, b0, b1};
  emulated::WarpCollective("mma.sync", kWholeWarp, Multiply, &mine);
}

uint32_t PackBf16(float low, float high) { return RoundToBf16(high) << 16 | RoundToBf16(low); }

float Exp2(float x) { return Flushed(std::exp2(Flushed(x))); }
float Reciprocal(float x) { return Flushed(1.0f / Flushed(x)); }

}  // namespace longspan::cuda::ptx

namespace longspan::emulated {

void CheckAligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  BlockRunner::Current().Fail(
      "an access of several elements at an address that is not aligned to it");
}

}  // namespace longspan::emulated
