#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/attention/cpu/attention_cpu.h"
#include "ops/attention/cpu/block_maxima.h"
#include "ops/attention/logistic.h"
#include "ops/core/parallel_for.h"

// Attention token by token: the definition, Visible() for every pair that a block leaves open, and
// the only implementation for f64.
namespace longspan::ops::cpu {
namespace {

constexpr int kLanes = 8;  // independent partial sums, so that dot products become vector code

template <class A, class T>
A Dot(const A* a, const T* b, int64_t n) {
  A lane[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += a[d + l] * static_cast<A>(b[d + l]);
  }
  for (; d < n; ++d) lane[0] += a[d] * static_cast<A>(b[d]);
  A sum = 0;
  for (const A x : lane) sum += x;
  return sum;
}

template <class A, class T>
void AddScaled(A scale, const T* from, int64_t n, A* to) {
  for (int64_t d = 0; d < n; ++d) to[d] += scale * static_cast<A>(from[d]);
}

// Calls visit(key token of the block, element offset of its K and V) for the keys of `entry` that
// `query` (global index) sees.
template <class Visit>
void ForEachKey(const KvView& kv, const BlockMask& mask, int64_t kv_head, int64_t query,
                int32_t block, BlockKind kind, Visit&& visit) {
  const int64_t length = mask.documents().row_length;
  const int64_t first = BlockFirstToken(length, block), n = BlockTokens(length, block);
  const int64_t offset = kv.Offset(kv_head, block), head = mask.rule_head(kv_head);
  for (int64_t j = 0; j < n; ++j) {
    if (kind == BlockKind::kFull || Visible(mask.rule(), head, query, first + j)) {
      visit(offset + j * kv.token_stride());
    }
  }
}

// Element offsets of all keys that one query sees.
void CollectKeys(const KvView& kv, const BlockMask& mask, BlockTask task, int64_t query,
                 std::vector<int64_t>& offsets) {
  offsets.clear();
  const int64_t pattern = mask.pattern_of(task.kv_head);
  for (const BlockRun& run : mask.row_runs().Row(pattern, task.index)) {
    for (int32_t n = 0; n < run.count; ++n) {
      ForEachKey(kv, mask, task.kv_head, query, run.block(n), run.kind(),
                 [&](int64_t offset) { offsets.push_back(offset); });
    }
  }
}

template <class A, class T>
std::vector<A> Row(const T* from, int64_t n) {
  std::vector<A> row(static_cast<size_t>(n));
  for (int64_t d = 0; d < n; ++d) row[static_cast<size_t>(d)] = static_cast<A>(from[d]);
  return row;
}

// The tokens of one row of the mask: local indices and the global index of the first one.
struct QueryTokens {
  int64_t begin, end, first_global;
};
QueryTokens TokensOfRow(const BlockMask& mask, int32_t index) {
  const BlockList& queries = mask.queries();
  const size_t i = static_cast<size_t>(index);
  return {queries.token_begin[i], queries.token_begin[i + 1],
          BlockFirstToken(mask.documents().row_length, queries.ids[i])};
}

template <class A>
Logistic<A> SigmoidOf(A score, double bias) {
  const A x = score + static_cast<A>(bias);
  return LogisticOf(x, std::exp(-std::abs(x)));
}

// o and, of softmax, lse of one query head's row over the keys at `offsets`; `p`: its scores.
template <class T, class A, class Out>
void ForwardRow(const ForwardArgs& args, const std::vector<int64_t>& offsets, int64_t row,
                std::vector<A>& p, Out* o) {
  const int64_t dim = args.kv.head_dim;
  const T* k = args.kv.k.data<T>();
  const T* v = args.kv.v.data<T>();
  const std::vector<A> q = Row<A>(args.q.data<T>() + row * dim, dim);
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  A top = -kInfinity;
  double sum = 0;  // in f32 small terms would be lost one by one in the sum of a long row
  p.resize(offsets.size());
  for (size_t j = 0; j < offsets.size(); ++j) {
    p[j] = static_cast<A>(args.scale) * Dot(q.data(), k + offsets[j], dim);
    top = std::max(top, p[j]);
  }
  const bool sigmoid = args.normalization == Normalization::kSigmoid;
  std::vector<double> out(static_cast<size_t>(dim));
  for (size_t j = 0; j < offsets.size(); ++j) {
    const A weight = sigmoid ? SigmoidOf(p[j], args.bias).p : std::exp(p[j] - top);
    sum += static_cast<double>(weight);
    AddScaled(static_cast<double>(weight), v + offsets[j], dim, out.data());
  }
  if (sigmoid) {
    sum = 1;
  } else {
    args.lse.data<A>()[row] =
        offsets.empty() ? -kInfinity : static_cast<A>(static_cast<double>(top) + std::log(sum));
  }
  for (int64_t d = 0; d < dim; ++d) {
    const double x = out[static_cast<size_t>(d)];
    o[row * dim + d] = Out(static_cast<A>(offsets.empty() ? 0 : x / sum));
  }
}

// The largest probability in each block of one row, from its scores `s` in the order of
// CollectKeys.
template <class A>
void RaiseMaxima(const ForwardArgs& args, const BlockMaxima& maxima, BlockTask task, int64_t query,
                 const std::vector<A>& s, A lse) {
  size_t j = 0;
  for (const BlockRun& run :
       args.mask.row_runs().Row(args.mask.pattern_of(task.kv_head), task.index)) {
    for (int32_t n = 0; n < run.count; ++n) {
      ForEachKey(args.kv, args.mask, task.kv_head, query, run.block(n), run.kind(),
                 [&](int64_t) { maxima.Raise(task, run.block(n), std::exp(s[j++] - lse)); });
    }
  }
}

template <class T>
void ForwardTask(const ForwardArgs& args, const BlockMaxima& maxima, BlockTask task) {
  using A = Accumulator<T>;
  const int64_t heads = args.q.dim(1), group = heads / args.kv.kv_heads();
  std::vector<int64_t> offsets;
  std::vector<A> p;
  const QueryTokens tokens = TokensOfRow(args.mask, task.index);
  for (int64_t i = tokens.begin; i < tokens.end; ++i) {
    CollectKeys(args.kv, args.mask, task, tokens.first_global + i - tokens.begin, offsets);
    for (int64_t h = task.kv_head * group; h < (task.kv_head + 1) * group; ++h) {
      const int64_t row = i * heads + h;
      if (args.o.dtype() == DTypeOf<A>()) {
        ForwardRow<T>(args, offsets, row, p, args.o.data<A>());
      } else {
        ForwardRow<T>(args, offsets, row, p, args.o.data<T>());
      }
      if (maxima.wanted()) {
        RaiseMaxima<A>(args, maxima, task, tokens.first_global + i - tokens.begin, p,
                       args.lse.data<A>()[row]);
      }
    }
  }
}

// What backward needs of one query head's row.
template <class A>
struct RowState {
  std::vector<A> q, d_out;
  A lse, delta;  // of softmax
};

template <class T>
RowState<Accumulator<T>> LoadRow(const BackwardArgs& args, int64_t row) {
  using A = Accumulator<T>;
  const int64_t dim = args.kv.head_dim;
  RowState<A> state{};
  state.q = Row<A>(args.q.data<T>() + row * dim, dim);
  state.d_out = args.d_out.dtype() == DTypeOf<T>() ? Row<A>(args.d_out.data<T>() + row * dim, dim)
                                                   : Row<A>(args.d_out.data<A>() + row * dim, dim);
  if (args.normalization == Normalization::kSigmoid) return state;
  state.lse = args.lse.data<A>()[row];
  state.delta = args.delta.data<A>()[row];
  if (args.dlse.defined()) state.delta -= args.dlse.data<A>()[row];
  return state;
}

// p and ds of one pair.
template <class A>
struct PairGradient {
  A p, ds;
};
template <class T, class A>
PairGradient<A> Pair(const BackwardArgs& args, const RowState<A>& row, int64_t offset) {
  const int64_t dim = args.kv.head_dim;
  const A s = static_cast<A>(args.scale) * Dot(row.q.data(), args.kv.k.data<T>() + offset, dim);
  const A dp = Dot(row.d_out.data(), args.kv.v.data<T>() + offset, dim);
  if (args.normalization == Normalization::kSigmoid) {
    const Logistic<A> weight = SigmoidOf(s, args.bias);
    return {weight.p, weight.slope * dp};
  }
  const A p = std::exp(s - row.lse);
  return {p, p * (dp - row.delta)};
}

template <class T>
void QueryGradientTask(const BackwardArgs& args, BlockTask task) {
  using A = Accumulator<T>;
  const int64_t heads = args.q.dim(1), group = heads / args.kv.kv_heads(), dim = args.kv.head_dim;
  std::vector<int64_t> offsets;
  const QueryTokens tokens = TokensOfRow(args.mask, task.index);
  for (int64_t i = tokens.begin; i < tokens.end; ++i) {
    CollectKeys(args.kv, args.mask, task, tokens.first_global + i - tokens.begin, offsets);
    if (offsets.empty()) continue;
    for (int64_t h = task.kv_head * group; h < (task.kv_head + 1) * group; ++h) {
      const RowState<A> row = LoadRow<T>(args, i * heads + h);
      std::vector<A> dq(static_cast<size_t>(dim));
      for (const int64_t offset : offsets) {
        const A ds = Pair<T>(args, row, offset).ds;
        AddScaled(ds, args.kv.k.data<T>() + offset, dim, dq.data());
      }
      AddScaled(static_cast<A>(args.scale), dq.data(), dim,
                args.dq.data<A>() + (i * heads + h) * dim);
    }
  }
}

template <class T>
void KeyGradientTask(const BackwardArgs& args, const std::vector<int64_t>& query_tokens,
                     BlockTask task) {
  using A = Accumulator<T>;
  const BlockMask& mask = args.mask;
  const int64_t heads = args.q.dim(1), group = heads / args.kv.kv_heads(), dim = args.kv.head_dim;
  const int64_t length = mask.documents().row_length;
  const int32_t key = mask.keys().ids[static_cast<size_t>(task.index)];
  const auto runs = mask.column_runs().Row(mask.pattern_of(task.kv_head), task.index);
  if (runs.empty()) return;
  const int64_t base = args.kv.Offset(task.kv_head, key);
  const size_t size = static_cast<size_t>(kMaskBlock * dim);
  std::vector<A> dk(size), dv(size);
  for (const BlockRun& run : runs) {
    for (int32_t n = 0; n < run.count; ++n) {
      const int32_t block = run.block(n);
      const int64_t local = query_tokens[static_cast<size_t>(block)];
      const int64_t global = BlockFirstToken(length, block);
      for (int64_t i = 0; i < BlockTokens(length, block); ++i) {
        for (int64_t h = task.kv_head * group; h < (task.kv_head + 1) * group; ++h) {
          const RowState<A> row = LoadRow<T>(args, (local + i) * heads + h);
          ForEachKey(args.kv, mask, task.kv_head, global + i, key, run.kind(), [&](int64_t offset) {
            const PairGradient<A> pair = Pair<T>(args, row, offset);
            const int64_t j = (offset - base) / args.kv.token_stride();
            AddScaled(pair.p, row.d_out.data(), dim, dv.data() + j * dim);
            AddScaled(pair.ds, row.q.data(), dim, dk.data() + j * dim);
          });
        }
      }
    }
  }
  const int64_t out = args.dkv.Offset(task.kv_head, key);
  for (int64_t j = 0; j < BlockTokens(length, key); ++j) {
    const int64_t at = out + j * args.dkv.token_stride();
    AddScaled(static_cast<A>(args.scale), dk.data() + j * dim, dim, args.dkv.dk.data<A>() + at);
    AddScaled(A{1}, dv.data() + j * dim, dim, args.dkv.dv.data<A>() + at);
  }
}

}  // namespace

void ReferenceForward(Context& ctx, const ForwardArgs& args) {
  const std::vector<BlockTask> tasks = TasksByCost(args.mask, args.mask.row_runs());
  const BlockMaxima maxima(args);
  DispatchFloat(args.q.dtype(), "AttentionForward", [&]<class T>() {
    ParallelFor(ctx, static_cast<int64_t>(tasks.size()), [&](int64_t i, int) {
      ForwardTask<T>(args, maxima, tasks[static_cast<size_t>(i)]);
    });
  });
}

void ReferenceBackward(Context& ctx, const BackwardArgs& args) {
  const std::vector<BlockTask> columns = TasksByCost(args.mask, args.mask.column_runs());
  const std::vector<BlockTask> rows = TasksByCost(args.mask, args.mask.row_runs());
  const std::vector<int64_t> query_tokens = QueryTokenOffsets(args.mask);
  DispatchFloat(args.q.dtype(), "AttentionBackward", [&]<class T>() {
    ParallelFor(ctx, static_cast<int64_t>(columns.size()), [&](int64_t i, int) {
      KeyGradientTask<T>(args, query_tokens, columns[static_cast<size_t>(i)]);
    });
    ParallelFor(ctx, static_cast<int64_t>(rows.size()),
                [&](int64_t i, int) { QueryGradientTask<T>(args, rows[static_cast<size_t>(i)]); });
  });
}

}  // namespace longspan::ops::cpu
