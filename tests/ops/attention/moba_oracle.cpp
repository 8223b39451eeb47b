#include "tests/ops/attention/moba_oracle.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/core/error.h"

namespace longspan::test {
namespace {

const double* RowOf(const Vec& x, int64_t token, int64_t heads, int64_t head, int64_t dim) {
  return x.data() + (token * heads + head) * dim;
}

double Product(const double* a, const double* b, int64_t n) {
  return std::inner_product(a, a + n, b, 0.0);
}

// First token of the block that holds `token`, within its document.
int64_t OwnBegin(const MobaProblem& p, int64_t token) {
  const int64_t length = p.documents->row_length, row = token - token % length;
  const int64_t grid = token - (token - row) % p.block_size;
  return std::max<int64_t>(grid, p.documents->doc_begin[static_cast<size_t>(token)]);
}

// Tokens that one row sees.
std::vector<int64_t> Keys(const MobaProblem& p, const MobaChoice& choice, int64_t token,
                          int64_t head) {
  std::vector<int64_t> keys;
  const std::vector<MobaCandidate> candidates = MobaCandidates(p, token);
  for (const size_t i : choice[static_cast<size_t>(token * p.heads + head)]) {
    for (int64_t t = candidates.at(i).begin; t < candidates.at(i).end; ++t) keys.push_back(t);
  }
  for (int64_t t = OwnBegin(p, token); t <= token; ++t) keys.push_back(t);
  return keys;
}

// Scores of a row's keys, and their log-sum-exp.
struct Scores {
  Vec s;
  double lse;
};
Scores ScoresOf(const MobaProblem& p, const std::vector<int64_t>& keys, const double* q,
                const Vec& k, int64_t kv_head) {
  Scores out{Vec(keys.size()), 0};
  for (size_t j = 0; j < keys.size(); ++j) {
    out.s[j] = p.scale * Product(q, RowOf(k, keys[j], p.kv_heads, kv_head, p.dim), p.dim);
  }
  const double top = *std::max_element(out.s.begin(), out.s.end());
  double sum = 0;
  for (const double s : out.s) sum += std::exp(s - top);
  out.lse = top + std::log(sum);
  return out;
}

}  // namespace

std::string MobaProblem::Name() const {
  return Str("rows ", documents->rows, " x ", documents->row_length, " B ", block_size, " top ",
             top_k, " Hq ", heads, " Hkv ", kv_heads, " D ", dim);
}

std::vector<MobaCandidate> MobaCandidates(const MobaProblem& p, int64_t token) {
  std::vector<MobaCandidate> candidates;
  const int64_t length = p.documents->row_length, row = token - token % length;
  const int64_t document = p.documents->doc_begin[static_cast<size_t>(token)];
  const int64_t own = OwnBegin(p, token);
  for (int64_t grid = row; grid < own; grid += p.block_size) {
    const int64_t begin = std::max(grid, document), end = grid + p.block_size;
    if (begin < end && end <= own) candidates.push_back({begin, end});
  }
  return candidates;
}

namespace {

Vec MeanKey(const MobaProblem& p, const Vec& k, const MobaCandidate& c, int64_t kv_head) {
  Vec mean(static_cast<size_t>(p.dim));
  for (int64_t t = c.begin; t < c.end; ++t) {
    for (int64_t d = 0; d < p.dim; ++d) {
      mean[static_cast<size_t>(d)] += RowOf(k, t, p.kv_heads, kv_head, p.dim)[d];
    }
  }
  for (double& x : mean) x /= static_cast<double>(c.end - c.begin);
  return mean;
}

}  // namespace

MobaGate::MobaGate(const MobaProblem& problem, const Vec& query, const Vec& key)
    : p(problem), q(query), k(key) {}

Vec MobaGate::operator()(int64_t token, int64_t head) {
  Vec gates;
  const int64_t kv_head = head * p.kv_heads / p.heads;
  for (const MobaCandidate& c : MobaCandidates(p, token)) {
    Vec& mean = means[{c.begin, kv_head}];  // one end for each begin
    if (mean.empty()) mean = MeanKey(p, k, c, kv_head);
    gates.push_back(Product(RowOf(q, token, p.heads, head, p.dim), mean.data(), p.dim));
  }
  return gates;
}

MobaChoice MobaChoose(const MobaProblem& p, const Vec& q, const Vec& k) {
  MobaChoice choice;
  MobaGate gate(p, q, k);
  for (int64_t t = 0; t < p.tokens(); ++t) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const Vec gates = gate(t, h);
      std::vector<size_t> order(gates.size());
      std::iota(order.begin(), order.end(), size_t{0});
      std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return gates[a] > gates[b] || (gates[a] == gates[b] && a < b);
      });
      order.resize(std::min(order.size(), static_cast<size_t>(p.top_k - 1)));
      std::sort(order.begin(), order.end());
      choice.push_back(std::move(order));
    }
  }
  return choice;
}

