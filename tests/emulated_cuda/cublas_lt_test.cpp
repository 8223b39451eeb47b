// The emulated cuBLASLt against f64 products.
#include <cublasLt.h>

#include <bit>
#include <cmath>

#include "ops/core/dtype.h"
#include "tests/emulated_cuda/device_test.h"

namespace longspan::cuda {
namespace {

// D = alpha op(A) op(B) + beta C with column-major or row-major matrices whose leading dimension is
// longer than it needs to be.
struct Case {
  uint64_t m, n, k;
  bool transpose_a = false, transpose_b = false;
  cudaDataType_t in = CUDA_R_32F, out = CUDA_R_32F;
  float alpha = 1, beta = 0;
  cublasLtOrder_t order = CUBLASLT_ORDER_COL;
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
};

class CublasLtTest : public DeviceTest {
 protected:
  void SetUp() override { ASSERT_EQ(cublasLtCreate(&handle_), CUBLAS_STATUS_SUCCESS); }
  void TearDown() override {
    EXPECT_EQ(cublasLtDestroy(handle_), CUBLAS_STATUS_SUCCESS);
    DeviceTest::TearDown();
  }

  struct Matrix {
    uint64_t rows, columns, leading;
    cublasLtOrder_t order;
    cudaDataType_t type;
    std::vector<double> values;  // as stored
    void* data = nullptr;
    cublasLtMatrixLayout_t layout = nullptr;
    size_t At(uint64_t row, uint64_t column) const {
      return order == CUBLASLT_ORDER_COL ? column * leading + row : row * leading + column;
    }
  };

  // Values that the type holds exactly unless `fine`.
  Matrix Make(uint64_t rows, uint64_t columns, cudaDataType_t type, cublasLtOrder_t order,
              uint64_t seed, bool fine = false) {
    const bool by_column = order == CUBLASLT_ORDER_COL;
    Matrix x{rows, columns, (by_column ? rows : columns) + 3, order, type, {}};
    x.values.resize(x.leading * (by_column ? columns : rows));
    uint64_t state = seed * 2654435761u + 1;
    for (double& v : x.values) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      v = (static_cast<double>(state >> 56) - 128) / 64;
      if (fine) v += static_cast<float>(std::ldexp(static_cast<double>(state >> 33 & 1023), -22));
    }
    x.data = Store(x);
    EXPECT_EQ(
        cublasLtMatrixLayoutCreate(&x.layout, type, rows, columns, static_cast<int64_t>(x.leading)),
        CUBLAS_STATUS_SUCCESS);
    const int32_t value = order;
    EXPECT_EQ(cublasLtMatrixLayoutSetAttribute(x.layout, CUBLASLT_MATRIX_LAYOUT_ORDER, &value,
                                               sizeof value),
              CUBLAS_STATUS_SUCCESS);
    return x;
  }
  void* Store(const Matrix& x) {
    if (x.type == CUDA_R_32F) {
      return Device(std::vector<float>(x.values.begin(), x.values.end()));
    }
    std::vector<uint16_t> bits;
    for (const double v : x.values) bits.push_back(BF16(static_cast<float>(v)).bits);
    return Device(bits);
  }
  std::vector<double> Load(const Matrix& x) {
    std::vector<double> values;
    if (x.type == CUDA_R_32F) {
      for (const float v : Host(static_cast<const float*>(x.data), x.values.size())) {
        values.push_back(v);
      }
    } else {
      for (const uint16_t bits : Host(static_cast<const uint16_t*>(x.data), x.values.size())) {
        values.push_back(std::bit_cast<float>(uint32_t{bits} << 16));
      }
    }
    return values;
  }

