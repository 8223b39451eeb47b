#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <vector>

#include "ops/embedding/embedding.h"
#include "ops/embedding/embedding_cuda.h"

namespace longspan::ops {
namespace {

Tensor ToTensor(Context& ctx, Shape shape, const std::vector<int32_t>& values) {
  Tensor t = ctx.Empty(shape, DType::kI32);
  std::copy(values.begin(), values.end(), t.data<int32_t>());
  return t;
}

}  // namespace

namespace internal {

// By one digit of the id after the other, from the lowest.
std::vector<int32_t> TokensById(const Tensor& ids, int64_t vocab) {
  LONGSPAN_CHECK(ids.dim(0) <= std::numeric_limits<int32_t>::max()) << ids.dim(0) << " tokens";
  constexpr int kBits = 11;
  const int32_t* id = ids.data<int32_t>();
  std::vector<int32_t> sorted(static_cast<size_t>(ids.dim(0))), next(sorted.size());
  std::iota(sorted.begin(), sorted.end(), 0);
  for (int shift = 0; shift < 31 && (vocab - 1) >> shift > 0; shift += kBits) {
    const auto digit = [&](int32_t t) {
      return static_cast<size_t>((id[t] >> shift) & ((1 << kBits) - 1));
    };
    std::array<int32_t, (size_t{1} << kBits) + 1> first{};
    for (const int32_t t : sorted) ++first[digit(t) + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    for (const int32_t t : sorted) next[static_cast<size_t>(first[digit(t)]++)] = t;
    sorted.swap(next);
  }
  return sorted;
}

}  // namespace internal

EmbeddingOrder OrderTokens(Context& ctx, const Tensor& ids, int64_t vocab) {
  LONGSPAN_CHECK(ids.rank() == 1 && ids.dtype() == DType::kI32 &&
                 ids.device().kind == DeviceKind::kCpu && ctx.device().kind == DeviceKind::kCpu)
      << "OrderTokens: ids are " << ids.Describe() << " on " << ToString(ids.device())
      << ", not i32[T] in host memory";
  internal::CheckIdRange(ids, vocab);
  const int32_t* id = ids.data<int32_t>();
  const auto tokens = static_cast<int32_t>(ids.dim(0));
  const std::vector<int32_t> sorted = internal::TokensById(ids, vocab);

  constexpr auto kPiece = static_cast<int32_t>(EmbeddingOrder::kPieceTokens);
  std::vector<int32_t> pieces, joins;
  int32_t slots = 0;
  for (int32_t begin = 0; begin < tokens;) {
    const int32_t row = id[sorted[static_cast<size_t>(begin)]];
    int32_t end = begin + 1;
    while (end < tokens && id[sorted[static_cast<size_t>(end)]] == row) ++end;
    const bool whole = end - begin <= kPiece;
    const int32_t first_slot = slots;
    for (int32_t at = begin; at < end; at += kPiece) {
      pieces.insert(pieces.end(), {at, std::min(at + kPiece, end), whole ? row : -1 - slots});
      if (!whole) ++slots;
    }
    if (!whole) joins.insert(joins.end(), {row, first_slot, slots - first_slot});
    begin = end;
  }
  const auto rows = [](const std::vector<int32_t>& triples) {
    return Shape{static_cast<int64_t>(triples.size()) / 3, 3};
  };
  return {ToTensor(ctx, {tokens}, sorted), ToTensor(ctx, rows(pieces), pieces),
          ToTensor(ctx, rows(joins), joins), slots, vocab};
}

}  // namespace longspan::ops
