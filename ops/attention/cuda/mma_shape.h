#pragma once
#include <algorithm>
#include <cstdint>

#include "ops/attention/block_mask.h"
#include "ops/core/device_code.h"

// Launch geometry and shared memory layouts of the tensor-core attention kernels, in plain C++ so
// that tests on the host check them.
namespace longspan::ops::mma {

inline constexpr int kBlock = static_cast<int>(kMaskBlock);  // keys (queries) per step
inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kMaxDim = 256;
inline constexpr int kMaxPairedDim = 128;  // above, a tile of queries has one head

// Head sizes with kernels of their own; others are filled up with zeros to the next one.
inline constexpr int kPaddedDims[] = {32, 64, 96, 128, 192, 256};
constexpr int PaddedDim(int64_t dim) {
  for (const int padded : kPaddedDims) {
    if (dim <= padded) return padded;
  }
  return 0;
}
// Calls f.operator()<kDim>() for the head size of the kernels that take `dim`, at most kMaxDim.
template <class F>
constexpr auto DispatchDim(int64_t dim, F f) {
  switch (PaddedDim(dim)) {
    case 32:
      return f.template operator()<32>();
    case 64:
      return f.template operator()<64>();
    case 96:
      return f.template operator()<96>();
    case 128:
      return f.template operator()<128>();
    case 192:
      return f.template operator()<192>();
    default:
      return f.template operator()<256>();
  }
}

// Tiles are [rows][dim] bf16 in shared memory, in chunks of 16 bytes. The chunks of a row are
// exchanged by an exclusive or with a number made of the row, such that eight neighbouring rows
// hold the same chunk in eight different groups of banks: ldmatrix then has no bank conflicts, and
// neither has the copy that fills whole rows.
template <int kDim>
LONGSPAN_HD constexpr int Twist(int row) {
  static_assert(kDim % 32 == 0);
  return kDim % 64 == 0 ? row & 7 : (row >> 1) & 3;
}
template <int kDim>
LONGSPAN_HD constexpr int ChunkOffset(int row, int chunk) {  // bytes
  return row * kDim * 2 + (chunk ^ Twist<kDim>(row)) * 16;
}
template <int kDim>
constexpr int TileBytes(int rows = kBlock) {
  return rows * kDim * 2;
}

// Row (of 16) and chunk (of 2) of a 16 x 16 tile that a lane names to ldmatrix.x4.
struct FragmentPlace {
  int row, chunk;
};
// Operand A, rows x inner; also operand B stored as [inner][columns], by the transposing load.
LONGSPAN_HD constexpr FragmentPlace PlaceInRows(int lane) { return {lane % 16, lane / 16}; }
// Operand B stored as [columns][inner].
LONGSPAN_HD constexpr FragmentPlace PlaceInColumns(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// Byte offset of what a lane names for rows [16 n, 16 n + 16) and chunks 2 p and 2 p + 1 of the
// tile at `tile`, where `lane` = ChunkOffset of its place. The twist of the chunks is one of the
// address because tiles begin, and 16 rows end, at multiples of the bytes that it moves within: no
// more than four different addresses are alive for a tile.
template <int kDim>
LONGSPAN_HD constexpr int FragmentOffset(int lane, int tile, int n, int p) {
  constexpr int kPairs = kDim % 64 == 0 ? 4 : 2;  // of chunks, that the twist moves within
  return ((tile + lane) ^ (p % kPairs * 32)) + (n * 16 * kDim * 2 + p / kPairs * (kPairs * 32));
}

// Which queries see which keys of two blocks: words[query][half], bit j of a half stands for key
// 32 * half + j.
inline constexpr int kMaskBytes = kBlock * 2 * 4;
// What a block of threads keeps about its task (TaskState), registers being scarce.
inline constexpr int kTaskBytes = 384;
inline constexpr int kListedSteps = 64;

// Forward. A warp owns 16 * kHeads rows; a block of threads holds the 64 tokens of a query block
// for kHeads query heads of one kv head, which share its list of key blocks, and so 64 or 128 rows.
// K and V blocks pass through a ring of tiles: K, V, K, V...
template <int kDim, int kHeads>
struct ForwardShape {
  static constexpr int kRing = kDim <= 128 ? 3 : 2;
  static constexpr int kQ = 0;
  static constexpr int kTiles = kQ + TileBytes<kDim>(kHeads * kBlock);
  static constexpr int kMask = kTiles + kRing * TileBytes<kDim>();
  static constexpr int kTask = kMask + kMaskBytes;
  static constexpr int kBytes = kTask + kTaskBytes;
  // Blocks of threads per multiprocessor that the registers shall allow.
  static constexpr int kResident = kHeads == 1 && kDim <= 64 ? 4 : kDim * kHeads <= 128 ? 3 : 2;
};

// Gradient of q: Q and dO stay, K is double-buffered because it is also the last operand of a step,
// V is free again in the middle of it.
template <int kDim, int kHeads>
struct QueryGradientShape {
  static constexpr int kQ = 0;
  static constexpr int kDOut = kQ + TileBytes<kDim>(kHeads * kBlock);
  static constexpr int kK = kDOut + TileBytes<kDim>(kHeads * kBlock);  // two tiles
  static constexpr int kV = kK + 2 * TileBytes<kDim>();
  static constexpr int kMask = kV + TileBytes<kDim>();
  static constexpr int kTask = kMask + kMaskBytes;
  static constexpr int kBytes = kTask + kTaskBytes;
  static constexpr int kStepKeys = kHeads == 2 || kDim >= 128 ? 32 : 64;  // scores held at a time
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kResident = kDim * kHeads <= 64 ? 3 : 2;  // what shared memory allows
#else
  static constexpr int kResident = kDim <= 64 ? 3 : 2;
#endif
};

// Gradients of k and v: K and V stay; Q is double-buffered, and up to 128 so is dO, which is free
// in the middle of a step otherwise. Above 128 a block accumulates half of the columns of dK and
// dV, and gridDim.y is 2.
inline constexpr int kStatisticsBytes = (kBlock + 2) * 8;
template <int kDim>
struct KeyGradientShape {
  static constexpr int kParts = kDim <= 128 ? 1 : 2;
  static constexpr int kColumns = kDim / kParts;
  static constexpr int kK = 0;
  static constexpr int kV = kK + TileBytes<kDim>();
  static constexpr int kQ = kV + TileBytes<kDim>();         // two tiles
  static constexpr int kDOut = kQ + 2 * TileBytes<kDim>();  // kDOuts tiles
  static constexpr int kDOuts = kDim <= 128 ? 2 : 1;
  // Two times {lse, delta} of 64 rows, which start one element later where their index is odd.
  static constexpr int kStatistics = kDOut + kDOuts * TileBytes<kDim>();
  static constexpr int kMask = kStatistics + 2 * kStatisticsBytes;
  static constexpr int kTask = kMask + kMaskBytes;
  static constexpr int kBytes = kTask + kTaskBytes;
  static constexpr int kStepQueries = kColumns >= 64 ? 32 : 64;
  static constexpr int kResident = kColumns <= 64 ? 3 : 2;
};

// How the query heads of a group are cut into tiles: pairs as far as they go where the kernel of
// `Shape` takes pairs and a block may have the memory for them, single heads for the rest.
struct HeadTiles {
  int pairs, singles;
};
template <template <int, int> class Shape, int kDim>
constexpr HeadTiles TilesOfGroup(int64_t group, int64_t shared_bytes) {
  const bool fits = kDim <= kMaxPairedDim && Shape<kDim, 2>::kBytes <= shared_bytes;
  const int pairs = fits ? static_cast<int>(group / 2) : 0;
  return {pairs, static_cast<int>(group) - 2 * pairs};
}

// The shared memory that a block must be able to have for both passes over heads of `dim`.
constexpr int64_t SharedBytesFor(int64_t dim) {
  return DispatchDim(dim, [&]<int kDim>() -> int64_t {
    return std::max({ForwardShape<kDim, 1>::kBytes, QueryGradientShape<kDim, 1>::kBytes,
                     KeyGradientShape<kDim>::kBytes});
  });
}

}  // namespace longspan::ops::mma