  cublasLtMatmulDesc_t Product(const Case& c) {
    cublasLtMatmulDesc_t product = nullptr;
    EXPECT_EQ(cublasLtMatmulDescCreate(&product, c.compute, CUDA_R_32F), CUBLAS_STATUS_SUCCESS);
    const cublasOperation_t a = c.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t b = c.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    EXPECT_EQ(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a),
              CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b),
              CUBLAS_STATUS_SUCCESS);
    return product;
  }

  // Largest error relative to the largest expected magnitude; what lies between the columns must
  // keep its value.
  double Error(const Case& c, bool fine = false) {
    const Matrix a =
        Make(c.transpose_a ? c.k : c.m, c.transpose_a ? c.m : c.k, c.in, c.order, 1, fine);
    const Matrix b =
        Make(c.transpose_b ? c.n : c.k, c.transpose_b ? c.k : c.n, c.in, c.order, 2, fine);
    const Matrix d = Make(c.m, c.n, c.out, c.order, 3);
    const auto product = Product(c);
    EXPECT_EQ(
        cublasLtMatmul(handle_, product, &c.alpha, a.data, a.layout, b.data, b.layout, &c.beta,
                       d.data, d.layout, d.data, d.layout, nullptr, nullptr, 0, runtime_.stream()),
        CUBLAS_STATUS_SUCCESS);
    std::vector<double> expected = d.values;
    double largest = 0;
    for (uint64_t i = 0; i < c.m; ++i) {
      for (uint64_t j = 0; j < c.n; ++j) {
        double sum = 0;
        for (uint64_t k = 0; k < c.k; ++k) {
          sum += a.values[c.transpose_a ? a.At(k, i) : a.At(i, k)] *
                 b.values[c.transpose_b ? b.At(j, k) : b.At(k, j)];
        }
        double& e = expected[d.At(i, j)];
        e = c.alpha * sum + c.beta * e;
        largest = std::max(largest, std::abs(e));
      }
    }
    const std::vector<double> got = Load(d);
    double error = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      error = std::max(error, std::abs(got[i] - expected[i]) / largest);
    }
    for (const Matrix* x : {&a, &b, &d}) cublasLtMatrixLayoutDestroy(x->layout);
    cublasLtMatmulDescDestroy(product);
    return error;
  }

  cublasLtHandle_t handle_ = nullptr;
};

TEST_F(CublasLtTest, AllTransposesTypesOrdersAndScales) {
  for (const bool transpose_a : {false, true}) {
    for (const bool transpose_b : {false, true}) {
      for (const auto order : {CUBLASLT_ORDER_COL, CUBLASLT_ORDER_ROW}) {
        for (const auto& [alpha, beta] : {std::pair{1.0f, 0.0f}, {1.0f, 1.0f}, {-0.5f, 2.0f}}) {
          Case c{13, 6, 37, transpose_a, transpose_b};
          c.alpha = alpha, c.beta = beta, c.order = order;
          EXPECT_LT(Error(c), 1e-6);
          c.in = CUDA_R_16BF;
          EXPECT_LT(Error(c), 1e-6);
          c.out = CUDA_R_16BF;
          EXPECT_LT(Error(c), 1.0 / 256);
        }
      }
    }
  }
  EXPECT_LT(Error({1, 1, 1}), 1e-6);
  EXPECT_LT(Error({1, 9, 300}), 1e-6);
}

TEST_F(CublasLtTest, FastComputeTypesRoundTheOperands) {
  Case c{8, 8, 8};
  EXPECT_LT(Error(c, true), 2e-7);
  c.compute = CUBLAS_COMPUTE_32F_PEDANTIC;
  EXPECT_LT(Error(c, true), 2e-7);
  for (const auto fast : {CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_32F_FAST_16BF}) {
    c.compute = fast;
    const double error = Error(c, true);
    EXPECT_GT(error, 2e-6);
    EXPECT_LT(error, 1e-2);
  }
}

TEST_F(CublasLtTest, BetaZeroDoesNotReadC) {
  Case c{4, 4, 4};
  const Matrix a = Make(4, 4, CUDA_R_32F, c.order, 1), b = Make(4, 4, CUDA_R_32F, c.order, 2);
  const Matrix d = Make(4, 4, CUDA_R_32F, c.order, 3);
  runtime_.Set(d.data, 0xff, d.values.size() * 4);
  const auto product = Product(c);
  ASSERT_EQ(
      cublasLtMatmul(handle_, product, &c.alpha, a.data, a.layout, b.data, b.layout, &c.beta,
                     d.data, d.layout, d.data, d.layout, nullptr, nullptr, 0, runtime_.stream()),
      CUBLAS_STATUS_SUCCESS);
  const std::vector<double> got = Load(d);
  for (uint64_t i = 0; i < 4; ++i) {
    for (uint64_t j = 0; j < 4; ++j) EXPECT_FALSE(std::isnan(got[d.At(i, j)]));
  }
  for (const Matrix* x : {&a, &b, &d}) cublasLtMatrixLayoutDestroy(x->layout);
  cublasLtMatmulDescDestroy(product);
}

