#include <algorithm>
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
// packed_for is 0 where B is read as it is stored, else the height of the tiles for which oneDNN
// chose the layout of a packed copy.
struct TileShape {
  int64_t m, n, k, lda, ldb, ldc, packed_for;
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
  // `packed_b`: the layout of B that the kernel has to take, for a packed copy; empty where B is
  // read as it is stored, or where the kernel may choose that layout.
  TileKernel(const TileShape& s, const memory::desc& packed_b)
      : TileKernel(s, Describe(s, packed_b)) {}

  size_t scratch_bytes() const { return scratch_.get_size(); }
  const memory::desc& packed_b() const { return b_; }
  size_t packed_bytes() const { return b_.get_size(); }

  void Execute(std::byte* a, std::byte* b, std::byte* c, std::byte* scratch) const {
    const dnnl::engine& e = Engine();
    kernel_.execute(Stream(), {{DNNL_ARG_SRC, memory(a_, e, a)},
                               {DNNL_ARG_WEIGHTS, memory(b_, e, b)},
                               {DNNL_ARG_DST, memory(c_, e, c)},
                               {DNNL_ARG_SCRATCHPAD, memory(scratch_, e, scratch)}});
    Stream().wait();
  }

  // The kernel's copy of B as it is stored at `b`.
  void Pack(std::byte* b, std::byte* packed) const {
    const dnnl::engine& e = Engine();
    pack_.execute(Stream(),
                  {{DNNL_ARG_FROM, memory(stored_b_, e, b)}, {DNNL_ARG_TO, memory(b_, e, packed)}});
    Stream().wait();
  }

 private:
  static dnnl::stream& Stream() {
    thread_local dnnl::stream stream(Engine());
    return stream;
  }
  static memory::desc StoredB(const TileShape& s) {
    return {{s.k, s.n},
            DnnlType(s.operands),
            s.transpose_b ? memory::dims{1, s.ldb} : memory::dims{s.ldb, 1}};
  }
  static dnnl::matmul::primitive_desc Describe(const TileShape& s, const memory::desc& packed_b) {
    const memory::data_type in = DnnlType(s.operands), out = DnnlType(s.result);
    using Dims = memory::dims;
    const memory::desc a({s.m, s.k}, in, s.transpose_a ? Dims{1, s.lda} : Dims{s.lda, 1});
    const memory::desc b = s.packed_for == 0 ? StoredB(s)
                           : packed_b        ? packed_b
                                      : memory::desc({s.k, s.n}, in, memory::format_tag::any);
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

  TileKernel(const TileShape& s, const dnnl::matmul::primitive_desc& description)
      : a_(description.src_desc()),
        b_(description.weights_desc()),
        c_(description.dst_desc()),
        scratch_(description.scratchpad_desc()),
        stored_b_(StoredB(s)),
        kernel_(description) {
    if (s.packed_for == 0) return;
    pack_ = dnnl::reorder(dnnl::reorder::primitive_desc(Engine(), stored_b_, Engine(), b_));
  }

  memory::desc a_, b_, c_, scratch_, stored_b_;
  dnnl::matmul kernel_;
  dnnl::reorder pack_;
};

// The kernels used last, shared by all threads of the process. Compiling one takes milliseconds;
// a training step uses a few dozen shapes again and again.
class KernelCache {
 public:
  std::shared_ptr<const TileKernel> Get(const TileShape& shape) {
    std::lock_guard lock(mutex_);
    return GetLocked(shape);
  }

 private:
  std::shared_ptr<const TileKernel> GetLocked(const TileShape& shape) {
    const auto found = index_.find(shape);
    if (found != index_.end()) {
      recent_.splice(recent_.begin(), recent_, found->second);
      return found->second->second;
    }
    memory::desc packed_b;
    if (shape.packed_for != 0 && shape.packed_for != shape.m) {
      TileShape chooser = shape;
      chooser.m = shape.packed_for;
      packed_b = GetLocked(chooser)->packed_b();
    }
    ScopedLibraryThreads one(OneThread());
    recent_.emplace_front(shape, std::make_shared<TileKernel>(shape, packed_b));
    index_[shape] = recent_.begin();
    const std::shared_ptr<const TileKernel> made = recent_.front().second;
    if (recent_.size() > kCapacity) {
      index_.erase(recent_.back().first);
      recent_.pop_back();
    }
    return made;
  }

  static constexpr size_t kCapacity = 1024;
  using Entry = std::pair<TileShape, std::shared_ptr<const TileKernel>>;
  std::mutex mutex_;
  std::list<Entry> recent_;
  std::map<TileShape, std::list<Entry>::iterator> index_;
};

// How a product is cut. C is a grid of tiles, each of them one task. Where C holds f32 sums, a task
// goes through its sum over k in slices, so that the parts of A and B that it reads stay in the
// second cache level, and all tasks go through one group of slices before the next, so that those
// they share stay in the third: a weight gradient sums over all tokens.
struct Cut {
  static constexpr int64_t kSlice = 512, kSlicesAtATime = 4;
  // The packed parts of a tile fit the second cache level.
  static constexpr int64_t kRows = 256, kColumns = 512;

  explicit Cut(const GemmCall& call)
      : tile(ChooseTiling(call.m, call.n, call.k, kRows, kColumns)),
        down((call.m + tile.rows - 1) / tile.rows),
        across((call.n + tile.columns - 1) / tile.columns) {
    const bool sliced = call.c.dtype() == DType::kF32 && call.a.dtype() == DType::kBF16;
    const int64_t slices = sliced ? (call.k + kSlice - 1) / kSlice : 1;
    depth = slices == 1 ? call.k : ((call.k + slices - 1) / slices + 31) / 32 * 32;
    group = slices == 1 ? call.k : kSlicesAtATime * depth;
    // B is packed once for all rows of tiles where that is enough of them.
    packed = call.a.dtype() == DType::kBF16 && !call.transpose_a && slices == 1 && down >= 4;
  }

