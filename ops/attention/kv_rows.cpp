#include "ops/attention/kv_rows.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "ops/attention/arguments.h"
#include "ops/attention/cuda/kv_rows_cuda.h"
#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops {
namespace {

constexpr int64_t kStripTokens = 64;
constexpr int64_t kGrain = 16;      // strips of one task
constexpr int64_t kRowGrain = 256;  // rows of one task of a copy of heads

void Require(bool holds, const char* op, const std::string& what) {
  if (!holds) throw InvalidArgument(Str(op, ": ", what));
}

void RequireRows(const Context& ctx, const char* op, const char* name, const Tensor& t,
                 int64_t vectors) {
  Require(t.defined() && t.rank() == 3 && t.dim(1) == 2, op,
          Str(name, " is ", t.defined() ? t.Describe() : "undefined", " but must be [rows, 2, D]"));
  Require(vectors <= 2 * t.dim(0), op,
          Str(name, " is ", t.Describe(), " but the table reaches row ", (vectors + 1) / 2));
  internal::RequireDevice(ctx, op, name, t);
}

void RequireKv(const Context& ctx, const char* op, const char* names, const Tensor& k,
               const Tensor& v, const Tensor& rows, int64_t stride, int64_t vectors) {
  const bool fits = k.defined() && v.defined() && k.rank() == 3 && k.shape() == v.shape() &&
                    k.dtype() == v.dtype() && k.dtype() == rows.dtype() &&
                    k.dim(2) == rows.dim(2) && k.dim(1) == stride;
  Require(fits, op,
          Str(names, " are ", k.defined() ? k.Describe() : "undefined", " and ",
              v.defined() ? v.Describe() : "undefined", " but must be two ", ToString(rows.dtype()),
              " [T, ", stride, ", ", rows.dim(2), "]"));
  Require(vectors <= k.dim(0) * k.dim(1), op,
          Str(names, " are ", k.Describe(), " but the table reaches vector ", vectors));
  internal::RequireDevice(ctx, op, names, k);
  internal::RequireDevice(ctx, op, names, v);
}

void RequireTable(const char* op, const RowTable& table, int64_t from_stride, int64_t to_stride,
                  bool adds) {
  Require(table.from_stride() == from_stride && table.to_stride() == to_stride, op,
          Str("the table's strides are ", table.from_stride(), " and ", table.to_stride(),
              " but must be ", from_stride, " and ", to_stride));
  Require(adds || !table.adds(), op, "the table copies several runs to one place");
}

void RequireSum(const Context& ctx, const char* op, DType dtype) {
  Require(dtype == DType::kF32 || dtype == DType::kF64, op,
          Str("sums are f32 or f64, not ", ToString(dtype)));
  if (dtype == DType::kF64 && ctx.device().kind == DeviceKind::kCuda) {
    throw Unsupported(Str(op, ": f64 is not built for GPUs; use f32"));
  }
}

using internal::RowPlanes;

RowPlanes Planes(const Tensor& from, int64_t from_shift, const Tensor& from2, const Tensor& to,
                 int64_t to_shift, const Tensor& to2) {
  return {{from.raw(), from2.raw() + from_shift}, {to.raw(), to2.raw() + to_shift}};
}

// f(from, to, plane): vectors where one token of one source begins.
template <class F>
void ForEachToken(Context& ctx, const RowTable& table, int planes, const F& f) {
  const auto& strips = table.strips();
  ParallelRanges(ctx, static_cast<int64_t>(strips.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowTable::Strip& strip = strips[static_cast<size_t>(i)];
      for (int32_t s = 0; s < strip.sources; ++s) {
        const int64_t from = table.from()[static_cast<size_t>(strip.first + s)];
        for (int32_t t = 0; t < strip.tokens; ++t) {
          for (int plane = 0; plane < planes; ++plane) {
            f(from + t * table.from_stride(), strip.to + t * table.to_stride(), plane);
          }
        }
      }
    }
  });
}

void Copy(Context& ctx, const RowTable& table, const RowPlanes& planes, int count,
          int64_t vector_bytes, int64_t width) {
  const auto bytes = static_cast<size_t>(vector_bytes * width);
  ForEachToken(ctx, table, count, [&](int64_t from, int64_t to, int plane) {
    std::memcpy(planes.to[plane] + to * vector_bytes, planes.from[plane] + from * vector_bytes,
                bytes);
  });
}

