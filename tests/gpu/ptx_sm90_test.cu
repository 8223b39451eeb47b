// Each instruction of ptx_sm90.cuh against what plain code computes: the layouts of wgmma operands
// and tensor copies, and the hand-over between warpgroups.
#include "ops/core/cuda/ptx_sm90.cuh"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "ops/core/context.h"
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/launch.h"
#include "ops/core/cuda/tensor_map.cuh"
#include "tests/support/device.h"
#include "tests/support/numeric.h"

namespace longspan::test {
namespace {

using namespace cuda::sm90;

constexpr int kSlack = kSwizzleBytes;  // to align the tiles in shared memory

class PtxSm90Test : public testing::Test {
 protected:
  void SetUp() override {
    if (ctx_.cuda().properties().major != 9) GTEST_SKIP() << "instructions of sm_90a";
  }
  Tensor Bf16(Shape shape, const Vec& values) { return FromVec(ctx_, shape, DType::kBF16, values); }
  Tensor F32(Shape shape, const Vec& values) { return FromVec(ctx_, shape, DType::kF32, values); }

  // A launch with an attribute, which cuda::Launch has no use for so far.
  const cudaLaunchConfig_t* Config(cudaLaunchAttribute& attribute, unsigned blocks,
                                   unsigned threads) {
    config_.gridDim = dim3(blocks);
    config_.blockDim = dim3(threads);
    config_.stream = ctx_.cuda().stream();
    config_.attrs = &attribute;
    config_.numAttrs = 1;
    return &config_;
  }

  cudaLaunchConfig_t config_{};
  Context ctx_{{.device = {DeviceKind::kCuda, 0}}};
};

CUtensorMap Map2d(const Tensor& t, uint32_t box_columns, uint32_t box_rows, bool swizzle) {
  const uint64_t columns = static_cast<uint64_t>(t.dim(1)), size = SizeOf(t.dtype());
  const uint64_t dims[] = {columns, static_cast<uint64_t>(t.dim(0))}, strides[] = {columns * size};
  const uint32_t box[] = {box_columns, box_rows};
  return MakeTensorMap({.type = t.dtype() == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                        .data = t.raw(),
                        .dims = dims,
                        .strides = strides,
                        .box = box,
                        .swizzle = swizzle});
}

[[maybe_unused]] __device__ std::byte* Aligned(std::byte* shared) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(shared);
  return shared + (kSwizzleBytes - at % kSwizzleBytes) % kSwizzleBytes;
}

// ---- wgmma -----------------------------------------------------------------------------------

constexpr int kInner = 64;  // four instructions
constexpr int kBoxBytes = 64 * kRowBytes;

// out[64, kN] = A B with A [64, kInner] (or its transpose in memory) and B [kInner, kN], which lies
// as [kN, kInner] unless transposed.
template <int kN, bool kRegisters, int kTransposeA, int kTransposeB>
__global__ __launch_bounds__(128) void ProductKernel(const __grid_constant__ CUtensorMap a,
                                                     const __grid_constant__ CUtensorMap b,
                                                     const uint32_t* a_pairs, float* out) {
#ifdef LONGSPAN_SM90A
  LONGSPAN_DYNAMIC_SHARED(shared);
  __shared__ alignas(8) uint64_t barrier_storage;
  const uint32_t tile_a = Shared(Aligned(shared)), tile_b = tile_a + kBoxBytes;
  const uint32_t barrier = Shared(&barrier_storage);
  if (threadIdx.x == 0) {
    BarrierInit(barrier, 1);
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BarrierArriveExpect(barrier, kBoxBytes + kN * kInner * 2);
    LoadBox(tile_a, &a, barrier, 0, 0);
    for (int box = 0; box < (kTransposeB ? kN / 64 : 1); ++box) {
      LoadBox(tile_b + box * kBoxBytes, &b, barrier, 64 * box, 0);
    }
  }
  BarrierWait(barrier, 0);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  float d[kN / 2];
#pragma unroll
  for (float& x : d) x = 1e6f;  // the first step overwrites
#pragma unroll
  for (int inner = 0; inner < kInner; inner += 16) {
    WarpgroupFence(d);
    const uint64_t columns =
        kTransposeB ? InnerAcrossRows(tile_b, inner, kBoxBytes) : InnerContiguous(tile_b, inner);
    if constexpr (kRegisters) {
      const uint32_t* pair = a_pairs + row * (kInner / 2) + inner / 2 + lane % 4;
      const uint32_t rows[4] = {pair[0], pair[8 * (kInner / 2)], pair[4],
                                pair[8 * (kInner / 2) + 4]};
      Wgmma<kN, kTransposeB>(d, rows, columns, inner != 0);
    } else {
      const uint64_t rows =
          kTransposeA ? InnerAcrossRows(tile_a, inner, kBoxBytes) : InnerContiguous(tile_a, inner);
      Wgmma<kN, kTransposeA, kTransposeB>(d, rows, columns, inner != 0);
    }
    WarpgroupCommit();
    WarpgroupWait<0>(d);
  }
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[(row + i % 4 / 2 * 8) * kN + column] = d[i];
  }
#endif
}

