// The emulated tensor-core instructions against element indices written out from the PTX manual, so
// that kernels which pass on the emulated device use the fragments of the real one.
#include "ops/core/cuda/ptx.cuh"

#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "ops/core/cuda/kernel.cuh"
#include "ops/core/dtype.h"
#include "tests/emulated_cuda/device_test.h"

namespace longspan::cuda {
namespace {

class PtxTest : public DeviceTest {};

// Element i of lane `lane` in the fragments of mma.m16n8k16 for 16-bit types.
struct Index {
  int row, column;
};
Index ElementOfA(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const bool upper = (i >= 0 && i < 2) || (i >= 4 && i < 6);
  return {upper ? group : group + 8, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Index ElementOfB(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
}
Index ElementOfC(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}

uint32_t Pair(uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; }

// d [16, 8] = a [16, 16] b [16, 8] + c [16, 8], all row-major, through registers alone.
__global__ void Product(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t left[4], right[2];
  for (int r = 0; r < 4; ++r) {
    const Index low = ElementOfA(lane, 2 * r), high = ElementOfA(lane, 2 * r + 1);
    left[r] = Pair(a[low.row * 16 + low.column], a[high.row * 16 + high.column]);
  }
  for (int r = 0; r < 2; ++r) {
    const Index low = ElementOfB(lane, 2 * r), high = ElementOfB(lane, 2 * r + 1);
    right[r] = Pair(b[low.row * 8 + low.column], b[high.row * 8 + high.column]);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    const Index at = ElementOfC(lane, i);
    sum[i] = c[at.row * 8 + at.column];
  }
  ptx::MmaBf16(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) {
    const Index at = ElementOfC(lane, i);
    d[at.row * 8 + at.column] = sum[i];
  }
}

// The same through shared memory: a [16, 16] and b [16, 8] there, rows of 16 and 8 elements.
__global__ void ProductFromShared(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  LONGSPAN_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x);
  auto* left = reinterpret_cast<uint16_t*>(shared);
  uint16_t* right = left + 16 * 16;
  ptx::CopyAsync16(left + lane * 8, a + lane * 8, true);
  if (lane < 16) ptx::CopyAsync16(right + lane * 8, b + lane * 8, true);
  ptx::CopyAsyncCommit();
  ptx::CopyAsyncWait<0>();
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[4];
  // Matrices of A: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  ptx::LoadMatrix4(fragment_a, left + lane % 16 * 16 + lane / 16 * 8);
  // B holds the sum's index in rows, the instruction wants it along a register: transposed. The
  // upper two matrices repeat the lower ones.
  ptx::LoadMatrix4Transposed(fragment_b, right + lane % 16 * 8);
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    const Index at = ElementOfC(lane, i);
    sum[i] = c[at.row * 8 + at.column];
  }
  ptx::MmaBf16(sum, fragment_a, fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) {
    const Index at = ElementOfC(lane, i);
    d[at.row * 8 + at.column] = sum[i];
  }
}

TEST_F(PtxTest, MatrixProductFollowsTheDocumentedLayout) {
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> c(128);
  // Small integers: all sums are exact.
  const auto value = [](size_t i) {
    return static_cast<float>(static_cast<int>(i * 37 % 31) - 15);
  };
  for (size_t i = 0; i < a.size(); ++i) a[i] = BF16(value(i)).bits;
  for (size_t i = 0; i < b.size(); ++i) b[i] = BF16(value(i * 3 + 1)).bits;
  for (size_t i = 0; i < c.size(); ++i) c[i] = value(i * 5 + 2);
  std::vector<float> expected(128);
  for (size_t row = 0; row < 16; ++row) {
    for (size_t n = 0; n < 8; ++n) {
      double sum = c[row * 8 + n];
      for (size_t k = 0; k < 16; ++k) {
        sum += static_cast<double>(value(row * 16 + k)) * value((k * 8 + n) * 3 + 1);
      }
      expected[row * 8 + n] = static_cast<float>(sum);
    }
  }
  const uint16_t *da = Device(a), *db = Device(b);
  const float* dc = Device(c);
  auto* d = Device<float>(128);
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    emulated::SetSeed(seed);
    Launch(runtime_, "Product", Product, {dim3(1), dim3(32)}, da, db, dc, d);
    EXPECT_EQ(Host(d, 128), expected);
    runtime_.Set(d, 0xff, 512);
    Launch(runtime_, "ProductFromShared", ProductFromShared, {dim3(1), dim3(32), 768}, da, db, dc,
           d);
    EXPECT_EQ(Host(d, 128), expected);
  }
}

// Element (row, column) of matrix m has the value 64 m + 8 row + column; the rows of a matrix lie
// apart and out of order.
__global__ void Matrices(bool transposed, uint32_t* out) {
  __shared__ __align__(16) uint16_t rows[32][24];
  const int lane = static_cast<int>(threadIdx.x);
  const int place = lane * 13 % 32;
  for (int j = 0; j < 8; ++j) rows[place][j] = static_cast<uint16_t>(lane * 8 + j);
  __syncwarp();
  uint32_t r[4];
  if (transposed) {
    ptx::LoadMatrix4Transposed(r, rows[place]);
  } else {
    ptx::LoadMatrix4(r, rows[place]);
  }
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}

TEST_F(PtxTest, LoadMatrixGivesEachLaneItsRowPart) {
  auto* out = Device<uint32_t>(128);
  for (const bool transposed : {false, true}) {
    Launch(runtime_, "Matrices", Matrices, {dim3(1), dim3(32)}, transposed, out);
    const std::vector<uint32_t> got = Host(out, 128);
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const auto at = [&](int row, int column) {
          if (transposed) std::swap(row, column);
          return static_cast<uint16_t>(64 * m + 8 * row + column);
        };
        const int row = lane / 4, column = lane % 4 * 2;
        EXPECT_EQ(got[lane * 4 + m], Pair(at(row, column), at(row, column + 1)))
            << lane << " " << m << " " << transposed;
      }
    }
  }
}

