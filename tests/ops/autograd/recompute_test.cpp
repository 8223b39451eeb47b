#include "ops/autograd/recompute.h"

#include "ops/autograd/functions.h"
#include "ops/autograd/kept.h"
#include "ops/elementwise/elementwise.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using autograd::KeptKind;
using autograd::Parameter;
using autograd::Tape;
using autograd::Var;

DType Wide() { return OnCuda() ? DType::kF32 : DType::kF64; }

TEST(RecomputeTest, TilesAreEvenAndSmallEnough) {
  for (const auto& [total, rows, tile] : std::vector<std::array<int64_t, 3>>{{1, 1, 1},
                                                                             {10, 3, 3},
                                                                             {100, 100, 100},
                                                                             {101, 100, 64},
                                                                             {4097, 4096, 2112},
                                                                             {8192, 4096, 4096},
                                                                             {1000, 256, 256},
                                                                             {129, 128, 128},
                                                                             {5, 1, 1}}) {
    EXPECT_EQ(autograd::TileRows(total, rows), tile) << total << " " << rows;
  }
}

// y = x + silu(x w^T) * (norm(x) u^T) in rows, with everything trained.
struct Rows {
  explicit Rows(Context& ctx, bool trained = true) {
    const auto make = [&](const char* name, Shape shape, uint64_t seed) {
      return Parameter{name, FromVec(ctx, shape, Wide(), Normal(shape.numel(), seed)),
                       trained ? ctx.Zeros(shape, Wide()) : Tensor()};
    };
    norm = make("norm", {kWidth}, 1);
    up = make("up", {kInner, kWidth}, 2);
    gate = make("gate", {kInner, kWidth}, 3);
    down = make("down", {kWidth, kInner}, 4);
  }
  Var operator()(Tape& tape, const Var& x) const {
    most = std::max(most, x.value().dim(0));
    ++runs;
    const Var h = autograd::RmsNorm(tape, x, norm, 1e-2);
    const Var inner =
        autograd::SwiGlu(tape, autograd::Linear(tape, h, gate), autograd::Linear(tape, h, up));
    return autograd::ResidualAdd(tape, x, autograd::Linear(tape, inner, down));
  }
  std::vector<Vec> Gradients() const {
    return {ToVec(norm.grad), ToVec(up.grad), ToVec(gate.grad), ToVec(down.grad)};
  }
  static constexpr int64_t kWidth = 5, kInner = 12;
  Parameter norm, up, gate, down;
  mutable int64_t most = 0, runs = 0;
};

struct Outcome {
  Vec y, dx;
  std::vector<Vec> weights;
};
// Of Rows between two other consumers of x. `tile` 0: not in tiles; `segment`: inside a recomputed
// segment.
Outcome RunRows(Context& ctx, int64_t tokens, int64_t tile, bool segment) {
  const Rows rows(ctx);
  const auto tiled = [&](Tape& tape, const Var& x) {
    const auto step = [&rows](Tape& t, const Var& part) { return rows(t, part); };
    return tile == 0 ? rows(tape, x) : autograd::RecomputeRows(tape, x, tile, true, step);
  };
  Tape tape(ctx);
  const Var x(FromVec(ctx, {tokens, Rows::kWidth}, Wide(), Normal(tokens * Rows::kWidth, 5)), true);
  const Var inner = autograd::ResidualAdd(tape, x, autograd::Gelu(tape, x));
  const Var y = segment ? autograd::Recompute(
                              tape, {inner},
                              [&](Tape& t, const std::vector<Var>& in) { return tiled(t, in[0]); })
                        : tiled(tape, inner);
  const Var sum = autograd::ResidualAdd(tape, y, inner);
  sum.AddGrad(ctx, FromVec(ctx, {tokens, Rows::kWidth}, Wide(), Normal(tokens * Rows::kWidth, 6)));
  tape.Backward();
  if (tile > 0) {
    EXPECT_LE(rows.most, tile);
    const int64_t size = autograd::TileRows(tokens, tile), tiles = (tokens + size - 1) / size;
    EXPECT_EQ(rows.runs, 2 * tiles) << "forward once and in the backward pass once";
  }
  return {ToVec(sum.value()), ToVec(x.grad()), rows.Gradients()};
}

