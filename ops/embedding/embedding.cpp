#include "ops/embedding/embedding.h"

#include <algorithm>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/rows.h"
#include "ops/embedding/embedding_cuda.h"

namespace longspan::ops {
namespace {

// A backward task owns these many columns of the table for all tokens: no two tasks meet, and
// repeated ids add up in token order.
constexpr int64_t kColumnsPerTask = 64;

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
        ParallelRanges(ctx, tokens, tokens_per_task, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            const From* row = rows + int64_t{id[t]} * width;
            if constexpr (std::is_same_v<From, To>) {
              std::copy(row, row + width, to + t * width);
            } else {
              for (int64_t d = 0; d < width; ++d) {
                to[t * width + d] = To(static_cast<Accumulator<From>>(row[d]));
              }
            }
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
  const int64_t tokens = ids.dim(0), width = dtable.dim(1);
  const int32_t* id = ids.data<int32_t>();
  DispatchFloat(dy.dtype(), "EmbeddingBackward", [&]<class T>() {
    using Acc = Accumulator<T>;
    const T* from = dy.data<T>();
    Acc* sums = dtable.data<Acc>();
    ParallelRanges(ctx, width, kColumnsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < tokens; ++t) {
        Acc* __restrict row = sums + int64_t{id[t]} * width;
        const T* gradient = from + t * width;
        for (int64_t d = begin; d < end; ++d) row[d] += static_cast<Acc>(gradient[d]);
      }
    });
  });
}

}  // namespace longspan::ops
