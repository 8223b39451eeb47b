#include "tests/ops/attention/attention_fixture.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace longspan::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kStart = 0.5;  // value of gradient buffers before a call

// Visits (index in [Tk, Hkv, D] order, element offset in the scattered storage).
template <class Visit>
void ForEachElement(const Scattered& at, const ops::BlockList& keys, int64_t kv_heads, int64_t dim,
                    Visit&& visit) {
  for (size_t b = 0; b < keys.ids.size(); ++b) {
    for (int64_t t = keys.token_begin[b]; t < keys.token_begin[b + 1]; ++t) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t offset =
            at.offsets[static_cast<size_t>(h * at.blocks + keys.ids[b] - at.first_block)];
        for (int64_t d = 0; d < dim; ++d) {
          visit((t * kv_heads + h) * dim + d,
                offset + (t - keys.token_begin[b]) * at.token_stride + d);
        }
      }
    }
  }
}

Vec Place(const Scattered& at, const ops::BlockList& keys, int64_t kv_heads, int64_t dim,
          const Vec& plain) {
  Vec storage(static_cast<size_t>(at.elements), kNan);
  ForEachElement(at, keys, kv_heads, dim, [&](int64_t i, int64_t offset) {
    storage[static_cast<size_t>(offset)] = plain[static_cast<size_t>(i)];
  });
  return storage;
}

Vec Collect(const Scattered& at, const ops::BlockList& keys, int64_t kv_heads, int64_t dim,
            const Vec& storage) {
  Vec plain(static_cast<size_t>(keys.tokens() * kv_heads * dim));
  ForEachElement(at, keys, kv_heads, dim, [&](int64_t i, int64_t offset) {
    plain[static_cast<size_t>(i)] = storage[static_cast<size_t>(offset)] - kStart;
  });
  return plain;
}

Vec Less(Vec v, double start) {
  for (double& x : v) x -= start;
  return v;
}

}  // namespace

std::string AttentionCase::Name() const {
  return Str(mask_case.Name(), " | ", ToString(dtype), " D ", dim, " group ", group,
             with_dlse ? " dlse" : "", aligned ? "" : " odd", scale != 0 ? " scale" : "",
             sigmoid() ? Str(" sigmoid bias ", ResolvedBias()) : std::string());
}

double AttentionCase::ResolvedBias() const {
  const auto length = static_cast<double>(mask_case.documents.documents->row_length);
  return bias.has_value() ? *bias : std::log(1 / length);
}

double Tolerance(const std::string& name, DType dtype) {
  if (name == "mma_bf16") return 5e-3;
  if (name.ends_with("_bf16")) return 1e-2;  // bf16_attention_test holds them to less
  return dtype == DType::kF64 ? 1e-12 : 1e-5;
}

Scattered Scatter(const ops::BlockList& keys, int64_t kv_heads, int64_t dim, bool aligned,
                  uint64_t seed) {
  const int64_t unit = aligned ? 8 : 1;
  Scattered at;
  at.token_stride = dim + 3 * unit;
  if (keys.ids.empty()) return at;
  const auto [low, high] = std::minmax_element(keys.ids.begin(), keys.ids.end());
  at.first_block = *low;
  at.blocks = *high - *low + 1;
  at.offsets.assign(static_cast<size_t>(kv_heads * at.blocks), -1);
  std::vector<size_t> places;  // of (head, key block)
  for (int64_t h = 0; h < kv_heads; ++h) {
    for (const int32_t id : keys.ids) {
      places.push_back(static_cast<size_t>(h * at.blocks + id - at.first_block));
    }
  }
  const Philox rng(seed, StreamOf("scatter"));
  for (size_t i = places.size(); i > 1; --i) std::swap(places[i - 1], places[rng.Below(i, i)]);
  int64_t next = 5 * unit;
  for (const size_t place : places) {
    at.offsets[place] = next;
    next += ops::kMaskBlock * at.token_stride + unit * static_cast<int64_t>(rng.Below(place, 40));
  }
  at.elements = next;
  return at;
}

std::vector<std::string> ImplementationsFor(const Context& ctx,
                                            const ops::AttentionProblem& problem) {
  ops::AttentionProblem here = problem;
  here.shared_bytes = ops::AttentionSharedBytes(ctx);
  std::vector<std::string> names;
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (entry.device == ctx.device().kind && entry.rejects(here).empty()) {
      names.push_back(entry.name);
    }
  }
  return names;
}

std::vector<std::string> ImplementationsFor(const Context& ctx, const AttentionCase& c) {
  return ImplementationsFor(ctx, {.dtype = c.dtype,
                                  .heads = c.heads(),
                                  .kv_heads = c.mask_case.kv_heads,
                                  .head_dim = c.dim,
                                  .aligned = c.aligned});
}