Vec Transposed(const Vec& v, int rows, int columns) {
  Vec out(v.size());
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      out[static_cast<size_t>(c * rows + r)] = v[static_cast<size_t>(r * columns + c)];
    }
  }
  return out;
}

template <int kN, bool kRegisters, int kTransposeA, int kTransposeB>
void CheckProduct(Context& ctx) {
  SCOPED_TRACE(Str("n ", kN, kRegisters ? " registers" : "", kTransposeA ? " a^T" : "",
                   kTransposeB ? " b^T" : ""));
  const Vec a = Normal(64 * kInner, 1, DType::kBF16), b = Normal(kInner * kN, 2, DType::kBF16);
  Vec want(64 * kN);
  for (size_t m = 0; m < 64; ++m) {
    for (size_t n = 0; n < kN; ++n) {
      for (size_t k = 0; k < kInner; ++k) want[m * kN + n] += a[m * kInner + k] * b[k * kN + n];
    }
  }
  const Tensor ta =
      FromVec(ctx, {64, 64}, DType::kBF16, kTransposeA ? Transposed(a, 64, kInner) : a);
  const Tensor tb = kTransposeB
                        ? FromVec(ctx, {kInner, kN}, DType::kBF16, b)
                        : FromVec(ctx, {kN, kInner}, DType::kBF16, Transposed(b, kInner, kN));
  Tensor out = ctx.Empty({64, kN}, DType::kF32);
  cuda::Launch(ctx.cuda(), "Product", ProductKernel<kN, kRegisters, kTransposeA, kTransposeB>,
               {dim3(1), dim3(128), kBoxBytes + kN * kInner * 2 + kSlack}, Map2d(ta, 64, 64, true),
               Map2d(tb, 64, kTransposeB ? 64 : kN, true),
               reinterpret_cast<const uint32_t*>(ta.raw()), out.data<float>());
  EXPECT_LT(RelMax(ToVec(out), want), 1e-6);
}

template <int kN>
void CheckProducts(Context& ctx) {
  CheckProduct<kN, false, 0, 0>(ctx);
  CheckProduct<kN, false, 0, 1>(ctx);
  CheckProduct<kN, false, 1, 0>(ctx);
  CheckProduct<kN, false, 1, 1>(ctx);
  CheckProduct<kN, true, 0, 0>(ctx);
  CheckProduct<kN, true, 0, 1>(ctx);
}

TEST_F(PtxSm90Test, ProductsOfEveryLayout) {
  CheckProducts<64>(ctx_);
  CheckProducts<128>(ctx_);
  CheckProducts<192>(ctx_);
  CheckProducts<256>(ctx_);
}

// ---- tensor copies ---------------------------------------------------------------------------

// Where a swizzled box has its elements.
__global__ void ReadBoxKernel(const __grid_constant__ CUtensorMap map, int x, int y,
                              uint16_t* out) {
#ifdef LONGSPAN_SM90A
  LONGSPAN_DYNAMIC_SHARED(shared);
  __shared__ alignas(8) uint64_t storage;
  std::byte* box = Aligned(shared);
  const uint32_t barrier = Shared(&storage);
  if (threadIdx.x == 0) {
    PrefetchMap(&map);
    BarrierInit(barrier, 1);
    BarrierInitFence();
    BarrierArriveExpect(barrier, kBoxBytes);
    LoadBox(Shared(box), &map, barrier, x, y);
  }
  __syncthreads();
  BarrierWait(barrier, 0);
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    out[i] = *reinterpret_cast<const uint16_t*>(box + BoxOffset(i / 64, i % 64));
  }