// Three groups of one copy each, then one copy in no group; what is there after each wait.
__global__ void Groups(const float4* in, float* out) {
  __shared__ __align__(16) float4 target[5];
  for (auto& t : target) t = make_float4(1, 1, 1, 1);
  const auto look = [&](int step) {
    for (int i = 0; i < 5; ++i) out[step * 5 + i] = target[i].w;
  };
  for (int i = 0; i < 3; ++i) {
    ptx::CopyAsync16(&target[i], &in[i], true);
    if (i == 1) ptx::CopyAsync16(&target[4], nullptr, false);
    ptx::CopyAsyncCommit();
  }
  ptx::CopyAsync16(&target[3], &in[3], true);
  look(0);
  ptx::CopyAsyncWait<2>();
  look(1);
  ptx::CopyAsyncWait<1>();
  look(2);
  ptx::CopyAsyncWait<0>();
  look(3);
  ptx::CopyAsyncCommit();
  ptx::CopyAsyncWait<0>();
  look(4);
}

TEST_F(PtxTest, CopiesArriveAtTheWaitForTheirGroup) {
  std::vector<float4> values;
  for (float i = 0; i < 4; ++i) values.push_back(make_float4(0, 0, 0, 10 + i));
  const float4* in = Device(values);
  auto* out = Device<float>(25);
  Launch(runtime_, "Groups", Groups, {dim3(1), dim3(1)}, in, out);
  std::vector<float> got = Host(out, 25);
  for (float& x : got) x = std::isnan(x) ? -1 : x;
  const std::vector<float> expected = {-1, -1, -1, -1, -1,  // nothing before a wait
                                       10, -1, -1, -1, -1,  //
                                       10, 11, -1, -1, 0,   // the invalid copy gives zeros
                                       10, 11, 12, -1, 0,   // not the copy without a group
                                       10, 11, 12, 13, 0};
  EXPECT_EQ(got, expected);
}

