#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "ops/attention/cpu/routed_cpu.h"
#include "ops/core/parallel_for.h"

// Routed attention row by row; the only implementation for f64.
namespace longspan::ops::cpu {
namespace {

constexpr int64_t kGrain = 16;  // tokens of one task

template <class A, class X, class Y>
A Dot(const X* x, const Y* y, int64_t n) {
  A sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += static_cast<A>(x[d]) * static_cast<A>(y[d]);
  return sum;
}

template <class A, class T>
void AddScaled(A scale, const T* from, int64_t n, A* to) {
  for (int64_t d = 0; d < n; ++d) to[d] += scale * static_cast<A>(from[d]);
}

// Pointers to a row's operands, and the sizes of a call.
template <class T>
struct Operands {
  using A = Accumulator<T>;
  template <class Args>
  explicit Operands(const Args& args)
      : q(args.q.template data<T>()),
        k(args.kv.k.template data<T>()),
        v(args.kv.v.template data<T>()),
        heads(args.q.dim(1)),
        kv_heads(args.kv.kv_heads()),
        dim(args.q.dim(2)),
        scale(static_cast<A>(args.scale)) {}

  const T* Q(int64_t t, int64_t h) const { return q + (t * heads + h) * dim; }
  int64_t KvHead(int64_t h) const { return h / (heads / kv_heads); }

  const T *q, *k, *v;
  int64_t heads, kv_heads, dim;
  A scale;
};

// Visits the element offsets of a block's keys.
template <class View, class Visit>
void ForEachKey(const View& view, const RoutedBlocks& blocks, int64_t kv_head, int64_t block,
                const Visit& visit) {
  const int64_t offset = view.Offset(kv_head, block), tokens = blocks.TokensOf(block);
  for (int64_t i = 0; i < tokens; ++i) visit(offset + i * view.token_stride());
}

// Visits the chosen blocks of one row.
template <class Visit>
void ForEachChosen(const RoutedLists& lists, int64_t t, int64_t h, const Visit& visit) {
  const int32_t* chosen = lists.selected.data<int32_t>() + (h * lists.rows + t) * lists.width;
  for (int64_t i = 0; i < lists.width && chosen[i] >= 0; ++i) visit(chosen[i]);
}

template <class T>
void RouteRow(const RouteArgs& args, const RoutedTile& tile, int64_t t) {
  using A = Accumulator<T>;
  const int64_t heads = args.q.dim(1), dim = args.q.dim(2), kv_heads = args.means.dim(1);
  const int64_t width = args.selected.dim(2);
  const int64_t candidates = tile.candidates, first = tile.first;
  std::vector<std::pair<A, int32_t>> gates(static_cast<size_t>(candidates));
  std::vector<int32_t> chosen;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t c = 0; c < candidates; ++c) {
      const A* mean =
          args.means.data<A>() + ((first + c) * kv_heads + h / (heads / kv_heads)) * dim;
      const A gate = Dot<A>(args.q.data<T>() + (t * heads + h) * dim, mean, dim);
      gates[static_cast<size_t>(c)] = {std::isnan(gate) ? std::numeric_limits<A>::infinity() : gate,
                                       static_cast<int32_t>(first + c)};
    }
    std::stable_sort(gates.begin(), gates.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    chosen.clear();
    for (int64_t i = 0; i < std::min(width, candidates); ++i) {
      chosen.push_back(gates[static_cast<size_t>(i)].second);
    }
    std::sort(chosen.begin(), chosen.end());
    chosen.resize(static_cast<size_t>(width), -1);
    std::copy(chosen.begin(), chosen.end(),
              args.selected.data<int32_t>() + (h * args.q.dim(0) + t) * width);
  }
}

template <class T>
void ForwardRow(const RoutedForwardArgs& args, int64_t t, int64_t h) {
  using A = Accumulator<T>;
  const Operands<T> x(args);
  A* o = args.o.data<A>() + (t * x.heads + h) * x.dim;
  A& lse = args.lse.data<A>()[t * x.heads + h];
  std::vector<std::pair<A, int64_t>> scores;  // and the key's offset
  A top = lse;
  ForEachChosen(args.lists, t, h, [&](int32_t block) {
    ForEachKey(args.kv, args.blocks, x.KvHead(h), block, [&](int64_t at) {
      scores.push_back({x.scale * Dot<A>(x.Q(t, h), x.k + at, x.dim), at});
      top = std::max(top, scores.back().first);
    });
  });
  if (scores.empty()) return;
  A sum = std::exp(lse - top);
  for (int64_t d = 0; d < x.dim; ++d) o[d] *= sum;
  for (const auto& [score, at] : scores) {
    const A weight = std::exp(score - top);
    sum += weight;
    AddScaled(weight, x.v + at, x.dim, o);
  }
  for (int64_t d = 0; d < x.dim; ++d) o[d] /= sum;
  lse = top + std::log(sum);
}

// p and ds = p (do . v - delta) of one pair.
template <class T>
class PairGradient {
 public:
  using A = Accumulator<T>;
  explicit PairGradient(const RoutedBackwardArgs& args) : x(args), args_(args) {}

