#include "ops/autograd/var.h"

#include "ops/autograd/functions.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using autograd::Tape;
using autograd::Var;

TEST(VarTest, AddsInPlaceOnlyWhenNobodyShares) {
  Context ctx = OpContext(1);
  const Var x(ctx.Zeros({2}, DType::kF32), true);
  const Tensor first = FromVec(ctx, {2}, DType::kF32, {1, 2});
  x.AddGrad(ctx, first);
  EXPECT_EQ(x.grad().raw(), first.raw());  // kept as it is, without a copy
  x.AddGrad(ctx, FromVec(ctx, {2}, DType::kF32, {10, 20}));
  EXPECT_EQ(ToVec(first), (Vec{1, 2}));
  EXPECT_EQ(ToVec(x.grad()), (Vec{11, 22}));
  const std::byte* own = x.grad().raw();
  x.AddGrad(ctx, FromVec(ctx, {2}, DType::kF32, {100, 200}));
  EXPECT_EQ(x.grad().raw(), own);
  EXPECT_EQ(ToVec(x.grad()), (Vec{111, 222}));
}

TEST(VarTest, RefusesAndIgnores) {
  Context ctx = OpContext(1);
  const Var wanted(ctx.Zeros({2}, DType::kF32), true), other(ctx.Zeros({2}, DType::kF32));
  EXPECT_THROW(wanted.AddGrad(ctx, ctx.Zeros({3}, DType::kF32)), InvalidArgument);
  EXPECT_THROW(wanted.AddGrad(ctx, ctx.Zeros({2}, DType::kBF16)), InvalidArgument);
  other.AddGrad(ctx, ctx.Zeros({2}, DType::kF32));
  EXPECT_FALSE(other.grad().defined());
}

// x has three consumers, two of them residual adds: those hand the gradient of their result on
// without a copy, so the same memory is the gradient of x, of the branch and of the sum.
TEST(VarTest, ASharedGradientIsNotAddedIntoInPlace) {
  Context ctx = OpContext(1);
  const DType dtype = OnCuda() ? DType::kF32 : DType::kF64;
  const Vec at = Normal(6, 1), seed = Normal(6, 2);
  Tape tape(ctx);
  const Var x(FromVec(ctx, {2, 3}, dtype, at), true);
  const Var branch = autograd::Gelu(tape, x);
  const Var inner = autograd::ResidualAdd(tape, x, branch);
  const Var y = autograd::ResidualAdd(tape, inner, x);
  const Tensor dy = FromVec(ctx, {2, 3}, dtype, seed);
  y.AddGrad(ctx, dy);
  tape.Backward();

  Vec moved = at;
  Context host(ContextOptions{.threads = 1});
  const Vec expected = NumericGradient(moved, [&] {  // y = 2 x + gelu(x)
    Tape silent(host, /*recording=*/false);
    const Var from(FromVec(host, {2, 3}, DType::kF64, moved));
    const Vec gelu = ToVec(autograd::Gelu(silent, from).value());
    return 2 * Dot(seed, moved) + Dot(seed, gelu);
  });
  EXPECT_LE(RelRms(ToVec(x.grad()), expected), OnCuda() ? 1e-6 : 1e-8);
  EXPECT_EQ(ToVec(dy), seed);
  EXPECT_EQ(ToVec(y.grad()), seed);
  EXPECT_EQ(ToVec(inner.grad()), seed);
  EXPECT_EQ(ToVec(branch.grad()), seed);
}

}  // namespace
}  // namespace longspan::test