#endif
}

TEST_F(PtxSm90Test, SwizzledBoxesAndTheirEdge) {
  const Vec values = Normal(100 * 128, 3, DType::kBF16);
  const Tensor t = Bf16({100, 128}, values);
  Tensor out = ctx_.Empty({64, 64}, DType::kBF16);
  for (const auto& [x, y] : {std::pair{0, 0}, {64, 8}, {64, 50}, {96, 70}}) {
    cuda::Launch(ctx_.cuda(), "ReadBox", ReadBoxKernel, {dim3(1), dim3(64), kBoxBytes + kSlack},
                 Map2d(t, 64, 64, true), x, y, reinterpret_cast<uint16_t*>(out.raw()));
    Vec want(64 * 64);
    for (int r = 0; r < 64 && y + r < 100; ++r) {
      for (int c = 0; c < 64 && x + c < 128; ++c) {
        want[static_cast<size_t>(r * 64 + c)] = values[static_cast<size_t>((y + r) * 128 + x + c)];
      }
    }
    EXPECT_EQ(ToVec(out), want) << x << " " << y;
  }
}

// Box (x, y, z, w) of one 4-d tensor to the same place of another; 3-d boxes of its first slice are
// added to `sum`, which is 2-d.
__global__ void MoveBoxKernel(const __grid_constant__ CUtensorMap from,
                              const __grid_constant__ CUtensorMap slice,
                              const __grid_constant__ CUtensorMap to,
                              const __grid_constant__ CUtensorMap sum) {
#ifdef LONGSPAN_SM90A
  __shared__ alignas(128) float box[8 * 4 * 3 * 2], flat[8 * 4];
  __shared__ alignas(8) uint64_t storage;
  const uint32_t barrier = Shared(&storage);
  if (threadIdx.x == 0) {
    BarrierInit(barrier, 1);
    BarrierInitFence();
    BarrierArriveExpect(barrier, sizeof(box) + sizeof(flat));
    LoadBox(Shared(box), &from, barrier, 4, 1, 1, 1);
    LoadBox(Shared(flat), &slice, barrier, 4, 2, 1);
    BarrierWait(barrier, 0);
    StoreBox(&to, Shared(box), 4, 1, 1, 1);
    AddBox(&sum, Shared(flat), 8, 1);
    StoreCommit();
    StoreWaitRead<0>();
    StoreWait<0>();
  }
#endif
}

TEST_F(PtxSm90Test, BoxesOfThreeAndFourDims) {
  constexpr uint64_t kDims[] = {16, 6, 5, 4};  // innermost first
  constexpr uint64_t kStrides[] = {64, 64 * 6, 64 * 6 * 5};
  const Vec values = Normal(16 * 6 * 5 * 4, 4);
  const Tensor from = F32({4, 5, 6, 16}, values);
  Tensor to = ctx_.Zeros({4, 5, 6, 16}, DType::kF32);
  const Tensor sum = F32({6, 16}, Vec(96, 0.5));
  const auto map = [&](const Tensor& t, int rank, std::initializer_list<uint32_t> box) {
    return MakeTensorMap({.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                          .data = t.raw(),
                          .dims = std::span(kDims).first(static_cast<size_t>(rank)),
                          .strides = std::span(kStrides).first(static_cast<size_t>(rank - 1)),
                          .box = std::span(box.begin(), box.size()),
                          .swizzle = false});
  };
  cuda::Launch(ctx_.cuda(), "MoveBox", MoveBoxKernel, {dim3(1), dim3(32)},
               map(from, 4, {8, 4, 3, 2}), map(from, 3, {8, 4, 1}), map(to, 4, {8, 4, 3, 2}),
               Map2d(sum, 8, 4, false));
  Vec want(values.size()), want_sum(96, 0.5);
  const auto at = [](int w, int z, int y, int x) {
    return static_cast<size_t>(((w * 5 + z) * 6 + y) * 16 + x);
  };
  for (int w = 1; w < 3; ++w) {
    for (int z = 1; z < 4; ++z) {
      for (int y = 1; y < 5; ++y) {
        for (int x = 4; x < 12; ++x) want[at(w, z, y, x)] = values[at(w, z, y, x)];
      }
    }
  }
  for (int y = 0; y < 4; ++y) {
    for (int x = 0; x < 8; ++x) {
      want_sum[static_cast<size_t>((y + 1) * 16 + x + 8)] += values[at(0, 1, y + 2, x + 4)];
    }
  }
  EXPECT_EQ(ToVec(to), want);
  EXPECT_LT(RelMax(ToVec(sum), want_sum), 1e-7);
}

