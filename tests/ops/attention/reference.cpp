#include "tests/ops/attention/reference.h"

#include <cmath>
#include <limits>

namespace longspan::test {
namespace {

using ops::PatternKind;

// Global token index of every local row of a block list.
std::vector<int64_t> GlobalTokens(const ops::Documents& documents, const ops::BlockList& list) {
  std::vector<int64_t> tokens;
  const int64_t length = documents.row_length, per_row = (length + 63) / 64;
  for (const int32_t id : list.ids) {
    const int64_t row = id / per_row, block = id % per_row;
    for (int64_t t = block * 64; t < length && t < (block + 1) * 64; ++t) {
      tokens.push_back(row * length + t);
    }
  }
  return tokens;
}

// One query head's probabilities [Tq, Tk] and lse.
struct Probabilities {
  Vec p, lse;
};
Probabilities HeadProbabilities(const NaiveProblem& a, const Vec& q, const Vec& k, int64_t h) {
  const auto queries = GlobalTokens(*a.documents, a.queries);
  const auto keys = GlobalTokens(*a.documents, a.keys);
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  Probabilities out{Vec(queries.size() * keys.size()), Vec(queries.size())};
  for (size_t i = 0; i < queries.size(); ++i) {
    const double* qi = &q[(i * static_cast<size_t>(a.heads) + h) * a.dim];
    double* row = out.p.data() + i * keys.size();
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    std::vector<size_t> seen;
    for (size_t j = 0; j < keys.size(); ++j) {
      if (!Sees(a.pattern, a.kv_heads, *a.documents, kv_head, queries[i], keys[j])) continue;
      const double* kj = &k[(j * static_cast<size_t>(a.kv_heads) + kv_head) * a.dim];
      for (int64_t d = 0; d < a.dim; ++d) row[j] += a.scale * qi[d] * kj[d];
      top = std::max(top, row[j]);
      seen.push_back(j);
    }
    for (const size_t j : seen) sum += std::exp(row[j] - top);
    out.lse[i] = seen.empty() ? top : top + std::log(sum);
    for (const size_t j : seen) row[j] = std::exp(row[j] - out.lse[i]);
  }
  return out;
}

}  // namespace

bool Sees(const ops::AttentionPattern& pattern, int64_t kv_heads, const ops::Documents& documents,
          int64_t kv_head, int64_t q, int64_t k) {
  const int64_t start = documents.doc_begin[static_cast<size_t>(q)];
  const int64_t stop = documents.doc_end[static_cast<size_t>(q)];
  if (k < start || k >= stop) return false;
  if (pattern.kind == PatternKind::kFull) return true;
  const int64_t age = q - k, position = k - start;
  if (age < 0) return false;
  switch (pattern.kind) {
    case PatternKind::kFull:
    case PatternKind::kCausal:
      return true;
    case PatternKind::kWindow:
      return age < pattern.window || position < pattern.sinks;
    case PatternKind::kS2:
      break;
  }
  const ops::S2Options& s2 = pattern.s2;
  if (!s2.homogeneous && kv_head >= kv_heads - s2.dense_heads) return true;
  const int64_t row = start / documents.row_length * documents.row_length;
  const auto block_of = [&](int64_t t) { return (t - row) / s2.block_size; };
  if (block_of(q) < block_of(k) + s2.local_blocks) return true;
  const int64_t origin = s2.phase == ops::StridePhase::kRow ? 0 : block_of(start);
  int64_t head_step = s2.head_step;
  if (head_step == 0) head_step = s2.stride_blocks >= kv_heads ? s2.stride_blocks / kv_heads : 1;
  const int64_t head = s2.homogeneous ? 0 : kv_head;
  // The key's block is on this head's stripe when a whole number of strides separates it from the
  // block that the head's shift points to.
  const int64_t distance = block_of(k) - origin + head * head_step + s2.head_offset;
  return distance == distance / s2.stride_blocks * s2.stride_blocks;
}

NaiveOutput NaiveForward(const NaiveProblem& a, const Vec& q, const Vec& k, const Vec& v) {
  const size_t rows = static_cast<size_t>(a.queries.tokens());
  const size_t keys = static_cast<size_t>(a.keys.tokens());
  NaiveOutput out{Vec(rows * a.heads * a.dim), Vec(rows * a.heads)};
  for (int64_t h = 0; h < a.heads; ++h) {
    const Probabilities head = HeadProbabilities(a, q, k, h);
    const int64_t kv_head = h / (a.heads / a.kv_heads);
    for (size_t i = 0; i < rows; ++i) {
      double* o = &out.o[(i * a.heads + h) * a.dim];
      out.lse[i * a.heads + h] = head.lse[i];
      for (size_t j = 0; j < keys; ++j) {
        const double p = head.p[i * keys + j];
        if (p == 0) continue;
        for (int64_t d = 0; d < a.dim; ++d) o[d] += p * v[(j * a.kv_heads + kv_head) * a.dim + d];
      }
    }
  }
  return out;
}

NaiveGradients NaiveBackward(const NaiveProblem& a, const Vec& q, const Vec& k, const Vec& v,
                             const Vec& d_out, const Vec& dlse) {
  const size_t rows = static_cast<size_t>(a.queries.tokens());
  const size_t keys = static_cast<size_t>(a.keys.tokens());
  NaiveGradients out{Vec(q.size()), Vec(k.size()), Vec(v.size())};
  for (int64_t h = 0; h < a.heads; ++h) {
    const Probabilities head = HeadProbabilities(a, q, k, h);
    const int64_t kv_head = h / (a.heads / a.kv_heads);
    for (size_t i = 0; i < rows; ++i) {
      const size_t qi = (i * a.heads + h) * a.dim;
      const double* p = head.p.data() + i * keys;
      Vec dp(keys);
      double mean = 0;
      for (size_t j = 0; j < keys; ++j) {
        if (p[j] == 0) continue;
        const size_t kj = (j * a.kv_heads + kv_head) * a.dim;
        for (int64_t d = 0; d < a.dim; ++d) {
          dp[j] += d_out[qi + d] * v[kj + d];
          out.dv[kj + d] += p[j] * d_out[qi + d];
        }
        mean += p[j] * dp[j];
      }
      for (size_t j = 0; j < keys; ++j) {
        if (p[j] == 0) continue;
        const size_t kj = (j * a.kv_heads + kv_head) * a.dim;
        const double ds = p[j] * (dp[j] - mean + dlse[i * a.heads + h]) * a.scale;
        for (int64_t d = 0; d < a.dim; ++d) {
          out.dq[qi + d] += ds * k[kj + d];
          out.dk[kj + d] += ds * q[qi + d];
        }
      }
    }
  }
  return out;
}

}  // namespace longspan::test
