#include <cublasLt.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "tests/emulated_cuda/emulator.h"
#include "tests/emulated_cuda/tally.h"

struct cublasLtContext {
  int device = 0;
};
struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  cudaDataType_t scale = CUDA_R_32F;
  int32_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
  int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
};
struct cublasLtMatrixLayoutOpaque_t {
  uint32_t type = CUDA_R_32F;
  int32_t order = CUBLASLT_ORDER_COL;
  uint64_t rows = 0, columns = 0;
  int64_t leading = 0;
  int32_t batches = 1;
};
struct cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace_bytes = 0;
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
  uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};

namespace {

using Layout = cublasLtMatrixLayoutOpaque_t;

constexpr size_t kMostWorkspace = size_t{64} << 10;  // that an algorithm here asks for
constexpr uint32_t kWidestAccess = 16;               // bytes; a promise of more is not used

template <class T>
cublasStatus_t Make(T** out) {
  if (out == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *out = new T;
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t Destroy(T* p) {
  if (p == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  delete p;
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t Set(T& field, const void* value, size_t bytes) {
  if (value == nullptr || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&field, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

size_t ElementBytes(const Layout& layout) { return layout.type == CUDA_R_16BF ? 2 : 4; }
size_t Bytes(const Layout& layout) {
  const bool by_column = layout.order == CUBLASLT_ORDER_COL;
  const uint64_t lines = by_column ? layout.columns : layout.rows;
  const uint64_t length = by_column ? layout.rows : layout.columns;
  return ((lines - 1) * static_cast<uint64_t>(layout.leading) + length) * ElementBytes(layout);
}

bool Valid(const Layout& layout) {
  const uint64_t length = layout.order == CUBLASLT_ORDER_COL ? layout.rows : layout.columns;
  return layout.rows > 0 && layout.columns > 0 && layout.leading > 0 &&
         static_cast<uint64_t>(layout.leading) >= length;
}

struct Problem {
  cublasLtMatmulDescOpaque_t product;
  Layout a, b, c, d;

  bool TransposedA() const { return product.transpose_a != CUBLAS_OP_N; }
  bool TransposedB() const { return product.transpose_b != CUBLAS_OP_N; }
  uint64_t m() const { return d.rows; }
  uint64_t n() const { return d.columns; }
  uint64_t k() const { return TransposedA() ? a.rows : a.columns; }

  cublasStatus_t Check() const {
    if (!Valid(a) || !Valid(b) || !Valid(c) || !Valid(d)) return CUBLAS_STATUS_INVALID_VALUE;
    const bool fits = (TransposedA() ? a.columns : a.rows) == m() &&
                      (TransposedB() ? b.rows : b.columns) == n() &&
                      (TransposedB() ? b.columns : b.rows) == k() && c.rows == m() &&
                      c.columns == n();
    if (!fits) return CUBLAS_STATUS_INVALID_VALUE;
    const bool bf16 = a.type == CUDA_R_16BF && b.type == CUDA_R_16BF &&
                      (d.type == CUDA_R_16BF || d.type == CUDA_R_32F);
    const bool f32 = a.type == CUDA_R_32F && b.type == CUDA_R_32F && d.type == CUDA_R_32F;
    const bool known = (bf16 || f32) && c.type == d.type && product.scale == CUDA_R_32F &&
                       product.pointer_mode == CUBLASLT_POINTER_MODE_HOST &&
                       product.epilogue == CUBLASLT_EPILOGUE_DEFAULT && a.batches == 1 &&
                       b.batches == 1 && c.batches == 1 && d.batches == 1 && c.order == d.order;
    return known ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
  }
};

// What an algorithm stands on, kept in its opaque words.
struct Needs {
  uint64_t workspace_bytes;
  uint32_t alignment[4];
  uint64_t shape;  // the algorithm is for one problem
};

uint64_t ShapeHash(const Problem& p) {
  uint64_t h = 1469598103934665603u;
  const auto add = [&h](uint64_t value) { h = (h ^ value) * 1099511628211u; };
  for (const Layout* l : {&p.a, &p.b, &p.c, &p.d}) {
    add(l->type);
    add(static_cast<uint64_t>(l->order));
    add(l->rows);
    add(l->columns);
    add(static_cast<uint64_t>(l->leading));
  }
  add(static_cast<uint64_t>(p.product.compute));
  add(static_cast<uint64_t>(p.product.transpose_a) * 4 +
      static_cast<uint64_t>(p.product.transpose_b));
  return h;
}

bool Aligned(const void* p, uint32_t to) {
  return reinterpret_cast<uintptr_t>(p) % std::min(to, kWidestAccess) == 0;
}

bool OnDevice(const void* p, size_t bytes) {
  const auto location = longspan::emulated::Locate(p, bytes);
  return location.place != longspan::emulated::Place::kHost && location.whole;
}

// Keeps `bits` upper bits of the mantissa, to nearest even.
float Round(float x, int bits) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return x;
  const int drop = 23 - bits;
  const uint32_t half = (1u << (drop - 1)) - 1 + (u >> drop & 1u);
  return std::bit_cast<float>((u + half) & ~((1u << drop) - 1));
}

float Element(const void* data, const Layout& layout, uint64_t row, uint64_t column) {
  const auto leading = static_cast<uint64_t>(layout.leading);
  const uint64_t i =
      layout.order == CUBLASLT_ORDER_COL ? column * leading + row : row * leading + column;
  if (layout.type == CUDA_R_32F) return static_cast<const float*>(data)[i];
  return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(data)[i]} << 16);
}

void Store(void* data, const Layout& layout, uint64_t row, uint64_t column, float value) {
  const auto leading = static_cast<uint64_t>(layout.leading);
  const uint64_t i =
      layout.order == CUBLASLT_ORDER_COL ? column * leading + row : row * leading + column;
  if (layout.type == CUDA_R_32F) {
    static_cast<float*>(data)[i] = value;
    return;
  }
  const float rounded = std::isnan(value) ? std::bit_cast<float>(0x7fff0000u) : Round(value, 7);
  static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) >> 16);
}

// op(X) as f32, with the extent of the sum outermost: [k][other].
std::vector<float> Packed(const Problem& p, const void* data, const Layout& layout, bool sum_is_row,
                          uint64_t other) {
  const uint64_t k = p.k();
  std::vector<float> out(k * other);
  const int bits = p.product.compute == CUBLAS_COMPUTE_32F_FAST_TF32   ? 10
                   : p.product.compute == CUBLAS_COMPUTE_32F_FAST_16BF ? 7
                                                                       : 23;
  for (uint64_t s = 0; s < k; ++s) {
    for (uint64_t i = 0; i < other; ++i) {
      const float x = sum_is_row ? Element(data, layout, s, i) : Element(data, layout, i, s);
      out[s * other + i] = bits == 23 ? x : Round(x, bits);
    }
  }
  return out;
}

struct Operands {
  const void *a, *b, *c;
  void* d;
  float alpha, beta;
};

void Multiply(const Problem& p, const Operands& x) {
  const uint64_t m = p.m(), n = p.n(), k = p.k();
  const std::vector<float> a = Packed(p, x.a, p.a, p.TransposedA(), m);
  const std::vector<float> b = Packed(p, x.b, p.b, !p.TransposedB(), n);
  constexpr uint64_t kColumns = 4;
  std::vector<float> sums(m * kColumns);
  for (uint64_t first = 0; first < n; first += kColumns) {
    const uint64_t columns = std::min(kColumns, n - first);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (uint64_t s = 0; s < k; ++s) {
      const float* left = &a[s * m];
      for (uint64_t j = 0; j < columns; ++j) {
        const float factor = b[s * n + first + j];
        float* sum = &sums[j * m];
        for (uint64_t i = 0; i < m; ++i) sum[i] += left[i] * factor;
      }
    }
    for (uint64_t j = 0; j < columns; ++j) {
      for (uint64_t i = 0; i < m; ++i) {
        float value = x.alpha * sums[j * m + i];
        if (x.beta != 0) value += x.beta * Element(x.c, p.c, i, first + j);
        Store(x.d, p.d, i, first + j, value);
      }
    }
  }
}

}  // namespace

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "another CUBLAS_STATUS";
  }
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
size_t cublasLtGetVersion() { return 130000; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  const cublasStatus_t status = Make(handle);
  if (status == CUBLAS_STATUS_SUCCESS) cudaGetDevice(&(*handle)->device);
  return status;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return Destroy(handle); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* product, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  const cublasStatus_t status = Make(product);
  if (status == CUBLAS_STATUS_SUCCESS) {
    (*product)->compute = compute;
    (*product)->scale = scale;
  }
  return status;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  if (product == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
      return Set(product->compute, value, bytes);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
      return Set(product->scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
      return Set(product->pointer_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return Set(product->transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return Set(product->transpose_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return Set(product->epilogue, value, bytes);
  }
  return CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) { return Destroy(product); }

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type,
                                          uint64_t rows, uint64_t columns, int64_t leading) {
  const cublasStatus_t status = Make(layout);
  if (status == CUBLAS_STATUS_SUCCESS) {
    (*layout)->type = type;
    (*layout)->rows = rows;
    (*layout)->columns = columns;
    (*layout)->leading = leading;
  }
  return status;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
  if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
      return Set(layout->type, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
      return Set(layout->order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
      return Set(layout->rows, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
      return Set(layout->columns, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD:
      return Set(layout->leading, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
      return Set(layout->batches, value, bytes);
  }
  return CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return Destroy(layout);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return Make(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
  if (preference == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      return Set(preference->workspace_bytes, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      return Set(preference->reductions, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      return Set(preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES],
                 value, bytes);
  }
  return CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return Destroy(preference);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* returned) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (product == nullptr || a == nullptr || b == nullptr || c == nullptr || d == nullptr ||
      preference == nullptr || requested < 1 || results == nullptr || returned == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  *returned = 0;
  const Problem problem{*product, *a, *b, *c, *d};
  if (const auto status = problem.Check(); status != CUBLAS_STATUS_SUCCESS) return status;
  Needs needs{};
  needs.workspace_bytes = std::min<uint64_t>(preference->workspace_bytes, kMostWorkspace);
  std::copy_n(preference->alignment, 4, needs.alignment);
  const Layout* layouts[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    if (needs.alignment[i] < ElementBytes(*layouts[i])) return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  needs.shape = ShapeHash(problem);
  results[0] = {};
  static_assert(sizeof(Needs) <= sizeof(cublasLtMatmulAlgo_t));
  std::memcpy(&results[0].algo, &needs, sizeof needs);
  results[0].workspaceSize = needs.workspace_bytes;
  results[0].state = longspan::emulated::TakeFault(longspan::emulated::Fault::kGemmChoice)
                         ? CUBLAS_STATUS_NOT_SUPPORTED
                         : CUBLAS_STATUS_SUCCESS;
  results[0].wavesCount = 1;
  *returned = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                              const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout,
                              const void* b, cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (product == nullptr || a_layout == nullptr || b_layout == nullptr || c_layout == nullptr ||
      d_layout == nullptr || alpha == nullptr || beta == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const Problem problem{*product, *a_layout, *b_layout, *c_layout, *d_layout};
  if (const auto status = problem.Check(); status != CUBLAS_STATUS_SUCCESS) return status;
  Needs needs{};
  if (algorithm != nullptr) {
    std::memcpy(&needs, algorithm, sizeof needs);
    if (needs.shape != ShapeHash(problem)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (workspace_bytes < needs.workspace_bytes) return CUBLAS_STATUS_INVALID_VALUE;
  } else {
    needs.workspace_bytes = std::min(workspace_bytes, kMostWorkspace);
    const Layout* layouts[] = {a_layout, b_layout, c_layout, d_layout};
    for (int i = 0; i < 4; ++i) {
      needs.alignment[i] = static_cast<uint32_t>(ElementBytes(*layouts[i]));
    }
  }
  const Operands x{a, b, c, d, *static_cast<const float*>(alpha), *static_cast<const float*>(beta)};
  if (!Aligned(a, needs.alignment[0]) || !Aligned(b, needs.alignment[1]) ||
      (x.beta != 0 && !Aligned(c, needs.alignment[2])) || !Aligned(d, needs.alignment[3])) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (!OnDevice(a, Bytes(*a_layout)) || !OnDevice(b, Bytes(*b_layout)) ||
      !OnDevice(d, Bytes(*d_layout)) || (x.beta != 0 && !OnDevice(c, Bytes(*c_layout)))) {
    return CUBLAS_STATUS_EXECUTION_FAILED;  // a fault in the kernel on a GPU
  }
  const uint64_t scratch = needs.workspace_bytes;
  if (scratch > 0 && (!Aligned(workspace, 16) || !OnDevice(workspace, scratch))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  longspan::emulated::CountLaunch("cublasLtMatmul");
  const cudaError_t queued = longspan::emulated::Enqueue(stream, [=] {
    if (scratch > 0) std::memset(workspace, 0xff, scratch);
    Multiply(problem, x);
  });
  return queued == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
