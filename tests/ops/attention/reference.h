#pragma once
#include <cstdint>

#include "ops/attention/block_mask.h"
#include "tests/support/numeric.h"

namespace longspan::test {

// Who sees whom, written from the words of ops/attention/pattern.h and independent of
// ops::Visible: positions count from the start of the token's document.
bool Sees(const ops::AttentionPattern& pattern, int64_t kv_heads, const ops::Documents& documents,
          int64_t kv_head, int64_t q, int64_t k);

// Attention of one mask in f64 with full probability matrices. q [Tq, Hq, D] holds the tokens of
// `queries` in order, k and v [Tk, Hkv, D] those of `keys`.
struct NaiveProblem {
  ops::AttentionPattern pattern;
  const ops::Documents* documents;
  ops::BlockList queries, keys;
  int64_t heads, kv_heads, dim;
  double scale;  // not 0
};
struct NaiveOutput {
  Vec o;    // [Tq, Hq, D]
  Vec lse;  // [Tq, Hq]
};
NaiveOutput NaiveForward(const NaiveProblem& problem, const Vec& q, const Vec& k, const Vec& v);

// Gradients of <d_out, o> + <dlse, lse>, through the Jacobian of the softmax (not through delta).
struct NaiveGradients {
  Vec dq, dk, dv;
};
NaiveGradients NaiveBackward(const NaiveProblem& problem, const Vec& q, const Vec& k, const Vec& v,
                             const Vec& d_out, const Vec& dlse);

// The same of sigmoid attention, which has no lse: o = sum of sigmoid(s + bias) v.
Vec NaiveSigmoidForward(const NaiveProblem& problem, double bias, const Vec& q, const Vec& k,
                        const Vec& v);
NaiveGradients NaiveSigmoidBackward(const NaiveProblem& problem, double bias, const Vec& q,
                                    const Vec& k, const Vec& v, const Vec& d_out);

}  // namespace longspan::test
