#pragma once
#include <cstdint>

#include "ops/core/device_code.h"

// Tiles of 16-bit elements in shared memory as TMA (128-byte swizzle) writes and wgmma reads them:
// boxes of 64 columns, each row 128 bytes, from a multiple of 1024 bytes on. Index arithmetic only,
// so that tests on the host check it.
namespace longspan::cuda::sm90 {

inline constexpr int kBoxColumns = 64;
inline constexpr int kRowBytes = 128;
inline constexpr int kSwizzleBytes = 1024;  // 8 rows; tiles begin at multiples

// The 16-byte chunks of a row are exchanged: address bits 4-6 with bits 7-9 by an exclusive or.
LONGSPAN_HD constexpr uint32_t Swizzled(uint32_t address) {
  return address ^ (address >> 3 & 0x70);
}
// Byte offset in a box of the element at (row, column).
LONGSPAN_HD constexpr uint32_t BoxOffset(uint32_t row, uint32_t column) {
  return Swizzled(row * kRowBytes + column * 2);
}

// The matrix descriptor of wgmma: addresses and strides in units of 16 bytes, 14 bits each.
LONGSPAN_HD constexpr uint64_t MatrixDescriptor(uint32_t address, uint32_t leading_bytes,
                                                uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
  return field(address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | kSwizzle128;
}

// Operand whose rows (of M or N) lie in the rows of a box, inner dimension contiguous ("K-major");
// `inner` (a multiple of 16, below 64) is where the 16 columns of one instruction begin. Groups of
// 8 rows follow each other.
LONGSPAN_HD constexpr uint64_t InnerContiguous(uint32_t box, uint32_t inner) {
  return MatrixDescriptor(box + inner * 2, 16, kSwizzleBytes);
}

// Operand whose inner dimension runs over the rows of boxes of 64 columns of M or N ("MN-major",
// taken with the transpose bit); `inner` is the first of 16 rows. The next 64 columns lie in the
// next box, box_bytes on.
LONGSPAN_HD constexpr uint64_t InnerAcrossRows(uint32_t box, uint32_t inner, uint32_t box_bytes) {
  return MatrixDescriptor(box + inner * kRowBytes, box_bytes, kSwizzleBytes);
}

}  // namespace longspan::cuda::sm90