__global__ void Misplaced(const char* in, int what) {
  __shared__ __align__(16) char target[64];
  alignas(16) char local[32];
  if (what == 0) ptx::CopyAsync16(target + 8, in, true);
  if (what == 1) ptx::CopyAsync16(target, in + 4, true);
  if (what == 2) ptx::CopyAsync16(local, in, true);
  if (what == 3) ptx::CopyAsync16(const_cast<char*>(in), in, true);
  uint32_t r[4];
  if (what == 4) ptx::LoadMatrix4(r, target + 2);
  if (what == 5) ptx::LoadMatrix4(r, in);
  LONGSPAN_DYNAMIC_SHARED(shared);
  if (what == 6) ptx::CopyAsync16(shared + 64, in, true);
}

TEST_F(PtxTest, AddressesAreChecked) {
  const char* in = Device(std::vector<char>(64, 1));
  const char* reports[] = {"not a multiple of 16",  "not a multiple of 16", "outside shared memory",
                           "outside shared memory", "not at a multiple",    "outside shared memory",
                           "outside shared memory"};
  for (int what = 0; what < 7; ++what) {
#ifdef __SANITIZE_ADDRESS__
    if (what == 3 || what == 5) continue;  // where the places of memory are not known
#endif
    Launch(runtime_, "Misplaced", Misplaced, {dim3(1), dim3(32), 64}, in, what);
    ExpectFailure(reports[what]);
  }
}

TEST_F(PtxTest, PackBf16RoundsToNearestEven) {
  const float values[] = {0,           -0.0f,         1,           1.00390625f,
                          1.01171875f, -3.14159f,     1e-40f,      3.3895e38f,
                          3.4e38f,     INFINITY,      -INFINITY,   0.1f,
                          65504.f,     1.0039063692f, 1.00390613f, -1.0039063692f};
  for (const float x : values) {
    for (const float y : values) {
      EXPECT_EQ(ptx::PackBf16(x, y), Pair(BF16(x).bits, BF16(y).bits)) << x << " " << y;
    }
  }
  EXPECT_EQ(ptx::PackBf16(1.00390625f, 1.01171875f), 0x3f823f80u);  // ties to even
  EXPECT_EQ(ptx::PackBf16(NAN, -NAN), 0x7fff7fffu);
}

TEST_F(PtxTest, Exp2FlushesSubnormals) {
  EXPECT_EQ(ptx::Exp2(-INFINITY), 0);
  EXPECT_EQ(ptx::Exp2(0), 1);
  EXPECT_EQ(ptx::Exp2(-126), std::ldexp(1.0f, -126));
  EXPECT_EQ(ptx::Exp2(-126.5f), 0);
  EXPECT_EQ(ptx::Exp2(200), INFINITY);
  EXPECT_TRUE(std::isnan(ptx::Exp2(NAN)));
  for (float x = -20; x < 20; x += 0.37f) {
    EXPECT_NEAR(ptx::Exp2(x) / std::exp2(static_cast<double>(x)), 1, 3e-7);
  }
}

TEST_F(PtxTest, ReciprocalFlushesSubnormals) {
  EXPECT_EQ(ptx::Reciprocal(1), 1);
  EXPECT_EQ(ptx::Reciprocal(INFINITY), 0);
  EXPECT_EQ(ptx::Reciprocal(std::ldexp(1.0f, 126)), std::ldexp(1.0f, -126));
  EXPECT_EQ(ptx::Reciprocal(std::ldexp(1.5f, 126)), 0);
  EXPECT_EQ(ptx::Reciprocal(std::ldexp(1.0f, -127)), INFINITY);
  EXPECT_TRUE(std::isnan(ptx::Reciprocal(NAN)));
  for (float x = 1; x < 1e30f; x *= 2.37f) EXPECT_NEAR(ptx::Reciprocal(x) * x, 1, 3e-7);
}

}  // namespace
}  // namespace longspan::cuda