template <class T>
void Add(Context& ctx, const RowTable& table, const RowPlanes& planes, int count, int64_t dim,
         int64_t width) {
  ForEachToken(ctx, table, count, [&](int64_t from, int64_t to, int plane) {
    const T* source = reinterpret_cast<const T*>(planes.from[plane]) + from * dim;
    T* sum = reinterpret_cast<T*>(planes.to[plane]) + to * dim;
    for (int64_t d = 0; d < width * dim; ++d) sum[d] += source[d];
  });
}

void Add(Context& ctx, DType dtype, const RowTable& table, const RowPlanes& planes, int count,
         int64_t dim, int64_t width) {
  if (dtype == DType::kF32) {
    Add<float>(ctx, table, planes, count, dim, width);
  } else {
    Add<double>(ctx, table, planes, count, dim, width);
  }
}

int64_t VectorBytes(const Tensor& rows) {
  return rows.dim(2) * static_cast<int64_t>(SizeOf(rows.dtype()));
}

// Bytes of one head of t [T, H, D] or [T, H].
int64_t HeadBytes(const char* op, const Tensor& t) {
  Require(
      t.defined() && (t.rank() == 2 || t.rank() == 3), op,
      Str("t is ", t.defined() ? t.Describe() : "undefined", " but must be [T, H, D] or [T, H]"));
  return (t.rank() == 3 ? t.dim(2) : 1) * static_cast<int64_t>(SizeOf(t.dtype()));
}

Shape WithHeads(const Tensor& t, int64_t heads) {
  return t.rank() == 3 ? Shape{t.dim(0), heads, t.dim(2)} : Shape{t.dim(0), heads};
}

void CopyColumns(Context& ctx, int64_t rows, int64_t width, const std::byte* from,
                 int64_t from_stride, std::byte* to, int64_t to_stride) {
  if (rows == 0 || width == 0) return;
  LONGSPAN_ON_CUDA(ctx,
                   internal::CopyColumnsCuda(ctx, rows, width, from, from_stride, to, to_stride));
  ParallelRanges(ctx, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<size_t>(width));
    }
  });
}

}  // namespace

RowTable::RowTable(std::vector<RowRun> runs, int64_t from_stride, int64_t to_stride)
    : from_stride_(from_stride), to_stride_(to_stride) {
  std::stable_sort(runs.begin(), runs.end(),
                   [](const RowRun& a, const RowRun& b) { return a.to < b.to; });
  for (size_t i = 0; i < runs.size();) {
    const RowRun& run = runs[i];
    LONGSPAN_CHECK(run.from >= 0 && run.to >= 0 && run.tokens >= 0)
        << "RowTable: a run of " << run.tokens << " tokens from " << run.from << " to " << run.to;
    size_t end = i;
    for (; end < runs.size() && runs[end].to == run.to; ++end) {
      LONGSPAN_CHECK(runs[end].tokens == run.tokens)
          << "RowTable: runs of " << run.tokens << " and " << runs[end].tokens
          << " tokens both end at vector " << run.to;
      if (run.tokens > 0) {
        from_end_ = std::max(from_end_, runs[end].from + (run.tokens - 1) * from_stride + 1);
      }
    }
    if (run.tokens > 0) to_end_ = std::max(to_end_, run.to + (run.tokens - 1) * to_stride + 1);
    adds_ = adds_ || end - i > 1;
    for (int64_t t = 0; t < run.tokens; t += kStripTokens) {
      strips_.push_back({run.to + t * to_stride, static_cast<int64_t>(from_.size()),
                         static_cast<int32_t>(end - i),
                         static_cast<int32_t>(std::min(kStripTokens, run.tokens - t))});
      for (size_t s = i; s < end; ++s) from_.push_back(runs[s].from + t * from_stride);
    }
    i = end;
  }
}

void PackKv(Context& ctx, const RowTable& table, const Tensor& k, const Tensor& v, Tensor& rows) {
  constexpr const char* kOp = "PackKv";
  if (table.empty()) return;
  RequireTable(kOp, table, table.from_stride(), 2, /*adds=*/false);
  RequireRows(ctx, kOp, "rows", rows, table.to_end() + 1);
  RequireKv(ctx, kOp, "k and v", k, v, rows, table.from_stride(), table.from_end());
  const int64_t bytes = VectorBytes(rows);
  const RowPlanes planes = Planes(k, 0, v, rows, bytes, rows);
  LONGSPAN_ON_CUDA(ctx, internal::CopyStripsCuda(ctx, table, planes, bytes, 1));
  Copy(ctx, table, planes, 2, bytes, 1);
}