  GemmTiling tile;
  int64_t down, across, depth, group;
  bool packed;
};

// The kernels of one product: inner tiles and those of the last row and column, whole slices of k
// and the last, the first slice of a sum and those that add to it.
class Kernels {
 public:
  Kernels(const GemmCall& call, const Cut& cut) : call_(call), cut_(cut) {
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < 2; ++j) {
        for (const int64_t p : {int64_t{0}, cut.depth, (call.k - 1) / cut.depth * cut.depth}) {
          if (p >= call.k) continue;
          auto& kernel = kernels_[Index(i * (cut.down - 1), j * (cut.across - 1), p)];
          if (kernel == nullptr) kernel = Make(i * (cut.down - 1), j * (cut.across - 1), p);
          scratch_bytes_ = std::max(scratch_bytes_, (kernel->scratch_bytes() + 63) / 64 * 64);
        }
      }
    }
  }

  // Of tile (i, j) for the slice that begins at k = p.
  const TileKernel& At(int64_t i, int64_t j, int64_t p) const { return *kernels_[Index(i, j, p)]; }
  size_t scratch_bytes() const { return scratch_bytes_; }

 private:
  using Kernel = std::shared_ptr<const TileKernel>;

  size_t Index(int64_t i, int64_t j, int64_t p) const {
    const bool low = i == cut_.down - 1, right = j == cut_.across - 1;
    return size_t{8} * low + size_t{4} * right + (p + cut_.depth >= call_.k ? 2 : 0) + (p > 0);
  }

  Kernel Make(int64_t i, int64_t j, int64_t p) const {
    static KernelCache cache;
    const int64_t rows = std::min(cut_.tile.rows, call_.m - i * cut_.tile.rows);
    const int64_t columns = std::min(cut_.tile.columns, call_.n - j * cut_.tile.columns);
    return cache.Get({rows, columns, std::min(cut_.depth, call_.k - p), call_.lda(), call_.ldb(),
                      call_.n, cut_.packed ? cut_.tile.rows : 0, call_.transpose_a,
                      call_.transpose_b, call_.accumulate || p > 0, call_.a.dtype(),
                      call_.c.dtype()});
  }

  const GemmCall& call_;
  const Cut& cut_;
  size_t scratch_bytes_ = 0;
  Kernel kernels_[16];
};

// The panels of B, one a column of tiles, packed for the kernels that read them.
class PackedPanels {
 public:
  PackedPanels(Context& ctx, const GemmCall& call, const Cut& cut, const Kernels& kernels) {
    if (!cut.packed) return;
    const auto bytes = [&](int64_t j) {
      return static_cast<int64_t>((kernels.At(0, j, 0).packed_bytes() + 63) / 64 * 64);
    };
    stride_ = bytes(0);
    panels_ = ctx.Empty({stride_ * (cut.across - 1) + bytes(cut.across - 1)}, DType::kU8);
    ParallelFor(ctx, cut.across, [&](int64_t j, int) {
      ScopedLibraryThreads one(OneThread());
      kernels.At(0, j, 0).Pack(
          call.b.raw() + call.BOffset(j * cut.tile.columns) * SizeOf(call.b.dtype()), At(j));
    });
  }
  std::byte* At(int64_t j) const { return panels_.raw() + j * stride_; }

 private:
  int64_t stride_ = 0;
  Tensor panels_;
};

}  // namespace

bool OneDnnHasBf16() {
  // A set of bits: instruction sets that this version has no name for contain those they extend.
  constexpr auto kNeeded = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & kNeeded) == kNeeded;
}

void RunOneDnn(Context& ctx, const GemmCall& call) {
  const Cut cut(call);
  const Kernels kernels(call, cut);
  const PackedPanels panels(ctx, call, cut, kernels);
  const auto scratch_bytes = static_cast<int64_t>(kernels.scratch_bytes());
  const int64_t workers = std::min<int64_t>(ctx.threads(), cut.down * cut.across);
  const Tensor scratch = ctx.Empty({workers, scratch_bytes}, DType::kU8);

  const auto in_bytes = static_cast<int64_t>(SizeOf(call.a.dtype()));
  const auto out_bytes = static_cast<int64_t>(SizeOf(call.c.dtype()));
  for (int64_t first = 0; first < call.k; first += cut.group) {
    ParallelFor(ctx, cut.down * cut.across, [&](int64_t task, int worker) {
      const int64_t i = task / cut.across, j = task % cut.across;
      const int64_t row = i * cut.tile.rows, column = j * cut.tile.columns;
      ScopedLibraryThreads one(OneThread());
      for (int64_t p = first; p < std::min(call.k, first + cut.group); p += cut.depth) {
        const int64_t a = call.AOffset(row) + p * (call.transpose_a ? call.m : 1);
        const int64_t b = call.BOffset(column) + p * (call.transpose_b ? 1 : call.n);
        kernels.At(i, j, p).Execute(call.a.raw() + a * in_bytes,
                                    cut.packed ? panels.At(j) : call.b.raw() + b * in_bytes,
                                    call.c.raw() + (row * call.n + column) * out_bytes,
                                    scratch.raw() + worker * scratch_bytes);
      }
    });
  }
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
