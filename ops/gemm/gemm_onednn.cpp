#include <algorithm>
#include <array>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>

#include "ops/core/parallel_for.h"
#include "ops/elementwise/elementwise.h"
#include "ops/gemm/gemm_tiles.h"

namespace longspan::ops::internal {
namespace {

using dnnl::memory;

// Everything oneDNN compiles a kernel for: one tile of C and how its operands are stored.
struct TileShape {
  int64_t m, n, k, lda, ldb, ldc;
  bool transpose_a, transpose_b, accumulate;
  DType operands, result;
  auto operator<=>(const TileShape&) const = default;
};

memory::data_type DnnlType(DType dtype) {
  return dtype == DType::kBF16 ? memory::data_type::bf16 : memory::data_type::f32;
}

const dnnl::engine& Engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// oneDNN runs inside our tasks and must not start threads of its own: the kernel it picks, and so
// the bits, would depend on their number.
const Context& OneThread() {
  static const Context context({.device = {}, .threads = 1});
  return context;
}

// A kernel for one tile shape. Execution takes its scratch memory from the caller, which makes it
// safe to share one kernel between threads.
class TileKernel {
 public:
  explicit TileKernel(const TileShape& s) : TileKernel(s, Describe(s)) {}

  size_t scratch_bytes() const { return scratch_.get_size(); }

  void Execute(std::byte* a, std::byte* b, std::byte* c, std::byte* scratch) const {
    thread_local dnnl::stream stream(Engine());
    const dnnl::engine& e = Engine();
    kernel_.execute(stream, {{DNNL_ARG_SRC, memory(a_, e, a)},
                             {DNNL_ARG_WEIGHTS, memory(b_, e, b)},
                             {DNNL_ARG_DST, memory(c_, e, c)},
                             {DNNL_ARG_SCRATCHPAD, memory(scratch_, e, scratch)}});
    stream.wait();
  }

 private:
  static dnnl::matmul::primitive_desc Describe(const TileShape& s) {
    const memory::data_type in = DnnlType(s.operands), out = DnnlType(s.result);
    using Dims = memory::dims;
    const memory::desc a({s.m, s.k}, in, s.transpose_a ? Dims{1, s.lda} : Dims{s.lda, 1});
    const memory::desc b({s.k, s.n}, in, s.transpose_b ? Dims{1, s.ldb} : Dims{s.ldb, 1});
    const memory::desc c({s.m, s.n}, out, Dims{s.ldc, 1});
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (s.accumulate) {
      dnnl::post_ops add;
      add.append_sum(1.0f);
      attributes.set_post_ops(add);
    }
    return {dnnl::matmul::desc(a, b, c), attributes, Engine()};
  }

  TileKernel(const TileShape&, const dnnl::matmul::primitive_desc& description)
      : a_(description.src_desc()),
        b_(description.weights_desc()),
        c_(description.dst_desc()),
        scratch_(description.scratchpad_desc()),
        kernel_(description) {}

  memory::desc a_, b_, c_, scratch_;
  dnnl::matmul kernel_;
};

// The kernels used last, shared by all threads of the process. Compiling one takes milliseconds;
// a training step uses a few dozen shapes again and again.
class KernelCache {
 public:
  std::shared_ptr<const TileKernel> Get(const TileShape& shape) {
    std::lock_guard lock(mutex_);
    const auto found = index_.find(shape);
    if (found != index_.end()) {
      recent_.splice(recent_.begin(), recent_, found->second);
      return found->second->second;
    }
    ScopedLibraryThreads one(OneThread());
    recent_.emplace_front(shape, std::make_shared<TileKernel>(shape));
    index_[shape] = recent_.begin();
    if (recent_.size() > kCapacity) {
      index_.erase(recent_.back().first);
      recent_.pop_back();
    }
    return recent_.front().second;
  }

 private:
  static constexpr size_t kCapacity = 1024;
  using Entry = std::pair<TileShape, std::shared_ptr<const TileKernel>>;
  std::mutex mutex_;
  std::list<Entry> recent_;
  std::map<TileShape, std::list<Entry>::iterator> index_;
};

std::shared_ptr<const TileKernel> KernelFor(const GemmCall& call, int64_t m, int64_t n) {
  static KernelCache cache;
  return cache.Get({m, n, call.k, call.lda(), call.ldb(), call.n, call.transpose_a,
                    call.transpose_b, call.accumulate, call.a.dtype(), call.c.dtype()});
}

}  // namespace

bool OneDnnHasBf16() {
  // A set of bits: instruction sets that this version has no name for contain those they extend.
  constexpr auto kNeeded = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & kNeeded) == kNeeded;
}

void RunOneDnn(Context& ctx, const GemmCall& call) {
  // 256 x 512 keeps the packed operands of a tile in the second cache level.
  const GemmTiling tiling = ChooseTiling(call.m, call.n, call.k, 256, 512);
  const int64_t down = (call.m + tiling.rows - 1) / tiling.rows;
  const int64_t across = (call.n + tiling.columns - 1) / tiling.columns;
  const auto height = [&](int64_t i) { return std::min(tiling.rows, call.m - i * tiling.rows); };
  const auto width = [&](int64_t j) {
    return std::min(tiling.columns, call.n - j * tiling.columns);
  };

  // Four shapes at most: inner, last row of tiles, last column, corner.
  std::array<std::array<std::shared_ptr<const TileKernel>, 2>, 2> kernels;
  size_t scratch_bytes = 0;
  for (const int64_t i : {int64_t{0}, down - 1}) {
    for (const int64_t j : {int64_t{0}, across - 1}) {
      auto& kernel = kernels[i == down - 1][j == across - 1];
      kernel = KernelFor(call, height(i), width(j));
      scratch_bytes = std::max(scratch_bytes, kernel->scratch_bytes());
    }
  }
  scratch_bytes = (scratch_bytes + 63) / 64 * 64;
  const int64_t workers = std::min<int64_t>(ctx.threads(), down * across);
  const Tensor scratch = ctx.Empty({workers, static_cast<int64_t>(scratch_bytes)}, DType::kU8);

  const auto in_bytes = static_cast<int64_t>(SizeOf(call.a.dtype()));
  const auto out_bytes = static_cast<int64_t>(SizeOf(call.c.dtype()));
  ParallelFor(ctx, down * across, [&](int64_t task, int worker) {
    const int64_t i = task / across, j = task % across;
    const int64_t row = i * tiling.rows, column = j * tiling.columns;
    ScopedLibraryThreads one(OneThread());
    kernels[i == down - 1][j == across - 1]->Execute(
        call.a.raw() + call.AOffset(row) * in_bytes, call.b.raw() + call.BOffset(column) * in_bytes,
        call.c.raw() + (row * call.n + column) * out_bytes,
        scratch.raw() + static_cast<size_t>(worker) * scratch_bytes);
  });
}

void RunOneDnnWidened(Context& ctx, const GemmCall& call) {
  const Tensor a = Cast(ctx, call.a, DType::kF32), b = Cast(ctx, call.b, DType::kF32);
  const bool direct = call.c.dtype() == DType::kF32;
  Tensor c = direct            ? call.c
             : call.accumulate ? Cast(ctx, call.c, DType::kF32)
                               : ctx.Empty(call.c.shape(), DType::kF32);
  RunOneDnn(ctx,
            {a, b, c, call.transpose_a, call.transpose_b, call.accumulate, call.m, call.n, call.k});
  if (!direct) CastInto(ctx, c, call.c);
}

}  // namespace longspan::ops::internal