// Block 0 loads for both blocks of the cluster; block 1 says first that its barrier is there.
__global__ void MulticastKernel(const __grid_constant__ CUtensorMap map, float* out) {
#ifdef LONGSPAN_SM90A
  __shared__ alignas(128) float box[8 * 4];
  __shared__ alignas(8) uint64_t storage[2];
  const uint32_t full = Shared(&storage[0]), ready = Shared(&storage[1]), rank = ClusterRank();
  if (threadIdx.x == 0) {
    BarrierInit(full, 1);
    BarrierInit(ready, 2);
    BarrierInitFence();
  }
  ClusterSync();
  if (threadIdx.x == 0) {
    BarrierArriveExpect(full, sizeof(box));
    BarrierArriveRemote(ready, 0);
    if (rank == 0) {
      BarrierWaitCluster(ready, 0);
      LoadBoxMulticast(Shared(box), &map, full, 3, 8, 1);
    }
  }
  __syncthreads();
  BarrierWait(full, 0);
  out[rank * 32 + threadIdx.x] = box[threadIdx.x];
  ClusterSync();
#endif
}

TEST_F(PtxSm90Test, MulticastReachesTheWholeCluster) {
  const Vec values = Normal(6 * 16, 5);
  const Tensor t = F32({6, 16}, values);
  Tensor out = ctx_.Empty({2, 32}, DType::kF32);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  LONGSPAN_CUDA(cudaLaunchKernelEx(Config(cluster, 2, 32), MulticastKernel, Map2d(t, 8, 4, false),
                                   out.data<float>()));
  Vec want(64);
  for (size_t i = 0; i < 64; ++i) want[i] = values[(i % 32 / 8 + 1) * 16 + i % 8 + 8];
  EXPECT_EQ(ToVec(out), want);
}

// ---- pipelines -------------------------------------------------------------------------------

// A producer warpgroup feeds two consumers through two buffers; they double in registers and add to
// `out` by bulk additions, the second after the first.
constexpr int kPiece = 256;  // floats: one for each thread of the consumers
__global__ __launch_bounds__(384, 1) void PipelineKernel(const float* in, int pieces, float* out) {
#ifdef LONGSPAN_SM90A
  __shared__ alignas(128) float buffer[2][kPiece], result[kPiece];
  __shared__ alignas(8) uint64_t storage[4];
  const auto full = [&](int i) { return Shared(&storage[i % 2]); };
  const auto empty = [&](int i) { return Shared(&storage[2 + i % 2]); };
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      BarrierInit(full(i), 1);
      BarrierInit(empty(i), kPiece);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    GiveRegisters<24>();
    if (threadIdx.x / 32 == 0 && ElectOne()) {
      for (int i = 0; i < pieces; ++i) {
        BarrierWait(empty(i), (i / 2 % 2) ^ 1);
        BarrierArriveExpect(full(i), sizeof(buffer[0]));
        LoadBulk(Shared(buffer[i % 2]), in + i * kPiece, sizeof(buffer[0]), full(i));
      }
    }
  } else {
    TakeRegisters<240>();
    const int thread = static_cast<int>(threadIdx.x) - 128;
    float sum = 0;
    for (int i = 0; i < pieces; ++i) {
      BarrierWait(full(i), i / 2 % 2);
      sum += 2 * buffer[i % 2][thread];
      BarrierArrive(empty(i));
    }
    result[thread] = sum;
    ProxyFence();
    constexpr int kTurn = 1, kHalf = kPiece / 2;
    NamedSync(2 + thread / kHalf, kHalf);
    if (thread / kHalf == 1) NamedSync(kTurn, kPiece);
    if (thread % kHalf == 0) {
      AddBulk(out + thread, Shared(result + thread), kHalf * sizeof(float));
      StoreBulk(out + kPiece + thread, Shared(result + thread), kHalf * sizeof(float));
      StoreCommit();
      StoreWait<0>();
    }
    if (thread / kHalf == 0) NamedArrive(kTurn, kPiece);
  }
