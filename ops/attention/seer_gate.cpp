#include "ops/attention/seer_gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops {
namespace {

void RequireCpu(const Context& ctx, const char* op) {
  if (ctx.device().kind == DeviceKind::kCpu) return;
  throw Unsupported(Str(op, ": the gate of SeerAttention is not built for GPUs; use the CPU"));
}

void CheckGate(const char* op, const Tensor& q, const Tensor& k, const SeerBlocks& blocks) {
  LONGSPAN_CHECK(q.rank() == 3 && IsFloat(q.dtype()) && q.dim(1) == blocks.count() &&
                 q.dim(2) >= 1 && k.shape() == q.shape() && k.dtype() == q.dtype())
      << op << ": gate queries " << q.Describe() << " and keys " << k.Describe() << " for "
      << blocks.count() << " blocks";
}

// One kv head's gate: scores of block I against the blocks that it may see.
template <class T>
class GateRows {
 public:
  using A = Accumulator<T>;
  GateRows(const Tensor& q, const Tensor& k, int64_t head, const SeerBlocks& blocks)
      : width_(q.dim(2)),
        q_(q.data<T>() + head * q.dim(1) * width_),
        k_(k.data<T>() + head * q.dim(1) * width_),
        scale_(static_cast<A>(1.0 / std::sqrt(static_cast<double>(width_)))),
        blocks_(blocks) {}

  const T* query(int64_t i) const { return q_ + i * width_; }
  const T* key(int64_t j) const { return k_ + j * width_; }
  A scale() const { return scale_; }
  A Score(int64_t i, int64_t j) const {
    A sum = 0;
    for (int64_t d = 0; d < width_; ++d) {
      sum += static_cast<A>(query(i)[d]) * static_cast<A>(key(j)[d]);
    }
    return sum * scale_;
  }
  // Scores of row i, first key first, and their log-sum-exp.
  A Row(int64_t i, std::vector<A>& scores) const {
    const int64_t first = blocks_.first_key[static_cast<size_t>(i)];
    scores.resize(static_cast<size_t>(i - first + 1));
    A top = -std::numeric_limits<A>::infinity(), sum = 0;
    for (int64_t j = first; j <= i; ++j) {
      scores[static_cast<size_t>(j - first)] = Score(i, j);
      top = std::max(top, scores[static_cast<size_t>(j - first)]);
    }
    for (const A s : scores) sum += std::exp(s - top);
    return top + std::log(sum);
  }

 private:
  const int64_t width_;
  const T *q_, *k_;
  const A scale_;
  const SeerBlocks& blocks_;
};

// Block maxima of 64 x 64 tokens as those of the gate's blocks.
template <class A>
class TargetRows {
 public:
  TargetRows(const Tensor& maxima, int64_t head, const SeerBlocks& blocks)
      : fine_(maxima.dim(1)),
        fine_per_row_(BlocksPerRow(blocks.row_length)),
        each_(blocks.block_size / kMaskBlock),
        blocks_(blocks),
        at_(maxima.data<A>() + head * fine_ * fine_) {}

  A Maximum(int64_t i, int64_t j) const {
    A most = 0;
    for (int64_t y = Begin(i); y < End(i); ++y) {
      for (int64_t x = Begin(j); x < End(j); ++x) most = std::max(most, at_[y * fine_ + x]);
    }
    return most;
  }
  A Sum(int64_t i) const {
    A sum = 0;
    for (int64_t j = blocks_.first_key[static_cast<size_t>(i)]; j <= i; ++j) sum += Maximum(i, j);
    return sum;
  }

