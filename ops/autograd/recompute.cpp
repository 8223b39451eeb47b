#include "ops/autograd/recompute.h"

#include <algorithm>
#include <memory>

#include "ops/autograd/kept.h"
#include "ops/elementwise/elementwise.h"

namespace longspan::autograd {
namespace {

// Calls body(begin, end) for every tile.
template <class Body>
void ForTiles(int64_t total, int64_t rows, Body body) {
  const int64_t tile = TileRows(total, rows);
  for (int64_t begin = 0; begin < total; begin += tile) body(begin, std::min(total, begin + tile));
}

Tensor RunTiles(Context& ctx, const Tensor& x, int64_t rows, const RowSegment& segment) {
  Tensor y;
  ForTiles(x.dim(0), rows, [&](int64_t begin, int64_t end) {
    Tape silent(ctx, /*recording=*/false);
    const Tensor part = segment(silent, Var(x.Rows(begin, end))).value();
    LONGSPAN_CHECK(part.rank() >= 1 && part.dim(0) == end - begin)
        << "RecomputeRows: the segment made " << part.Describe() << " of " << end - begin
        << " rows";
    if (!y.defined()) {
      Shape shape = part.shape();
      shape.set(0, x.dim(0));
      y = ctx.Empty(shape, part.dtype());
    }
    Tensor place = y.Rows(begin, end);
    ops::CastInto(ctx, part, place);
  });
  return y;
}

}  // namespace

int64_t TileRows(int64_t total, int64_t rows) {
  const int64_t tiles = (total + rows - 1) / rows, even = (total + tiles - 1) / tiles;
  return std::min(rows, (even + 63) / 64 * 64);
}

Var Recompute(Tape& tape, const std::vector<Var>& inputs, const Segment& segment,
              const RecomputeOptions& options) {
  const auto kept =
      tape.recording() ? std::make_shared<KeptResults>(options.keep_attention) : nullptr;
  Tape silent(tape.context(), /*recording=*/false, kept.get());
  const Var first_run = segment(silent, inputs);
  if (!tape.recording()) return first_run;

  Var output(first_run.value(), /*requires_grad=*/true);
  tape.Record(
      [&ctx = tape.context(), inputs, segment, output, kept] {
        Tape inner(ctx, /*recording=*/true, kept.get());
        std::vector<Var> fresh;
        for (const Var& input : inputs) fresh.emplace_back(input.value(), input.requires_grad());
        const Var again = segment(inner, fresh);
        LONGSPAN_CHECK(kept->empty())
            << "the second run of a recomputed segment differs from the first";
        if (output.grad().defined()) again.AddGrad(ctx, output.grad());
        inner.Backward();
        for (size_t i = 0; i < inputs.size(); ++i) {
          if (fresh[i].grad().defined()) inputs[i].AddGrad(ctx, fresh[i].grad());
        }
      });
  return output;
}

Var RecomputeRows(Tape& tape, const Var& x, int64_t rows, bool trained, const RowSegment& segment) {
  Context& ctx = tape.context();
  LONGSPAN_CHECK(rows >= 1 && x.value().rank() >= 1 && x.value().dim(0) >= 1)
      << "RecomputeRows: tiles of " << rows << " rows of " << x.value().Describe();
  const Tensor value =
      MakeOnce(tape, KeptKind::kRows, [&] { return RunTiles(ctx, x.value(), rows, segment); });
  Var y(value, tape.recording() && (trained || x.requires_grad()));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, rows, segment, y] {
    if (!y.grad().defined()) return;
    const Tensor dx =
        x.requires_grad() ? ctx.Empty(x.value().shape(), x.value().dtype()) : Tensor();
    ForTiles(x.value().dim(0), rows, [&](int64_t begin, int64_t end) {
      Tape inner(ctx);
      const Var part(x.value().Rows(begin, end), x.requires_grad());
      segment(inner, part).AddGrad(ctx, y.grad().Rows(begin, end));
      inner.Backward();
      if (!dx.defined()) return;
      Tensor place = dx.Rows(begin, end);
      if (part.grad().defined()) {
        ops::CastInto(ctx, part.grad(), place);
      } else {
        ctx.SetZero(place);
      }
    });
    if (dx.defined()) x.AddGrad(ctx, dx);
  });
  return y;
}

}  // namespace longspan::autograd
