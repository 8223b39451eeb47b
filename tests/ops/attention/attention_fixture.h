#pragma once
#include <iterator>
#include <optional>
#include <string>

#include "ops/attention/attention.h"
#include "ops/core/rng.h"
#include "tests/ops/attention/mask_cases.h"
#include "tests/ops/attention/reference.h"

namespace longspan::test {

// One attention problem with inputs drawn from a seed, its naive answer, and ways to run an
// implementation on it through shuffled K/V tables.
struct AttentionCase {
  MaskCase mask_case;
  DType dtype = DType::kF32;
  int64_t group = 1;  // query heads per kv head
  int64_t dim = 64;
  double scale = 0;  // as in AttentionOptions
  bool with_dlse = true;
  bool aligned = true;  // K and V of blocks that start at 16 bytes
  uint64_t seed = 1;
  ops::Normalization normalization = ops::Normalization::kSoftmax;
  std::optional<double> bias{};  // as in AttentionOptions

  int64_t heads() const { return mask_case.kv_heads * group; }
  bool sigmoid() const { return normalization == ops::Normalization::kSigmoid; }
  // Of sigmoid: what the naive answer takes.
  double ResolvedBias() const;
  std::string Name() const;
};

struct AttentionInputs {
  Vec q, k, v, d_out, dlse;
  NaiveProblem problem;
};
AttentionInputs MakeInputs(const AttentionCase& c);

// The implementations of ctx's device that take a problem.
std::vector<std::string> ImplementationsFor(const Context& ctx,
                                            const ops::AttentionProblem& problem);
std::vector<std::string> ImplementationsFor(const Context& ctx, const AttentionCase& c);

inline constexpr ops::Normalization kNormalizations[] = {ops::Normalization::kSoftmax,
                                                         ops::Normalization::kSigmoid};

// Properties of one case, each drawn on its own: taken from one index by different remainders,
// some would always occur together.
class Draws {
 public:
  explicit Draws(uint64_t seed) : rng_(seed, StreamOf("attention case")) {}
  template <class Values>
  auto Of(const Values& values) {
    return *(std::begin(values) + rng_.Below(next_++, std::size(values)));
  }

 private:
  Philox rng_;
  uint64_t next_ = 0;
};

// The error, relative to the largest element, that an implementation may have. bf16 operands are
// exact in f32 and the results are f32, so most are allowed no more than for f32. Those named after
// bf16 also take probabilities and score gradients in it.
double Tolerance(const std::string& name, DType dtype);

// What one implementation computed; lse is empty of sigmoid.
struct AttentionRun {
  Vec o, lse, dq, dk, dv;
  std::string implementation;
};
// Forward and backward of one call. K and V (and their gradients) lie in blocks scattered over a
// larger storage that is otherwise NaN; gradients start from a known value, which is taken off
// again, so that overwriting instead of adding shows.
// `mask`: the one to use; null: one of its own.
AttentionRun RunAttention(Context& ctx, const AttentionCase& c, const AttentionInputs& inputs,
                          const std::string& implementation,
                          std::shared_ptr<const ops::BlockMask> mask = nullptr);
std::shared_ptr<const ops::BlockMask> BuildMask(const MaskCase& c);
// What the naive attention of the case's normalization gives, in f64.
AttentionRun RunNaive(const AttentionCase& c, const AttentionInputs& inputs);

// Key blocks at random places of [tokens, kv heads, dim]-like storage with gaps. Not aligned: rows
// at odd places, of which nothing may assume more.
struct Scattered {
  int64_t elements = 0, token_stride = 0, first_block = 0, blocks = 0;
  std::vector<int64_t> offsets;
  std::shared_ptr<const ops::KvTable> Table(int64_t kv_heads) const {
    return std::make_shared<const ops::KvTable>(kv_heads, token_stride, first_block, offsets);
  }
};
Scattered Scatter(const ops::BlockList& keys, int64_t kv_heads, int64_t dim, bool aligned,
                  uint64_t seed);

}  // namespace longspan::test
