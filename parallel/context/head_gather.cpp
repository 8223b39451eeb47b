#include "parallel/context/head_gather.h"

#include <algorithm>
#include <cstring>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "parallel/context/head_gather_cuda.h"

namespace longspan::parallel {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements of one task

void RequireInside(const char* which, int64_t first, int64_t stride, int64_t last_token,
                   int64_t elements, const Tensor& t) {
  const int64_t end = (first + last_token * stride + 1) * elements;
  if (first >= 0 && stride >= 0 && end <= t.numel()) return;
  throw InvalidArgument(Str("GatherHeads: a vector of `", which, "` ends at element ", end,
                            " but the tensor is ", t.Describe()));
}

void CheckGather(const HeadGather& g, const Tensor& in, const Tensor& out, int64_t elements) {
  const bool wide = in.dtype() == DType::kF64;
  if (!IsFloat(in.dtype()) || !IsFloat(out.dtype()) || wide != (out.dtype() == DType::kF64)) {
    throw InvalidArgument(Str("GatherHeads: ", in.Describe(), " to ", out.Describe(),
                              "; both must be f64, or each f32 or bf16"));
  }
  const int64_t last = g.tokens - 1;
  for (const HeadGather::Output& o : g.outputs) {
    RequireInside("out", o.to, o.to_stride, last, elements, out);
    LONGSPAN_CHECK(o.sources >= 1 && o.first_source >= 0 &&
                   static_cast<size_t>(o.first_source + o.sources) <= g.sources.size())
        << "GatherHeads: an output without sources";
  }
  for (const HeadGather::Source& s : g.sources) {
    RequireInside("in", s.from, s.from_stride, last, elements, in);
  }
}

template <class In, class Out>
void GatherVector(const HeadGather::Source* sources, int32_t count, int64_t token, const In* in,
                  Out* out, int64_t elements) {
  const auto from = [&](int32_t s) {
    return in + (sources[s].from + token * sources[s].from_stride) * elements;
  };
  if constexpr (std::is_same_v<In, Out>) {
    if (count == 1) {
      std::memcpy(out, from(0), static_cast<size_t>(elements) * sizeof(In));
      return;
    }
  }
  using A = Accumulator<Out>;
  for (int64_t d = 0; d < elements; ++d) {
    A sum = static_cast<A>(from(0)[d]);
    for (int32_t s = 1; s < count; ++s) sum += static_cast<A>(from(s)[d]);
    out[d] = static_cast<Out>(sum);
  }
}

}  // namespace

void HeadGather::Add(int64_t to, int64_t to_stride, int64_t from, int64_t from_stride) {
  outputs.push_back({to, to_stride, static_cast<int32_t>(sources.size()), 0});
  AddSource(from, from_stride);
}

void HeadGather::AddSource(int64_t from, int64_t from_stride) {
  LONGSPAN_CHECK(!outputs.empty()) << "HeadGather::AddSource before Add";
  sources.push_back({from, from_stride});
  ++outputs.back().sources;
}

void GatherHeads(Context& ctx, const HeadGather& gather, const Tensor& in, const Tensor& out,
                 int64_t elements) {
  if (gather.empty() || elements == 0) return;
  CheckGather(gather, in, out, elements);
  LONGSPAN_ON_CUDA(ctx, internal::GatherHeadsCuda(ctx, gather, in, out, elements));
  const int64_t heads = static_cast<int64_t>(gather.outputs.size());
  const auto run = [&]<class In, class Out>() {
    const In* const from = in.data<In>();
    Out* const to = out.data<Out>();
    ParallelRanges(ctx, gather.tokens, std::max<int64_t>(1, kGrain / (heads * elements)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t t = begin; t < end; ++t) {
                       for (const HeadGather::Output& o : gather.outputs) {
                         GatherVector(&gather.sources[static_cast<size_t>(o.first_source)],
                                      o.sources, t, from, to + (o.to + t * o.to_stride) * elements,
                                      elements);
                       }
                     }
                   });
  };
  if (in.dtype() == DType::kF64) return run.template operator()<double, double>();
  const bool from_bf16 = in.dtype() == DType::kBF16, to_bf16 = out.dtype() == DType::kBF16;
  if (from_bf16 && to_bf16) return run.template operator()<BF16, BF16>();
  if (from_bf16) return run.template operator()<BF16, float>();
  if (to_bf16) return run.template operator()<float, BF16>();
  run.template operator()<float, float>();
}

}  // namespace longspan::parallel