TEST(RecomputeTest, RowsInTilesAreThoseAtOnce) {
  Context ctx = OpContext(2);
  const double tolerance = OnCuda() ? 1e-5 : 1e-13;
  for (const int64_t tokens : {1, 7, 130, 201}) {
    const Outcome whole = RunRows(ctx, tokens, 0, false);
    for (const int64_t tile : {1, 3, 64, 100, 500}) {
      for (const bool segment : {false, true}) {
        SCOPED_TRACE(Str(tokens, " tokens in tiles of ", tile, segment ? " in a segment" : ""));
        const Outcome tiled = RunRows(ctx, tokens, tile, segment);
        EXPECT_LE(RelMax(tiled.y, whole.y), tolerance);
        EXPECT_LE(RelMax(tiled.dx, whole.dx), tolerance);
        for (size_t i = 0; i < whole.weights.size(); ++i) {
          EXPECT_LE(RelMax(tiled.weights[i], whole.weights[i]), tolerance) << i;
          EXPECT_GT(RelMax(whole.weights[i], Vec(whole.weights[i].size())), 1e-3);
        }
      }
    }
  }
}

TEST(RecomputeTest, RowsThatLeadToNothingTrainedMakeNoEntry) {
  Context ctx = OpContext(1);
  const Rows frozen(ctx, /*trained=*/false);
  const auto step = [&](Tape& t, const Var& part) { return frozen(t, part); };
  const Tensor values = FromVec(ctx, {9, Rows::kWidth}, Wide(), Normal(9 * Rows::kWidth, 5));
  Tape tape(ctx), silent(ctx, /*recording=*/false);
  EXPECT_FALSE(autograd::RecomputeRows(tape, Var(values), 4, false, step).requires_grad());
  EXPECT_EQ(tape.size(), 0u);
  EXPECT_FALSE(autograd::RecomputeRows(silent, Var(values, true), 4, true, step).requires_grad());
  EXPECT_EQ(silent.size(), 0u);
  const Var x(values, true);
  const Var y = autograd::RecomputeRows(tape, x, 4, false, step);
  EXPECT_EQ(tape.size(), 1u);
  y.AddGrad(ctx, values);
  tape.Backward();
  EXPECT_GT(RelMax(ToVec(x.grad()), Vec(9 * Rows::kWidth)), 1e-3);
}

// A segment of two ops that can leave their results: x -> 2 x, both as attention would be.
struct Doubles {
  Var operator()(Tape& tape, const Var& x) {
    Context& ctx = tape.context();
    const Tensor value = autograd::MakeOnce(tape, KeptKind::kAttention, [&] {
      ++made;
      return ops::ResidualAdd(ctx, x.value(), x.value());
    });
    Var y(value, tape.recording() && x.requires_grad());
    if (y.requires_grad()) {
      tape.Record([&ctx, x, y] {
        x.AddGrad(ctx, y.grad());
        x.AddGrad(ctx, y.grad());
      });
    }
    return y;
  }
  int made = 0;
};

TEST(RecomputeTest, AttentionRunsOnceWhereItIsKept) {
  Context ctx = OpContext(1);
  for (const bool keep : {false, true}) {
    Doubles doubles;
    Tape tape(ctx);
    const Var x(FromVec(ctx, {2}, Wide(), {1, 2}), true);
    const auto segment = [&](Tape& t, const std::vector<Var>& in) {
      return autograd::ResidualAdd(t, doubles(t, doubles(t, in[0])), in[0]);  // 5 x
    };
    const Var y = autograd::Recompute(tape, {x}, segment, {.keep_attention = keep});
    EXPECT_EQ(doubles.made, 2);
    y.AddGrad(ctx, FromVec(ctx, {2}, Wide(), {10, 100}));
    tape.Backward();
    EXPECT_EQ(doubles.made, keep ? 2 : 4);
    EXPECT_EQ(ToVec(y.value()), (Vec{5, 10}));
    EXPECT_EQ(ToVec(x.grad()), (Vec{50, 500}));
  }
  Doubles silently;
  Tape silent(ctx, /*recording=*/false);
  const Var x(FromVec(ctx, {1}, Wide(), {3}));
  const auto segment = [&](Tape& t, const std::vector<Var>& in) { return silently(t, in[0]); };
  EXPECT_EQ(ToVec(autograd::Recompute(silent, {x}, segment, {.keep_attention = true}).value()),
            (Vec{6}));
}

TEST(RecomputeTest, ASecondRunThatDiffersIsAnError) {
  Context ctx = OpContext(1);
  for (const int second : {0, 1, 3}) {
    Doubles doubles;
    int runs = 0;
    Tape tape(ctx);
    const Var x(FromVec(ctx, {2}, Wide(), {1, 2}), true);
    const Var y = autograd::Recompute(tape, {x},
                                      [&](Tape& t, const std::vector<Var>& in) {
                                        Var out = in[0];
                                        const int times = ++runs == 1 ? 2 : second;
                                        for (int i = 0; i < times; ++i) out = doubles(t, out);
                                        return out;
                                      },
                                      {.keep_attention = true});
    y.AddGrad(ctx, FromVec(ctx, {2}, Wide(), {1, 1}));
    EXPECT_THROW(tape.Backward(), Error) << second;
  }
}

}  // namespace
}  // namespace longspan::test