AttentionInputs MakeInputs(const AttentionCase& c) {
  const ops::BlockList& queries = c.mask_case.shard.queries;
  const ops::BlockList& keys = c.mask_case.shard.keys;
  const int64_t q_size = queries.tokens() * c.heads() * c.dim;
  const int64_t kv_size = keys.tokens() * c.mask_case.kv_heads * c.dim;
  AttentionInputs in{.q = Normal(q_size, c.seed, c.dtype),
                     .k = Normal(kv_size, c.seed + 1, c.dtype),
                     .v = Normal(kv_size, c.seed + 2, c.dtype),
                     .d_out = Normal(q_size, c.seed + 3, c.dtype),
                     .dlse = Normal(queries.tokens() * c.heads(), c.seed + 4),
                     .problem = {}};
  if (!c.with_dlse) std::fill(in.dlse.begin(), in.dlse.end(), 0.0);
  in.problem = {.pattern = c.mask_case.pattern.pattern,
                .documents = c.mask_case.documents.documents.get(),
                .queries = queries,
                .keys = keys,
                .heads = c.heads(),
                .kv_heads = c.mask_case.kv_heads,
                .dim = c.dim,
                .scale = c.scale != 0 ? c.scale : 1 / std::sqrt(static_cast<double>(c.dim))};
  return in;
}

std::shared_ptr<const ops::BlockMask> BuildMask(const MaskCase& c) {
  return ops::BlockMask::Build(c.pattern.pattern, c.kv_heads, c.documents.documents,
                               c.shard.queries, c.shard.keys);
}

AttentionRun RunNaive(const AttentionCase& c, const AttentionInputs& in) {
  AttentionRun run;
  NaiveGradients grads;
  if (c.sigmoid()) {
    const double bias = c.ResolvedBias();
    run.o = NaiveSigmoidForward(in.problem, bias, in.q, in.k, in.v);
    grads = NaiveSigmoidBackward(in.problem, bias, in.q, in.k, in.v, in.d_out);
  } else {
    NaiveOutput out = NaiveForward(in.problem, in.q, in.k, in.v);
    run.o = std::move(out.o);
    run.lse = std::move(out.lse);
    grads = NaiveBackward(in.problem, in.q, in.k, in.v, in.d_out, in.dlse);
  }
  run.dq = std::move(grads.dq);
  run.dk = std::move(grads.dk);
  run.dv = std::move(grads.dv);
  return run;
}

AttentionRun RunAttention(Context& ctx, const AttentionCase& c, const AttentionInputs& in,
                          const std::string& implementation,
                          std::shared_ptr<const ops::BlockMask> mask) {
  const ops::BlockList& keys = c.mask_case.shard.keys;
  const int64_t rows = c.mask_case.shard.queries.tokens(), kv_heads = c.mask_case.kv_heads;
  const DType wide = AccumulatorOf(c.dtype);
  if (mask == nullptr) mask = BuildMask(c.mask_case);
  const Scattered at = Scatter(keys, kv_heads, c.dim, c.aligned, c.seed);
  const Scattered grad_at = Scatter(keys, kv_heads, c.dim, c.aligned, c.seed + 77);
  const auto storage = [&](const Vec& plain) {
    return FromVec(ctx, {at.elements}, c.dtype, Place(at, keys, kv_heads, c.dim, plain));
  };
  const ops::KvView kv{
      .k = storage(in.k), .v = storage(in.v), .head_dim = c.dim, .table = at.Table(kv_heads)};
  const ops::AttentionOptions options{.scale = c.scale,
                                      .implementation = implementation,
                                      .normalization = c.normalization,
                                      .bias = c.bias};
  const Tensor q = FromVec(ctx, {rows, c.heads(), c.dim}, c.dtype, in.q);
  const ops::AttentionResult forward = ops::AttentionForward(ctx, q, kv, *mask, options);

  const Tensor d_out = FromVec(ctx, q.shape(), c.dtype, in.d_out);
  const Tensor delta = c.sigmoid() ? Tensor() : ops::AttentionDelta(ctx, d_out, forward.o);
  const Vec start_kv(static_cast<size_t>(grad_at.elements), kStart);
  Tensor dq = FromVec(ctx, q.shape(), wide, Vec(in.q.size(), kStart));
  const ops::KvGradView dkv{.dk = FromVec(ctx, {grad_at.elements}, wide, start_kv),
                            .dv = FromVec(ctx, {grad_at.elements}, wide, start_kv),
                            .table = grad_at.Table(kv_heads)};
  const bool with_dlse = c.with_dlse && !c.sigmoid();
  const Tensor dlse = with_dlse ? FromVec(ctx, forward.lse.shape(), wide, in.dlse) : Tensor();
  ops::AttentionBackward(ctx, d_out, q, kv, forward.lse, delta, *mask, dq, dkv, options, dlse);
  return {.o = ToVec(forward.o),
          .lse = forward.lse.defined() ? ToVec(forward.lse) : Vec(),
          .dq = Less(ToVec(dq), kStart),
          .dk = Collect(grad_at, keys, kv_heads, c.dim, ToVec(dkv.dk)),
          .dv = Collect(grad_at, keys, kv_heads, c.dim, ToVec(dkv.dv)),
          .implementation = forward.implementation};
}

}  // namespace longspan::test