MobaOutput MobaOracleForward(const MobaProblem& p, const MobaChoice& choice, const Vec& q,
                             const Vec& k, const Vec& v) {
  MobaOutput out{Vec(q.size()), Vec(static_cast<size_t>(p.tokens() * p.heads))};
  for (int64_t t = 0; t < p.tokens(); ++t) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t kv_head = h * p.kv_heads / p.heads;
      const std::vector<int64_t> keys = Keys(p, choice, t, h);
      const Scores row = ScoresOf(p, keys, RowOf(q, t, p.heads, h, p.dim), k, kv_head);
      out.lse[static_cast<size_t>(t * p.heads + h)] = row.lse;
      for (size_t j = 0; j < keys.size(); ++j) {
        const double weight = std::exp(row.s[j] - row.lse);
        const double* value = RowOf(v, keys[j], p.kv_heads, kv_head, p.dim);
        for (int64_t d = 0; d < p.dim; ++d) {
          out.o[static_cast<size_t>((t * p.heads + h) * p.dim + d)] += weight * value[d];
        }
      }
    }
  }
  return out;
}

MobaOracleGradients MobaOracleBackward(const MobaProblem& p, const MobaChoice& choice, const Vec& q,
                                       const Vec& k, const Vec& v, const Vec& d_out) {
  MobaOracleGradients out{Vec(q.size()), Vec(k.size()), Vec(v.size())};
  for (int64_t t = 0; t < p.tokens(); ++t) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t kv_head = h * p.kv_heads / p.heads;
      const std::vector<int64_t> keys = Keys(p, choice, t, h);
      const double* query = RowOf(q, t, p.heads, h, p.dim);
      const double* above = RowOf(d_out, t, p.heads, h, p.dim);
      const Scores row = ScoresOf(p, keys, query, k, kv_head);
      Vec weight(keys.size()), flow(keys.size());
      double mean_flow = 0;
      for (size_t j = 0; j < keys.size(); ++j) {
        weight[j] = std::exp(row.s[j] - row.lse);
        flow[j] = Product(above, RowOf(v, keys[j], p.kv_heads, kv_head, p.dim), p.dim);
        mean_flow += weight[j] * flow[j];
      }
      for (size_t j = 0; j < keys.size(); ++j) {
        const double slope = p.scale * weight[j] * (flow[j] - mean_flow);
        const size_t key = static_cast<size_t>((keys[j] * p.kv_heads + kv_head) * p.dim);
        const size_t row_at = static_cast<size_t>((t * p.heads + h) * p.dim);
        for (size_t d = 0; d < static_cast<size_t>(p.dim); ++d) {
          out.dq[row_at + d] += slope * k[key + d];
          out.dk[key + d] += slope * query[d];
          out.dv[key + d] += weight[j] * above[d];
        }
      }
    }
  }
  return out;
}

}  // namespace longspan::test
