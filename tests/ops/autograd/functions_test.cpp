#include "ops/autograd/functions.h"

#include "ops/embedding/embedding.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using autograd::Parameter;
using autograd::Tape;
using autograd::Var;

constexpr int64_t kTokens = 4, kWidth = 5, kVocab = 7;

DType Wide() { return OnCuda() ? DType::kF32 : DType::kF64; }

struct Weights {
  Parameter norm, linear, head, table;
};

Weights MakeWeights(Context& ctx, bool trained) {
  const auto make = [&](const char* name, Shape shape, uint64_t seed) {
    return Parameter{name, FromVec(ctx, shape, Wide(), Normal(shape.numel(), seed)),
                     trained ? ctx.Zeros(shape, Wide()) : Tensor()};
  };
  return {make("norm", {kWidth}, 1), make("linear", {kWidth, kWidth}, 2),
          make("head", {kVocab, kWidth}, 3), make("table", {kVocab, kWidth}, 4)};
}

// The gradient of the embeddings in front of a norm, a linear layer and a loss.
Vec InputGradient(Context& ctx, const Weights& w) {
  Tape tape(ctx);
  const std::vector<int32_t> ids = {3, 0, 6, 3};
  Context host(ContextOptions{.threads = 1});
  Tensor host_ids = host.Empty({kTokens}, DType::kI32);
  host_ids.WriteFrom(ids.data());
  ops::EmbeddingOrder order = ops::OrderTokens(host, host_ids, kVocab);
  for (Tensor* part : {&order.tokens, &order.pieces, &order.joins}) *part = CopyTo(ctx, *part);
  const Var rows = autograd::Embedding(tape, IntTensor(ctx, ids), w.table, Wide(), order);
  const Var y = autograd::Linear(tape, autograd::RmsNorm(tape, rows, w.norm, 1e-2), w.linear);
  autograd::LinearCrossEntropy(tape, y, w.head, IntTensor(ctx, {1, -1, 0, 6}), {});
  tape.Backward();
  return ToVec(rows.grad());
}

TEST(FunctionsTest, AnUndefinedGradientMeansThatNoneIsWanted) {
  Context ctx = OpContext(1);
  const Weights trained = MakeWeights(ctx, true);
  Weights frozen = MakeWeights(ctx, false);
  frozen.table = MakeWeights(ctx, true).table;
  const Vec expected = InputGradient(ctx, trained);
  ASSERT_EQ(expected.size(), size_t{kTokens * kWidth});
  EXPECT_EQ(InputGradient(ctx, frozen), expected);
  for (const Parameter* p : {&trained.norm, &trained.linear, &trained.head, &trained.table}) {
    const Vec zeros(static_cast<size_t>(p->value.numel()));
    EXPECT_GT(RelMax(ToVec(p->grad), zeros), 1e-6) << p->name;
  }
}

TEST(FunctionsTest, NothingIsRecordedBelowTheFirstTrainedParameter) {
  Context ctx = OpContext(1);
  const Weights frozen = MakeWeights(ctx, false), trained = MakeWeights(ctx, true);
  Tape tape(ctx);
  const Var x = autograd::Embedding(tape, IntTensor(ctx, {3, 0, 6}), frozen.table, Wide());
  const Var below =
      autograd::Linear(tape, autograd::RmsNorm(tape, x, frozen.norm, 1e-2), frozen.linear);
  const Var sum = autograd::ResidualAdd(tape, x, autograd::Gelu(tape, below));
  EXPECT_EQ(tape.size(), 0u);
  EXPECT_FALSE(sum.requires_grad());
  autograd::LinearCrossEntropy(tape, sum, frozen.head, IntTensor(ctx, {1, -1, 0}), {});
  EXPECT_EQ(tape.size(), 0u);
  const Var above = autograd::Linear(tape, sum, trained.linear);
  autograd::LinearCrossEntropy(tape, autograd::RmsNorm(tape, above, frozen.norm, 1e-2), frozen.head,
                               IntTensor(ctx, {1, -1, 0}), {});
  EXPECT_EQ(tape.size(), 3u);
  tape.Backward();
  EXPECT_FALSE(sum.grad().defined());
  EXPECT_GT(RelMax(ToVec(trained.linear.grad), Vec(kWidth * kWidth)), 1e-6);
}

// full -> gate -> distance, with the price of the gates, against finite differences.
TEST(FunctionsTest, GatesOfAFrozenModelGetTheirGradient) {
  Context ctx = OpContext(1);
  const Shape shape{kTokens, 4, 3};
  const Tensor full = FromVec(ctx, shape, Wide(), Normal(shape.numel(), 1));
  const Tensor stream = FromVec(ctx, shape, Wide(), Normal(shape.numel(), 2));
  const Tensor target = FromVec(ctx, {kTokens, 12}, Wide(), Normal(shape.numel(), 3));
  const Tensor labels = IntTensor(ctx, {1, -1, 0, 6});
  Vec alpha = {0.25, 0.75};
  const auto loss = [&](Parameter* gate) {
    const Parameter copy{"alpha", FromVec(ctx, {2}, Wide(), alpha),
                         gate != nullptr ? ctx.Zeros({2}, Wide()) : Tensor()};
    Tape tape(ctx, gate != nullptr);
    const Var o = autograd::DuoGate(tape, Var(full), Var(stream), copy);
    Tensor sums =
        autograd::HiddenDistance(tape, autograd::Reshape(tape, o, {kTokens, 12}), target, labels);
    autograd::GatePenalty(tape, copy, {.weight = 0.3, .share = 0.5}, sums);
    tape.Backward();
    if (gate != nullptr) *gate = copy;
    if (gate != nullptr) {
      EXPECT_EQ(ToVec(sums)[1], 3 * 0.5);  // tokens x mean of alpha
    }
    return ToVec(sums)[0];
  };
  Parameter gate;
  loss(&gate);
  const Vec expected = NumericGradient(
      alpha, [&] { return loss(nullptr); }, OnCuda() ? 1e-2 : 1e-5);
  EXPECT_LT(RelMax(ToVec(gate.grad), expected), OnCuda() ? 1e-4 : 1e-8);
}

TEST(FunctionsTest, EmbeddingBackwardNamesItsOperand) {
  Context ctx = OpContext(1);
  Tensor none;
  try {
    ops::EmbeddingBackward(ctx, IntTensor(ctx, {0}), ctx.Zeros({1, 2}, DType::kF32), none);
    ADD_FAILURE() << "an undefined dtable was accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("dtable is undefined"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace longspan::test