  template <class D>
  std::pair<A, A> operator()(const D* d_out, int64_t t, int64_t h, int64_t key_at) const {
    const int64_t row = t * x.heads + h;
    const A s = x.scale * Dot<A>(x.Q(t, h), x.k + key_at, x.dim);
    const A p = std::exp(s - args_.lse.data<A>()[row]);
    return {p, p * (Dot<A>(d_out, x.v + key_at, x.dim) - args_.delta.data<A>()[row])};
  }
  const Operands<T> x;

 private:
  const RoutedBackwardArgs& args_;
};

template <class T, class D>
void QueryGradientRow(const RoutedBackwardArgs& args, int64_t t, int64_t h, Tensor& dq) {
  using A = Accumulator<T>;
  const PairGradient<T> pair(args);
  const Operands<T>& x = pair.x;
  const int64_t row = (t * x.heads + h) * x.dim;
  ForEachChosen(args.lists, t, h, [&](int32_t block) {
    ForEachKey(args.kv, args.blocks, x.KvHead(h), block, [&](int64_t at) {
      const A ds = pair(args.d_out.data<D>() + row, t, h, at).second;
      AddScaled(x.scale * ds, x.k + at, x.dim, dq.data<A>() + row);
    });
  });
}

template <class T, class D>
void KeyGradientBlock(const RoutedBackwardArgs& args, int64_t block, int64_t kv_head,
                      const KvGradView& dkv) {
  using A = Accumulator<T>;
  const PairGradient<T> pair(args);
  const Operands<T>& x = pair.x;
  const int64_t group = x.heads / x.kv_heads;
  const int64_t* offsets = args.lists.offsets.data<int64_t>();
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const int64_t list = block * x.heads + h;
    for (int64_t i = offsets[list]; i < offsets[list + 1]; ++i) {
      const int64_t t = args.lists.query_rows.data<int32_t>()[i];
      const D* d_out = args.d_out.data<D>() + (t * x.heads + h) * x.dim;
      int64_t to = dkv.Offset(kv_head, block);
      ForEachKey(args.kv, args.blocks, kv_head, block, [&](int64_t at) {
        const auto [p, ds] = pair(d_out, t, h, at);
        AddScaled(x.scale * ds, x.Q(t, h), x.dim, dkv.dk.data<A>() + to);
        AddScaled(p, d_out, x.dim, dkv.dv.data<A>() + to);
        to += dkv.token_stride();
      });
    }
  }
}

// Calls f.operator()<T, D>() with the dtypes of q and of d_out.
template <class F>
void DispatchGradient(const RoutedBackwardArgs& args, const F& f) {
  DispatchFloat(args.q.dtype(), "MobaBackward", [&]<class T>() {
    if (args.d_out.dtype() == DTypeOf<T>()) {
      f.template operator()<T, T>();
    } else {
      f.template operator()<T, Accumulator<T>>();
    }
  });
}

}  // namespace

void ReferenceRoute(Context& ctx, const RouteArgs& args) {
  DispatchFloat(args.q.dtype(), "MobaSelect", [&]<class T>() {
    const std::vector<RoutedTile>& tiles = args.queries.tiles;
    ParallelFor(ctx, static_cast<int64_t>(tiles.size()), [&](int64_t i, int) {
      const RoutedTile& tile = tiles[static_cast<size_t>(i)];
      for (int64_t t = tile.begin; t < tile.begin + tile.tokens; ++t) RouteRow<T>(args, tile, t);
    });
  });
}

void ReferenceRoutedForward(Context& ctx, const RoutedForwardArgs& args) {
  DispatchFloat(args.q.dtype(), "MobaForward", [&]<class T>() {
    ParallelRanges(ctx, args.q.dim(0), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t h = 0; h < args.q.dim(1); ++h) ForwardRow<T>(args, t, h);
      }
    });
  });
}

void ReferenceRoutedQueryGradient(Context& ctx, const RoutedBackwardArgs& args, Tensor& dq) {
  DispatchGradient(args, [&]<class T, class D>() {
    ParallelRanges(ctx, args.q.dim(0), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t h = 0; h < args.q.dim(1); ++h) QueryGradientRow<T, D>(args, t, h, dq);
      }
    });
  });
}

void ReferenceRoutedKeyGradient(Context& ctx, const RoutedBackwardArgs& args,
                                const KvGradView& dkv) {
  DispatchGradient(args, [&]<class T, class D>() {
    const int64_t kv_heads = args.kv.kv_heads();
    ParallelFor(ctx, args.blocks.count() * kv_heads, [&](int64_t i, int) {
      KeyGradientBlock<T, D>(args, i / kv_heads, i % kv_heads, dkv);
    });
  });
}

}  // namespace longspan::ops::cpu
