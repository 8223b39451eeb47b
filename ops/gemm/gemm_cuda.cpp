// cuBLASLt is column-major: a row-major C = op(A) op(B) is its C^T = op(B)^T op(A)^T, so the
// operands swap places and keep their transpositions.
#include <cublasLt.h>

#include <algorithm>
#include <map>
#include <memory>
#include <tuple>

#include "ops/core/cuda/runtime.h"
#include "ops/gemm/gemm_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr size_t kCachedPlans = 4096;  // a training run uses a few dozen
constexpr uint32_t kMaxAlignment = 256;
// Partial sums of a split K stay f32: one stored in the dtype of a bf16 C would be rounded early.
constexpr uint32_t kReductions =
    CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;

void Check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw CudaError(
      Str("Gemm: ", call, " of cuBLASLt failed with status ", static_cast<int>(status)));
}

cudaDataType_t TypeOf(DType dtype) { return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F; }

uint32_t AlignmentOf(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  return static_cast<uint32_t>(std::min<uintptr_t>(kMaxAlignment, address & (~address + 1)));
}

// Owns what `Destroy` releases.
template <class T, cublasStatus_t (*Destroy)(T)>
class Owned {
 public:
  Owned() = default;
  ~Owned() {
    if (value_ != nullptr) Destroy(value_);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  T* address() { return &value_; }
  T get() const { return value_; }

 private:
  T value_ = nullptr;
};

// Everything that decides which kernel runs.
using Key = std::tuple<int64_t, int64_t, int64_t, bool, bool, bool, DType, DType, uint32_t,
                       uint32_t, uint32_t>;
Key KeyOf(const GemmCall& c) {
  return {c.m,
          c.n,
          c.k,
          c.transpose_a,
          c.transpose_b,
          c.accumulate,
          c.a.dtype(),
          c.c.dtype(),
          AlignmentOf(c.a.raw()),
          AlignmentOf(c.b.raw()),
          AlignmentOf(c.c.raw())};
}

// One product as cuBLASLt wants it, and the kernel that its heuristics chose. The first operand of
// cuBLASLt is our B.
class Plan {
 public:
  Plan(cublasLtHandle_t handle, const GemmCall& c) {
    // Without _FAST_ in its name a compute type uses no TF32.
    Check(cublasLtMatmulDescCreate(product_.address(), CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "cublasLtMatmulDescCreate");
    Transpose(CUBLASLT_MATMUL_DESC_TRANSA, c.transpose_b);
    Transpose(CUBLASLT_MATMUL_DESC_TRANSB, c.transpose_a);
    Layout(first_, c.b.dtype(), c.transpose_b ? c.k : c.n, c.transpose_b ? c.n : c.k, c.ldb());
    Layout(second_, c.a.dtype(), c.transpose_a ? c.m : c.k, c.transpose_a ? c.k : c.m, c.lda());
    Layout(result_, c.c.dtype(), c.n, c.m, c.n);
    Choose(handle, c);
  }

  void Run(cublasLtHandle_t handle, const GemmCall& c, void* workspace, cudaStream_t stream) const {
    const float alpha = 1, beta = c.accumulate ? 1 : 0;
    Check(cublasLtMatmul(handle, product_.get(), &alpha, c.b.raw(), first_.get(), c.a.raw(),
                         second_.get(), &beta, c.c.raw(), result_.get(), c.c.raw(), result_.get(),
                         &algorithm_, workspace, kWorkspaceBytes, stream),
          "cublasLtMatmul");
  }

 private:
  using MatrixLayout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;

  void Transpose(cublasLtMatmulDescAttributes_t which, bool transposed) {
    const cublasOperation_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    Check(cublasLtMatmulDescSetAttribute(product_.get(), which, &operation, sizeof operation),
          "cublasLtMatmulDescSetAttribute");
  }
  static void Layout(MatrixLayout& layout, DType dtype, int64_t rows, int64_t columns,
                     int64_t leading) {
    Check(cublasLtMatrixLayoutCreate(layout.address(), TypeOf(dtype), static_cast<uint64_t>(rows),
                                     static_cast<uint64_t>(columns), leading),
          "cublasLtMatrixLayoutCreate");
  }

  void Choose(cublasLtHandle_t handle, const GemmCall& c) {
    Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference;
    Check(cublasLtMatmulPreferenceCreate(preference.address()), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, const auto& value) {
      Check(cublasLtMatmulPreferenceSetAttribute(preference.get(), which, &value, sizeof value),
            "cublasLtMatmulPreferenceSetAttribute");
    };
    const uint64_t workspace = kWorkspaceBytes;
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, kReductions);
    // The defaults promise 256 bytes, which views by row range do not keep.
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, AlignmentOf(c.b.raw()));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, AlignmentOf(c.a.raw()));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, AlignmentOf(c.c.raw()));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, AlignmentOf(c.c.raw()));
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, product_.get(), first_.get(), second_.get(), result_.get(), result_.get(),
        preference.get(), 1, &best, &found);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED ||
        (status == CUBLAS_STATUS_SUCCESS && (found == 0 || best.state != CUBLAS_STATUS_SUCCESS))) {
      throw Unsupported(Str("Gemm: cuBLASLt has no kernel for ", c.a.Describe(),
                            c.transpose_a ? "^T" : "", " times ", c.b.Describe(),
                            c.transpose_b ? "^T" : "", " into ", c.c.Describe()));
    }
    Check(status, "cublasLtMatmulAlgoGetHeuristic");
    algorithm_ = best.algo;
  }

  Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product_;
  MatrixLayout first_, second_, result_;
  cublasLtMatmulAlgo_t algorithm_{};
};

// What one GPU keeps between products. The workspace is safe to share: all products of a runtime
// are on its one stream.
class CublasLt {
 public:
  // The workspace is a block of the Context's allocator, which counts it and makes room for it; it
  // is never given back there, because the runtime outlives the allocators of its tensors.
  explicit CublasLt(Context& ctx) : runtime_(ctx.cuda()) {
    runtime_.MakeCurrent();
    Check(cublasLtCreate(handle_.address()), "cublasLtCreate");
    workspace_ = ctx.allocator().Allocate(kWorkspaceBytes, MemoryCategory::kWorkspace);
  }
  ~CublasLt() { cudaFreeAsync(workspace_, runtime_.stream()); }

  void Run(const GemmCall& call) {
    runtime_.MakeCurrent();
    const Key key = KeyOf(call);
    auto found = plans_.find(key);
    if (found == plans_.end()) {
      if (plans_.size() >= kCachedPlans) plans_.clear();
      found = plans_.emplace(key, std::make_unique<Plan>(handle_.get(), call)).first;
    }
    found->second->Run(handle_.get(), call, workspace_, runtime_.stream());
    if (runtime_.sync_checks()) runtime_.Synchronize();
  }

 private:
  cuda::Runtime& runtime_;
  Owned<cublasLtHandle_t, cublasLtDestroy> handle_;
  void* workspace_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace

void RunCublasLt(Context& ctx, const GemmCall& call) {
  std::shared_ptr<void>& place = ctx.cuda().Library("cublasLt");
  if (place == nullptr) place = std::make_shared<CublasLt>(ctx);
  static_cast<CublasLt*>(place.get())->Run(call);
}

}  // namespace longspan::ops::internal
