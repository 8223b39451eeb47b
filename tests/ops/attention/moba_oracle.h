#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ops/attention/documents.h"
#include "tests/support/numeric.h"

namespace longspan::test {

// Mixture of block attention from its definition, in f64 and token by token; shares nothing with
// ops/attention but the documents. q, d_out [T, heads, dim]; k, v [T, kv_heads, dim].
struct MobaProblem {
  std::shared_ptr<const ops::Documents> documents;
  int64_t block_size = 64, top_k = 2;
  int64_t heads = 1, kv_heads = 1, dim = 8;
  double scale = 0;  // never 0 here

  int64_t tokens() const { return documents->tokens(); }
  std::string Name() const;
};

// A block that a token may choose: tokens [begin, end).
struct MobaCandidate {
  int64_t begin, end;
  bool operator==(const MobaCandidate&) const = default;
};
std::vector<MobaCandidate> MobaCandidates(const MobaProblem& p, int64_t token);
// Gates of the candidates of one row, in their order.
class MobaGate {
 public:
  MobaGate(const MobaProblem& p, const Vec& q, const Vec& k);  // which outlive it
  Vec operator()(int64_t token, int64_t head);

 private:
  const MobaProblem& p;
  const Vec &q, &k;
  std::map<std::pair<int64_t, int64_t>, Vec> means;  // by first token and kv head
};

// choice[token * heads + head]: the chosen candidates by their index, ascending.
using MobaChoice = std::vector<std::vector<size_t>>;
MobaChoice MobaChoose(const MobaProblem& p, const Vec& q, const Vec& k);

struct MobaOutput {
  Vec o, lse;
};
MobaOutput MobaOracleForward(const MobaProblem& p, const MobaChoice& choice, const Vec& q,
                             const Vec& k, const Vec& v);
struct MobaOracleGradients {
  Vec dq, dk, dv;
};
MobaOracleGradients MobaOracleBackward(const MobaProblem& p, const MobaChoice& choice, const Vec& q,
                                       const Vec& k, const Vec& v, const Vec& d_out);

}  // namespace longspan::test