 private:
  int64_t Begin(int64_t block) const {
    const int64_t per_row = blocks_.per_row();
    return block / per_row * fine_per_row_ + block % per_row * each_;
  }
  int64_t End(int64_t block) const {
    const int64_t per_row = blocks_.per_row();
    return block / per_row * fine_per_row_ + std::min(fine_per_row_, (block % per_row + 1) * each_);
  }
  const int64_t fine_, fine_per_row_, each_;
  const SeerBlocks& blocks_;
  const A* at_;
};

template <class T>
class Distillation {
 public:
  using A = Accumulator<T>;
  Distillation(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& maxima,
               const SeerBlocks& blocks, int64_t skip, double weight)
      : ctx_(ctx),
        q_(q),
        k_(k),
        maxima_(maxima),
        blocks_(blocks),
        skip_(skip),
        weight_(static_cast<A>(weight)),
        n_(blocks.count()),
        lse_(static_cast<size_t>(q.dim(0) * n_)),
        total_(lse_.size()),
        losses_(lse_.size()) {}

  SeerLoss Run() {
    SeerLoss loss;
    loss.dq = ctx_.Empty(q_.shape(), q_.dtype());
    loss.dk = ctx_.Empty(q_.shape(), q_.dtype());
    ParallelFor(ctx_, q_.dim(0) * n_,
                [&](int64_t task, int) { QueryRow(task / n_, task % n_, loss.dq); });
    ParallelFor(ctx_, q_.dim(0) * n_,
                [&](int64_t task, int) { KeyRow(task / n_, task % n_, loss.dk); });
    for (const double row : losses_) loss.sum += row;
    return loss;
  }

 private:
  bool Counts(int64_t i) const { return i % blocks_.per_row() >= skip_; }
  static void Store(const std::vector<A>& sums, T* to) {
    for (size_t d = 0; d < sums.size(); ++d) to[d] = T(sums[d]);
  }
  // Adds slope * from, both of width G.
  void AddScaled(A slope, const T* from, std::vector<A>& to) const {
    for (size_t d = 0; d < to.size(); ++d) to[d] += slope * static_cast<A>(from[d]);
  }

  void QueryRow(int64_t head, int64_t i, const Tensor& dq) {
    std::vector<A> sums(static_cast<size_t>(q_.dim(2)));
    const auto at = static_cast<size_t>(head * n_ + i);
    T* to = dq.data<T>() + (head * n_ + i) * q_.dim(2);
    if (!Counts(i)) return Store(sums, to);
    const GateRows<T> gate(q_, k_, head, blocks_);
    const TargetRows<A> target(maxima_, head, blocks_);
    std::vector<A> scores;
    lse_[at] = gate.Row(i, scores);
    total_[at] = target.Sum(i);
    const int64_t first = blocks_.first_key[static_cast<size_t>(i)];
    for (int64_t j = first; j <= i; ++j) {
      const A log_a = scores[static_cast<size_t>(j - first)] - lse_[at];
      const A t = target.Maximum(i, j) / total_[at];
      if (t > 0) losses_[at] += static_cast<double>(t * (std::log(t) - log_a));
      AddScaled(weight_ * gate.scale() * (std::exp(log_a) - t), gate.key(j), sums);
    }
    Store(sums, to);
  }

  void KeyRow(int64_t head, int64_t j, const Tensor& dk) const {
    std::vector<A> sums(static_cast<size_t>(q_.dim(2)));
    const GateRows<T> gate(q_, k_, head, blocks_);
    const TargetRows<A> target(maxima_, head, blocks_);
    const int64_t end = (j / blocks_.per_row() + 1) * blocks_.per_row();
    for (int64_t i = j; i < end && blocks_.first_key[static_cast<size_t>(i)] <= j; ++i) {
      if (!Counts(i)) continue;
      const auto at = static_cast<size_t>(head * n_ + i);
      const A t = target.Maximum(i, j) / total_[at];
      const A a = std::exp(gate.Score(i, j) - lse_[at]);
      AddScaled(weight_ * gate.scale() * (a - t), gate.query(i), sums);
    }
    Store(sums, dk.data<T>() + (head * n_ + j) * q_.dim(2));
  }

