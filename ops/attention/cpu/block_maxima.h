#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/attention/arguments.h"
#include "ops/attention/cpu/blocked.h"

// Largest probabilities of blocks (AttentionOptions::want_block_maxima). A task owns one query
// block of one kv head and so one row of the result.
namespace longspan::ops::cpu {

// Where the rows and columns of the result are.
class BlockMaxima {
 public:
  explicit BlockMaxima(const ForwardArgs& args) : args_(args) {
    if (!wanted()) return;
    const Documents& documents = args.mask.documents();
    column_.assign(static_cast<size_t>(documents.rows * BlocksPerRow(documents.row_length)), -1);
    const std::vector<int32_t>& ids = args.mask.keys().ids;
    for (size_t j = 0; j < ids.size(); ++j) {
      column_[static_cast<size_t>(ids[j])] = static_cast<int64_t>(j);
    }
  }
  bool wanted() const { return args_.block_maxima.defined(); }
  template <class A>
  void Raise(BlockTask task, int32_t key, A probability) const {
    const int64_t row = task.kv_head * args_.mask.queries().size() + task.index;
    A& at = args_.block_maxima
                .data<A>()[row * args_.mask.keys().size() + column_[static_cast<size_t>(key)]];
    at = std::max(at, probability);
  }

 private:
  const ForwardArgs& args_;
  std::vector<int64_t> column_;  // by global block id
};

// Scores of one query head's 64 rows, kept block by block until the rows' lse is known.
class ScoreMaxima {
 public:
  void Start(int32_t key) { keys_.push_back(key); }
  // `scores` [keys][64 queries]; `bits`: as SoftmaxStep.
  void Keep(const float* scores, int64_t keys, const uint64_t* bits) {
    const size_t at = best_.size();
    best_.resize(at + 64, -std::numeric_limits<float>::infinity());
    float* best = best_.data() + at;
    for (int64_t j = 0; j < keys; ++j) {
      const float* s = scores + 64 * j;
      for (int i = 0; i < 64; ++i) {
        const bool seen = bits == nullptr || (bits[j] >> i & 1) != 0;
        best[i] = seen && s[i] > best[i] ? s[i] : best[i];
      }
    }
  }
  // Of head g of `group`, whose Keep calls took turns: block after block, each with its heads in
  // order. `lse` in units of log2, as scale * s; rows that see nothing have -inf.
  void Raise(const BlockMaxima& maxima, BlockTask task, int64_t g, int64_t group, float scale,
             const float* lse, int64_t tokens) const {
    for (size_t n = 0; n < keys_.size(); ++n) {
      const float* best =
          best_.data() + 64 * (n * static_cast<size_t>(group) + static_cast<size_t>(g));
      float highest = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < tokens; ++i) {
        if (lse[i] != -std::numeric_limits<float>::infinity()) {
          highest = std::max(highest, scale * best[i] - lse[i]);
        }
      }
      maxima.Raise(task, keys_[n], std::exp2(highest));
    }
  }

 private:
  std::vector<int32_t> keys_;
  std::vector<float> best_;  // [block][head][64 queries]
};

}  // namespace longspan::ops::cpu