TEST_F(CublasLtTest, WrongUseIsRefused) {
  Case c{8, 4, 16};
  const Matrix a = Make(8, 16, CUDA_R_32F, c.order, 1), b = Make(16, 4, CUDA_R_32F, c.order, 2),
               d = Make(8, 4, CUDA_R_32F, c.order, 3);
  const auto product = Product(c);
  cublasLtMatmulPreference_t preference = nullptr;
  ASSERT_EQ(cublasLtMatmulPreferenceCreate(&preference), CUBLAS_STATUS_SUCCESS);
  const uint64_t most = 1 << 20;
  ASSERT_EQ(cublasLtMatmulPreferenceSetAttribute(
                preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most),
            CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cublasLtMatmulPreferenceSetAttribute(
                preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, 4),
            CUBLAS_STATUS_INVALID_VALUE);
  const auto choose = [&](cublasLtMatrixLayout_t left, cublasLtMatmulHeuristicResult_t* best) {
    int found = 0;
    return cublasLtMatmulAlgoGetHeuristic(handle_, product, left, b.layout, d.layout, d.layout,
                                          preference, 1, best, &found);
  };
  cublasLtMatmulHeuristicResult_t best{};
  ASSERT_EQ(choose(a.layout, &best), CUBLAS_STATUS_SUCCESS);
  ASSERT_GT(best.workspaceSize, 0u);
  void* workspace = Device<char>(best.workspaceSize);
  const auto multiply = [&](const void* left, cublasLtMatrixLayout_t layout, void* scratch,
                            size_t bytes) {
    return cublasLtMatmul(handle_, product, &c.alpha, left, layout, b.data, b.layout, &c.beta,
                          d.data, d.layout, d.data, d.layout, &best.algo, scratch, bytes,
                          runtime_.stream());
  };
  EXPECT_EQ(multiply(a.data, a.layout, workspace, best.workspaceSize), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(multiply(a.data, a.layout, workspace, best.workspaceSize - 1),
            CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(multiply(a.data, a.layout, nullptr, best.workspaceSize), CUBLAS_STATUS_INVALID_VALUE);
  // Less aligned than the preference promised by default.
  EXPECT_EQ(multiply(static_cast<char*>(a.data) + 4, a.layout, workspace, best.workspaceSize),
            CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(multiply(a.values.data(), a.layout, workspace, best.workspaceSize),
            CUBLAS_STATUS_EXECUTION_FAILED);
  const auto refused = [&](uint64_t rows, uint64_t columns, int64_t leading, cudaDataType_t type,
                           cublasStatus_t expected) {
    cublasLtMatrixLayout_t wrong = nullptr;
    ASSERT_EQ(cublasLtMatrixLayoutCreate(&wrong, type, rows, columns, leading),
              CUBLAS_STATUS_SUCCESS);
    cublasLtMatmulHeuristicResult_t result{};
    EXPECT_EQ(choose(wrong, &result), expected);
    EXPECT_EQ(multiply(a.data, wrong, workspace, best.workspaceSize), expected);
    cublasLtMatrixLayoutDestroy(wrong);
  };
  refused(8, 16, 7, CUDA_R_32F, CUBLAS_STATUS_INVALID_VALUE);  // columns overlap
  refused(8, 15, 8, CUDA_R_32F, CUBLAS_STATUS_INVALID_VALUE);
  refused(9, 16, 9, CUDA_R_32F, CUBLAS_STATUS_INVALID_VALUE);
  refused(8, 0, 8, CUDA_R_32F, CUBLAS_STATUS_INVALID_VALUE);
  refused(8, 16, 11, CUDA_R_16BF, CUBLAS_STATUS_NOT_SUPPORTED);  // f32 times bf16
  for (const Matrix* x : {&a, &b, &d}) cublasLtMatrixLayoutDestroy(x->layout);
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatmulDescDestroy(product);
}

}  // namespace
}  // namespace longspan::cuda