  Context& ctx_;
  const Tensor &q_, &k_, &maxima_;
  const SeerBlocks& blocks_;
  const int64_t skip_;
  const A weight_;
  const int64_t n_;
  std::vector<A> lse_, total_;  // of counted rows, [Hkv, N]
  std::vector<double> losses_;  // [Hkv, N]
};

// The gate's blocks that block i keeps, in ascending order.
template <class T>
std::vector<int64_t> Choose(const GateRows<T>& gate, int64_t i, int64_t first,
                            const SeerSelection& selection) {
  using A = Accumulator<T>;
  std::vector<A> scores;
  const A lse = gate.Row(i, scores);
  std::vector<int64_t> others(static_cast<size_t>(std::max<int64_t>(0, i - first - 1)));
  std::iota(others.begin(), others.end(), first + 1);
  const auto score = [&](int64_t j) { return scores[static_cast<size_t>(j - first)]; };
  if (selection.top_k > 0) {
    const size_t keep =
        std::min(others.size(), static_cast<size_t>(std::max<int64_t>(0, selection.top_k - 2)));
    std::stable_sort(others.begin(), others.end(),
                     [&](int64_t a, int64_t b) { return score(a) > score(b); });
    others.resize(keep);
    std::sort(others.begin(), others.end());
  } else {
    std::erase_if(others, [&](int64_t j) {
      return !(std::exp(score(j) - lse) >= static_cast<A>(selection.threshold));
    });
  }
  if (first < i) others.insert(others.begin(), first);
  others.push_back(i);
  return others;
}

}  // namespace

SeerBlocks SeerBlocks::Of(const Documents& documents, int64_t block_size) {
  LONGSPAN_CHECK(IsChoiceBlock(block_size))
      << "SeerBlocks: block_size " << block_size << " is not a multiple of 64 from 64 to 2^31";
  SeerBlocks blocks{documents.rows, documents.row_length, block_size, {}};
  for (int64_t n = 0; n < blocks.count(); ++n) {
    const int64_t row = n / blocks.per_row() * blocks.row_length;
    const int64_t token = row + n % blocks.per_row() * block_size;
    const int64_t begin = documents.doc_begin[static_cast<size_t>(token)] - row;
    blocks.first_key.push_back(static_cast<int32_t>(n - n % blocks.per_row() + begin / block_size));
  }
  return blocks;
}

SeerPooled SeerPool(Context& ctx, const Tensor& q, const Tensor& k, const SeerBlocks& blocks) {
  RequireCpu(ctx, "SeerPool");
  LONGSPAN_CHECK(q.rank() == 3 && k.rank() == 3 && IsFloat(q.dtype()) && q.dtype() == k.dtype() &&
                 q.dim(0) == k.dim(0) && q.dim(2) == k.dim(2) && k.dim(1) >= 1 &&
                 q.dim(1) % k.dim(1) == 0 && q.dim(0) == blocks.rows * blocks.row_length)
      << "SeerPool: q " << q.Describe() << " and k " << k.Describe() << " for " << blocks.rows
      << " rows of " << blocks.row_length << " tokens";
  const int64_t heads = q.dim(1), kv_heads = k.dim(1), dim = q.dim(2), n = blocks.count();
  const int64_t group = heads / kv_heads;
  SeerPooled pooled{ctx.Empty({kv_heads, n, dim}, q.dtype()),
                    ctx.Empty({kv_heads, n, 3 * dim}, q.dtype())};
  DispatchFloat(q.dtype(), "SeerPool", [&]<class T>() {
    using A = Accumulator<T>;
    ParallelFor(ctx, kv_heads * n, [&](int64_t task, int) {
      const int64_t h = task / n, block = task % n, row = block / blocks.per_row();
      const int64_t begin = row * blocks.row_length + block % blocks.per_row() * blocks.block_size;
      const int64_t end = std::min(begin + blocks.block_size, (row + 1) * blocks.row_length);
      const A tokens = static_cast<A>(end - begin);
      constexpr A kInfinity = std::numeric_limits<A>::infinity();
      for (int64_t d = 0; d < dim; ++d) {
        A query = 0, most = -kInfinity, least = kInfinity, sum = 0;
        for (int64_t t = begin; t < end; ++t) {
          for (int64_t g = 0; g < group; ++g) {
            query += static_cast<A>(q.data<T>()[(t * heads + h * group + g) * dim + d]);
          }
          const A key = static_cast<A>(k.data<T>()[(t * kv_heads + h) * dim + d]);
          most = std::max(most, key);
          least = std::min(least, key);
          sum += key;
        }
        pooled.queries.data<T>()[task * dim + d] = T(query / (tokens * static_cast<A>(group)));
        T* keys = pooled.keys.data<T>() + task * 3 * dim;
        keys[d] = T(most);
        keys[dim + d] = T(least);
        keys[2 * dim + d] = T(sum / tokens);
      }
    });
  });
  return pooled;
}

