#include "ops/embedding/embedding.h"

#include <algorithm>
#include <vector>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/rows.h"
#include "ops/embedding/embedding_cuda.h"

namespace longspan::ops {
namespace {

void CheckIds(const char* op, const Tensor& ids, const char* name, const Tensor& table) {
  LONGSPAN_CHECK(ids.rank() == 1 && ids.dtype() == DType::kI32)
      << op << ": ids are " << ids.Describe() << ", not i32[T]";
  LONGSPAN_CHECK(table.rank() == 2 && IsFloat(table.dtype()))
      << op << ": " << name << " is " << table.Describe() << ", not a float matrix";
  // On a GPU their values cannot be read here.
  if (ids.device().kind == DeviceKind::kCpu) internal::CheckIdRange(ids, table.dim(0));
}

void CheckOrder(const EmbeddingOrder& order, const Tensor& ids, const Tensor& dtable) {
  if (!order.tokens.defined()) {
    throw InvalidArgument(
        "EmbeddingBackward: a GPU needs the order of the ids; make it with OrderTokens");
  }
  LONGSPAN_CHECK(order.tokens.shape() == ids.shape() && order.vocab == dtable.dim(0))
      << "EmbeddingBackward: the order of " << order.tokens.Describe() << " ids of " << order.vocab
      << " rows does not belong to ids " << ids.Describe() << " and dtable " << dtable.Describe();
}

// A backward task adds the gradients of about this many tokens, in the order of their rows of the
// table, to so many columns. Each row is one task's, and repeated ids add up in token order.
constexpr int64_t kTokensPerTask = 512, kColumnsPerTask = 512;

}  // namespace

namespace internal {

void CheckIdRange(const Tensor& ids, int64_t vocab) {
  const int32_t* id = ids.data<int32_t>();
  for (int64_t t = 0; t < ids.dim(0); ++t) {
    if (id[t] < 0 || id[t] >= vocab) {
      throw InvalidArgument(Str("token ", t, " has id ", id[t], ", outside the vocabulary of ",
                                vocab,
                                " entries; raise model.vocab_size or prepare the "
                                "data with the model's tokenizer"));
    }
  }
}

}  // namespace internal

Tensor EmbeddingForward(Context& ctx, const Tensor& ids, const Tensor& table, DType out) {
  CheckIds("EmbeddingForward", ids, "table", table);
  LONGSPAN_CHECK(IsFloat(out) && AccumulatorOf(out) == AccumulatorOf(table.dtype()))
      << "EmbeddingForward: output " << ToString(out) << " from table " << table.Describe();
  const int64_t tokens = ids.dim(0), width = table.dim(1);
  Tensor y = ctx.Empty({tokens, width}, out);
  LONGSPAN_ON_CUDA(ctx, internal::EmbeddingForwardCuda(ctx, ids, table, y));
  const int32_t* id = ids.data<int32_t>();
  const int64_t tokens_per_task =
      std::max<int64_t>(1, internal::kTaskElements / std::max<int64_t>(1, width));
  DispatchFloat(table.dtype(), "EmbeddingForward", [&]<class From>() {
    DispatchFloat(out, "EmbeddingForward", [&]<class To>() {
      if constexpr (std::is_same_v<Accumulator<From>, Accumulator<To>>) {
        const From* rows = table.data<From>();
        To* to = y.data<To>();
        const RowKernels<From>& kernels = internal::Rows<From>(y.bytes());
        ParallelRanges(ctx, tokens, tokens_per_task, [&](int64_t begin, int64_t end) {
          if constexpr (std::is_same_v<From, To>) {
            kernels.gather(end - begin, width, id + begin, rows, to + begin * width);
          } else {
            kernels.gather_other(end - begin, width, id + begin, rows, to + begin * width);
          }
        });
      }
    });
  });
  return y;
}

void EmbeddingBackward(Context& ctx, const Tensor& ids, const Tensor& dy, Tensor& dtable,
                       const EmbeddingOrder& order) {
  CheckIds("EmbeddingBackward", ids, "dtable", dtable);
  LONGSPAN_CHECK(dy.shape() == Shape({ids.dim(0), dtable.dim(1)}) &&
                 dtable.dtype() == AccumulatorOf(dy.dtype()))
      << "EmbeddingBackward: dy " << dy.Describe() << " into dtable " << dtable.Describe();
  if (ctx.device().kind == DeviceKind::kCuda) CheckOrder(order, ids, dtable);
  LONGSPAN_ON_CUDA(ctx, internal::EmbeddingBackwardCuda(ctx, order, dy, dtable));
  const int64_t width = dtable.dim(1);
  const int32_t* id = ids.data<int32_t>();
  const std::vector<int32_t> sorted = internal::TokensById(ids, dtable.dim(0));
  const auto tokens = static_cast<int64_t>(sorted.size());
  DispatchFloat(dy.dtype(), "EmbeddingBackward", [&]<class T>() {
    using Acc = Accumulator<T>;
    const T* from = dy.data<T>();
    Acc* sums = dtable.data<Acc>();
    const int64_t pieces = (width + kColumnsPerTask - 1) / kColumnsPerTask;
    const int64_t groups = (tokens + kTokensPerTask - 1) / kTokensPerTask;
    ParallelFor(ctx, groups * pieces, [&](int64_t task, int) {
      const int64_t column = task % pieces * kColumnsPerTask;
      const int64_t columns = std::min(kColumnsPerTask, width - column);
      const auto row_of = [&](int64_t i) { return id[sorted[static_cast<size_t>(i)]]; };
      // A row of the table belongs to the group in which its first token is.
      int64_t i = task / pieces * kTokensPerTask;
      while (i > 0 && i < tokens && row_of(i) == row_of(i - 1)) ++i;
      int64_t end = std::max(i, std::min((task / pieces + 1) * kTokensPerTask, tokens));
      while (end > i && end < tokens && row_of(end) == row_of(end - 1)) ++end;
      internal::Rows<T>().scatter_add(end - i, sorted.data() + i, id, width, columns, from + column,
                                      sums + column);
    });
  });
}

}  // namespace longspan::ops