#endif
}

TEST_F(PtxSm90Test, ProducerAndConsumers) {
  constexpr int kPieces = 7;
  const Vec in = Normal(kPieces * kPiece, 6);
  Tensor out = F32({2, kPiece}, Vec(2 * kPiece, 100));
  const Tensor input = F32({kPieces, kPiece}, in);
  cuda::Launch(ctx_.cuda(), "Pipeline", PipelineKernel, {dim3(1), dim3(384)}, input.data<float>(),
               kPieces, out.data<float>());
  Vec want(2 * kPiece);
  for (size_t t = 0; t < kPiece; ++t) {
    for (size_t i = 0; i < kPieces; ++i) want[kPiece + t] += 2 * in[i * kPiece + t];
    want[t] = 100 + want[kPiece + t];
  }
  EXPECT_LT(RelMax(ToVec(out), want), 1e-6);
}

// ---- warps and grids -------------------------------------------------------------------------

// Four 8 x 8 matrices beside each other, stored straight and transposed; and how many lanes a warp
// elects.
__global__ void StoreMatrixKernel(uint16_t* out, int* elected) {
#ifdef LONGSPAN_SM90A
  __shared__ alignas(128) uint16_t tile[2][8][32];
  const uint32_t lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t r[4];
  for (uint32_t m = 0; m < 4; ++m) {  // element (row, column) of matrix m is 64 m + 8 row + column
    const uint32_t low = 64 * m + 8 * g + 2 * t;
    r[m] = low | (low + 1) << 16;
  }
  StoreMatrix4(Shared(&tile[0][lane % 8][lane / 8 * 8]), r);
  StoreMatrix4Transposed(Shared(&tile[1][lane % 8][lane / 8 * 8]), r);
  __syncwarp();
  const uint16_t* all = &tile[0][0][0];
  for (uint32_t i = lane; i < 512; i += 32) out[i] = all[i];
  const unsigned votes = __ballot_sync(0xffffffffu, ElectOne());
  if (lane == 0) *elected = __popc(votes);
#endif
}

TEST_F(PtxSm90Test, StoresMatrices) {
  Tensor out = ctx_.Empty({256}, DType::kI32), elected = ctx_.Empty({1}, DType::kI32);
  cuda::Launch(ctx_.cuda(), "StoreMatrix", StoreMatrixKernel, {dim3(1), dim3(32)},
               reinterpret_cast<uint16_t*>(out.raw()), elected.data<int32_t>());
  std::vector<uint16_t> host(512);
  int32_t lanes = 0;
  CopyToHost(out, host.data());
  CopyToHost(elected, &lanes);
  EXPECT_EQ(lanes, 1);
  for (size_t row = 0; row < 8; ++row) {
    for (size_t column = 0; column < 32; ++column) {
      const size_t m = column / 8, c = column % 8;
      EXPECT_EQ(host[row * 32 + column], 64 * m + 8 * row + c);
      EXPECT_EQ(host[256 + row * 32 + column], 64 * m + 8 * c + row);
    }
  }
}

__global__ void FirstKernel(int32_t* value) {
#ifdef LONGSPAN_SM90A
  LaunchDependents();
  for (int i = 0; i < 1000; ++i) __nanosleep(1000);  // the other kernel has long started
  *value = 7;
#endif
}
__global__ void SecondKernel(const int32_t* value, int32_t* seen) {
#ifdef LONGSPAN_SM90A
  WaitForPrevious();
  *seen = *static_cast<const volatile int32_t*>(value);
#endif
}

TEST_F(PtxSm90Test, DependentKernelsSeeWhatWasWritten) {
  Tensor value = ctx_.Zeros({1}, DType::kI32), seen = ctx_.Zeros({1}, DType::kI32);
  cuda::Launch(ctx_.cuda(), "First", FirstKernel, {dim3(1), dim3(1)}, value.data<int32_t>());
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  LONGSPAN_CUDA(cudaLaunchKernelEx(Config(overlap, 1, 1), SecondKernel,
                                   static_cast<const int32_t*>(value.data<int32_t>()),
                                   seen.data<int32_t>()));
  int32_t host = 0;
  CopyToHost(seen, &host);
  EXPECT_EQ(host, 7);
}

}  // namespace
}  // namespace longspan::test