int64_t SeerCountedRows(const SeerBlocks& blocks, int64_t skip) {
  return blocks.rows * std::max<int64_t>(0, blocks.per_row() - skip);
}

SeerLoss SeerDistill(Context& ctx, const Tensor& gate_q, const Tensor& gate_k,
                     const Tensor& block_maxima, const SeerBlocks& blocks, int64_t skip,
                     double weight) {
  RequireCpu(ctx, "SeerDistill");
  CheckGate("SeerDistill", gate_q, gate_k, blocks);
  const int64_t fine = blocks.rows * BlocksPerRow(blocks.row_length);
  LONGSPAN_CHECK(block_maxima.shape() == Shape({gate_q.dim(0), fine, fine}) &&
                 block_maxima.dtype() == AccumulatorOf(gate_q.dtype()))
      << "SeerDistill: block_maxima " << block_maxima.Describe() << " for gate queries "
      << gate_q.Describe() << " and " << fine << " blocks of " << kMaskBlock << " tokens";
  return DispatchFloat(gate_q.dtype(), "SeerDistill", [&]<class T>() {
    return Distillation<T>(ctx, gate_q, gate_k, block_maxima, blocks, skip, weight).Run();
  });
}

std::string SeerSelection::ToString() const {
  return top_k > 0 ? Str("top_k ", top_k) : Str("threshold ", threshold);
}

KeptBlocks SeerSelect(Context& ctx, const Tensor& gate_q, const Tensor& gate_k,
                      const SeerBlocks& blocks, const SeerSelection& selection) {
  RequireCpu(ctx, "SeerSelect");
  CheckGate("SeerSelect", gate_q, gate_k, blocks);
  const bool by_rank = selection.top_k >= 1 && selection.threshold == 0;
  const bool by_share = selection.top_k == 0 && selection.threshold > 0 && selection.threshold < 1;
  LONGSPAN_CHECK(by_rank || by_share)
      << "SeerSelect: top_k is " << selection.top_k << " and threshold " << selection.threshold
      << "; give top_k of at least 1, or a threshold between 0 and 1, and leave the other at 0";
  const int64_t heads = gate_q.dim(0), n = blocks.count();
  std::vector<std::vector<int64_t>> chosen(static_cast<size_t>(heads * n));
  DispatchFloat(gate_q.dtype(), "SeerSelect", [&]<class T>() {
    ParallelFor(ctx, heads * n, [&](int64_t task, int) {
      const int64_t i = task % n;
      chosen[static_cast<size_t>(task)] =
          Choose(GateRows<T>(gate_q, gate_k, task / n, blocks), i,
                 blocks.first_key[static_cast<size_t>(i)], selection);
    });
  });
  // From the gate's blocks to those of masks.
  const int64_t fine_per_row = BlocksPerRow(blocks.row_length);
  const int64_t each = blocks.block_size / kMaskBlock, per_row = blocks.per_row();
  KeptBlocks kept;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t query = 0; query < blocks.rows * fine_per_row; ++query) {
      const int64_t row = query / fine_per_row, i = row * per_row + query % fine_per_row / each;
      for (const int64_t j : chosen[static_cast<size_t>(h * n + i)]) {
        const int64_t begin = row * fine_per_row + j % per_row * each;
        const int64_t end = row * fine_per_row + std::min(fine_per_row, (j % per_row + 1) * each);
        for (int64_t key = begin; key < end; ++key) {
          kept.blocks.push_back(static_cast<int32_t>(key));
        }
      }
      kept.offsets.push_back(static_cast<int64_t>(kept.blocks.size()));
    }
  }
  return kept;
}

}  // namespace longspan::ops