void CopyRows(Context& ctx, const RowTable& table, const Tensor& from, Tensor& to) {
  constexpr const char* kOp = "CopyRows";
  if (table.empty()) return;
  RequireTable(kOp, table, 2, 2, /*adds=*/false);
  RequireRows(ctx, kOp, "from", from, table.from_end() + 1);
  RequireRows(ctx, kOp, "to", to, table.to_end() + 1);
  Require(from.dim(2) == to.dim(2) && from.dtype() == to.dtype(), kOp,
          Str("from is ", from.Describe(), " and to is ", to.Describe()));
  const RowPlanes planes{{from.raw(), nullptr}, {to.raw(), nullptr}};
  LONGSPAN_ON_CUDA(ctx, internal::CopyStripsCuda(ctx, table, planes, VectorBytes(to), 2));
  Copy(ctx, table, planes, 1, VectorBytes(to), 2);
}

void AddRows(Context& ctx, const RowTable& table, const Tensor& from, Tensor& to) {
  constexpr const char* kOp = "AddRows";
  if (table.empty()) return;
  RequireTable(kOp, table, 2, 2, /*adds=*/true);
  RequireRows(ctx, kOp, "from", from, table.from_end() + 1);
  RequireRows(ctx, kOp, "to", to, table.to_end() + 1);
  Require(from.dim(2) == to.dim(2) && from.dtype() == to.dtype(), kOp,
          Str("from is ", from.Describe(), " and to is ", to.Describe()));
  RequireSum(ctx, kOp, to.dtype());
  const RowPlanes planes{{from.raw(), nullptr}, {to.raw(), nullptr}};
  LONGSPAN_ON_CUDA(ctx, internal::AddStripsCuda(ctx, table, planes, to.dim(2), 2));
  Add(ctx, to.dtype(), table, planes, 1, to.dim(2), 2);
}

void AddToKv(Context& ctx, const RowTable& table, const Tensor& rows, Tensor& dk, Tensor& dv) {
  constexpr const char* kOp = "AddToKv";
  if (table.empty()) return;
  RequireTable(kOp, table, 2, table.to_stride(), /*adds=*/true);
  RequireRows(ctx, kOp, "rows", rows, table.from_end() + 1);
  RequireKv(ctx, kOp, "dk and dv", dk, dv, rows, table.to_stride(), table.to_end());
  RequireSum(ctx, kOp, dk.dtype());
  const RowPlanes planes = Planes(rows, VectorBytes(rows), rows, dk, 0, dv);
  LONGSPAN_ON_CUDA(ctx, internal::AddStripsCuda(ctx, table, planes, rows.dim(2), 1));
  Add(ctx, dk.dtype(), table, planes, 2, rows.dim(2), 1);
}

Tensor SliceHeads(Context& ctx, const Tensor& t, int64_t begin, int64_t end) {
  constexpr const char* kOp = "SliceHeads";
  const int64_t bytes = HeadBytes(kOp, t);
  Require(begin >= 0 && begin <= end && end <= t.dim(1), kOp,
          Str("heads ", begin, " to ", end, " of ", t.Describe()));
  internal::RequireDevice(ctx, kOp, "t", t);
  Tensor heads = ctx.Empty(WithHeads(t, end - begin), t.dtype());
  CopyColumns(ctx, t.dim(0), (end - begin) * bytes, t.raw() + begin * bytes, t.dim(1) * bytes,
              heads.raw(), (end - begin) * bytes);
  return heads;
}

void PlaceHeads(Context& ctx, const Tensor& heads, int64_t begin, Tensor& t) {
  constexpr const char* kOp = "PlaceHeads";
  const int64_t bytes = HeadBytes(kOp, t);
  Require(heads.defined() && heads.rank() == t.rank() && heads.dtype() == t.dtype() && begin >= 0 &&
              begin + heads.dim(1) <= t.dim(1) && heads.shape() == WithHeads(t, heads.dim(1)) &&
              heads.dim(0) == t.dim(0),
          kOp,
          Str("heads are ", heads.defined() ? heads.Describe() : "undefined", ", to be placed at ",
              begin, " of ", t.Describe()));
  internal::RequireDevice(ctx, kOp, "heads", heads);
  internal::RequireDevice(ctx, kOp, "t", t);
  CopyColumns(ctx, t.dim(0), heads.dim(1) * bytes, heads.raw(), heads.dim(1) * bytes,
              t.raw() + begin * bytes, t.dim(1) * bytes);
}

}  // namespace longspan::ops
