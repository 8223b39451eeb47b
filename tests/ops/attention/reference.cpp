#include "tests/ops/attention/reference.h"

#include <cmath>
#include <limits>

namespace longspan::test {
namespace {

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

// Calls visit(offset in q, offset in k, score) for every visible pair of every query head.
template <class Visit>
void ForEachPair(const NaiveProblem& a, const Vec& q, const Vec& k, const Visit& visit) {
  const auto queries = GlobalTokens(*a.documents, a.queries);
  const auto keys = GlobalTokens(*a.documents, a.keys);
  for (size_t i = 0; i < queries.size(); ++i) {
    for (int64_t h = 0; h < a.heads; ++h) {
      const int64_t kv_head = h / (a.heads / a.kv_heads);
      const size_t qi = (i * static_cast<size_t>(a.heads) + h) * a.dim;
      for (size_t j = 0; j < keys.size(); ++j) {
        if (!Sees(a.pattern, a.kv_heads, *a.documents, kv_head, queries[i], keys[j])) continue;
        const size_t kj = (j * static_cast<size_t>(a.kv_heads) + kv_head) * a.dim;
        double score = 0;
        for (int64_t d = 0; d < a.dim; ++d) score += a.scale * q[qi + d] * k[kj + d];
        visit(qi, kj, score);
      }
    }
  }
}

}  // namespace

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

Vec NaiveSigmoidForward(const NaiveProblem& a, double bias, const Vec& q, const Vec& k,
                        const Vec& v) {
  Vec o(q.size());
  ForEachPair(a, q, k, [&](size_t qi, size_t kj, double score) {
    const double half = (score + bias) / 2;
    const double p = std::exp(half) / (2 * std::cosh(half));
    for (int64_t d = 0; d < a.dim; ++d) o[qi + d] += p * v[kj + d];
  });
  return o;
}

NaiveGradients NaiveSigmoidBackward(const NaiveProblem& a, double bias, const Vec& q, const Vec& k,
                                    const Vec& v, const Vec& d_out) {
  NaiveGradients out{Vec(q.size()), Vec(k.size()), Vec(v.size())};
  ForEachPair(a, q, k, [&](size_t qi, size_t kj, double score) {
    const double half = (score + bias) / 2;
    const double p = std::exp(half) / (2 * std::cosh(half));
    const double derivative = 1 / (4 * std::cosh(half) * std::cosh(half));
    double dp = 0;
    for (int64_t d = 0; d < a.dim; ++d) dp += d_out[qi + d] * v[kj + d];
    for (int64_t d = 0; d < a.dim; ++d) {
      out.dv[kj + d] += p * d_out[qi + d];
      out.dq[qi + d] += a.scale * derivative * dp * k[kj + d];
      out.dk[kj + d] += a.scale * derivative * dp * q[qi + d];
    }
  });
  return out;
}

}  // namespace longspan::test
