#include "ops/activation/gelu.h"
#include "ops/activation/swiglu.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/elementwise.h"
#include "ops/embedding/embedding.h"
#include "ops/norm/rms_norm.h"
#include "ops/rope/rope.h"
#include "tests/ops/elementwise/row.h"
#include "tests/ops/op_test.h"

// Outputs from just below to above the size from which on they are streamed. They must have the
// bits that the op gives for a few rows at a time, which streams nothing.
namespace longspan::test {
namespace {

constexpr double kEps = 1e-2;

// What the two tables write: call(table, output) for outputs that begin anywhere in a vector.
template <class T, class To, class Call>
void ExpectSameBits(const RowKernelSet& set, int64_t n, int64_t shift, const char* what,
                    Call call) {
  Row<To> plain(n, shift), streamed(n, shift);
  call(TableOf<T>(set), plain.data());
  call(TableOf<T>(set, true), streamed.data());
  const std::string where =
      Str(set.name, " ", ToString(kTypeOf<T>), " ", what, " n ", n, " shift ", shift);
  EXPECT_EQ(streamed.bits(), plain.bits()) << where;
  EXPECT_TRUE(streamed.GuardsHold()) << where;
}

template <class T>
void CheckStreaming(const RowKernelSet& set, int64_t n, int64_t shift) {
  using Other = typename RowKernels<T>::Other;
  const RowKernels<T>& cached = TableOf<T>(set);
  Row<T> a(Normal(2 * n, 1)), b(Normal(2 * n, 2)), c(Normal(2 * n, 3));
  Row<Other> other(Normal(n, 2));
  Row<float> w(Normal(n, 4)), rstd(Vec{0.7, 1.3}), dw(Normal(n, 5));
  const auto check = [&](int64_t count, const char* what, auto call) {
    ExpectSameBits<T, T>(set, count, shift, what, call);
  };
  check(n, "add", [&](auto& k, T* out) { k.add(n, a.data(), b.data(), out); });
  check(n, "add_other", [&](auto& k, T* out) { k.add_other(n, a.data(), other.data(), out); });
  ExpectSameBits<T, Other>(set, n, shift, "to_other",
                           [&](auto& k, Other* out) { k.to_other(n, a.data(), out); });
  check(n, "gelu", [&](auto& k, T* out) { k.gelu(n, a.data(), out); });
  check(n, "gelu_backward", [&](auto& k, T* out) { k.gelu_backward(n, b.data(), a.data(), out); });
  check(n, "swiglu", [&](auto& k, T* out) { k.swiglu(n, a.data(), b.data(), out); });
  // The second output beside the first, and where no vector of both is aligned.
  for (const int64_t second : {shift, shift + 1}) {
    Row<T> plain(n, second), streamed(n, second);
    check(n, "swiglu_backward", [&](auto& k, T* out) {
      k.swiglu_backward(n, c.data(), a.data(), b.data(), out,
                        (&k == &cached ? plain : streamed).data());
    });
    EXPECT_EQ(streamed.bits(), plain.bits()) << set.name << " n " << n << " shift " << second;
    EXPECT_TRUE(streamed.GuardsHold()) << set.name << " n " << n << " shift " << second;
  }
  Row<float> plain_rstd(2), streamed_rstd(2);
  check(2 * n, "rms_norm", [&](auto& k, T* out) {
    k.rms_norm(2, n, a.data(), w.data(), 1e-2, out,
               (&k == &cached ? plain_rstd : streamed_rstd).data());
  });
  EXPECT_EQ(streamed_rstd.bits(), plain_rstd.bits()) << set.name << " n " << n;
  // Sums that are added to what is there: a head or a tail that is gone through twice shows.
  Row<float> plain_dw(dw.values(), shift), streamed_dw(dw.values(), shift);
  check(2 * n, "rms_norm_backward", [&](auto& k, T* out) {
    k.rms_norm_backward(2, n, b.data(), a.data(), w.data(), rstd.data(), out,
                        (&k == &cached ? plain_dw : streamed_dw).data());
  });
  EXPECT_EQ(streamed_dw.bits(), plain_dw.bits()) << set.name << " n " << n << " shift " << shift;
  EXPECT_TRUE(streamed_dw.GuardsHold()) << set.name << " n " << n << " shift " << shift;
  check(2 * n, "rope",
        [&](auto& k, T* out) { k.rope(1, 1, n, a.data(), w.data(), dw.data(), -1.0f, out); });
  const int32_t ids[] = {1, 0, 1};
  check(3 * n, "gather", [&](auto& k, T* out) { k.gather(3, n, ids, a.data(), out); });
  ExpectSameBits<T, Other>(set, 3 * n, shift, "gather_other",
                           [&](auto& k, Other* out) { k.gather_other(3, n, ids, a.data(), out); });
}

TEST(StreamingTest, StreamingWritesTheSameBits) {
  for (const RowKernelSet* set : Sets()) {
    for (const int64_t n : {1, 3, 15, 16, 31, 32, 33, 64, 95, 128, 200}) {
      for (const int64_t shift : {0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32}) {
        CheckStreaming<float>(*set, n, shift);
        CheckStreaming<BF16>(*set, n, shift);
      }
    }
#if defined(__x86_64__)
    EXPECT_NE(set->f32.add, set->f32_streaming.add) << set->name;
    EXPECT_NE(set->bf16.add, set->bf16_streaming.add) << set->name;
#endif
  }
}

TEST(StreamingTest, LargeOutputsAreStreamed) {
  using ops::internal::kStreamingBytes;
  using ops::internal::Rows;
  const RowKernelSet& set = *Sets().front();
  EXPECT_EQ(&Rows<float>(), &set.f32);
  EXPECT_EQ(&Rows<float>(kStreamingBytes), &set.f32);
  EXPECT_EQ(&Rows<float>(kStreamingBytes + 1), &set.f32_streaming);
  EXPECT_EQ(&Rows<BF16>(kStreamingBytes), &set.bf16);
  EXPECT_EQ(&Rows<BF16>(kStreamingBytes + 1), &set.bf16_streaming);
}

// Signalling NaNs, too: a lookup is a copy.
TEST(StreamingTest, GatherCopiesEveryPattern) {
  std::vector<BF16> table(0x10000), out(0x10000);
  for (uint32_t i = 0; i < 0x10000; ++i) table[i].bits = static_cast<uint16_t>(i);
  const int32_t ids[] = {1, 0};
  for (const RowKernelSet* set : Sets()) {
    for (const bool streaming : {false, true}) {
      TableOf<BF16>(*set, streaming).gather(2, 0x8000, ids, table.data(), out.data());
      for (uint32_t i = 0; i < 0x10000; ++i) {
        ASSERT_EQ(out[i].bits, i ^ 0x8000) << NameOf(*set, streaming);
      }
    }
  }
}

// Values between -4 and 4, made quickly, because the tensors are large.
Tensor Values(Context& ctx, Shape shape, DType dtype, uint64_t seed) {
  Tensor t = ctx.Empty(shape, dtype);
  uint64_t state = seed;
  const auto next = [&state] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-29f;
  };
  for (int64_t i = 0; i < t.numel(); ++i) {
    if (dtype == DType::kBF16) {
      t.data<BF16>()[i] = BF16(next());
    } else {
      t.data<float>()[i] = next();
    }
  }
  return t;
}

// The results of an op for rows [begin, end) of its operands, in which each row stands for itself.
using Op = std::function<std::vector<Tensor>(Context&, int64_t begin, int64_t end)>;

void ExpectBitsOfPieces(const std::string& what, int64_t rows, const Op& op) {
  Context ctx = OpContext(3);
  const std::vector<Tensor> whole = op(ctx, 0, rows);
  ASSERT_GE(rows, 16);
  for (int64_t piece = 0; piece < 16; ++piece) {
    const int64_t begin = rows * piece / 16, end = rows * (piece + 1) / 16;
    const std::vector<Tensor> part = op(ctx, begin, end);
    for (size_t i = 0; i < whole.size(); ++i) {
      ASSERT_LE(part[i].bytes() * part.size(), ops::internal::kStreamingBytes) << what;
      ASSERT_TRUE(SameBits(whole[i].Rows(begin, end), part[i]))
          << what << ": result " << i << ", rows " << begin << " to " << end;
    }
  }
}

struct Size {
  int64_t rows, width;
  DType dtype;
};
std::string NameOf(const Size& s) { return Str(ToString(s.dtype), " ", s.rows, " x ", s.width); }

// At the limit, one element above it, and rows of a width that no vector divides.
std::vector<Size> Sizes() {
  std::vector<Size> sizes;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const auto limit = static_cast<int64_t>(ops::internal::kStreamingBytes / SizeOf(dtype));
    for (const auto& [rows, width] : {std::pair{limit / 256, int64_t{256}},
                                      {limit / 256 + 1, 256},
                                      {limit + 1, 1},
                                      {limit / 333 + 40, 333}}) {
      sizes.push_back({rows, width, dtype});
    }
  }
  return sizes;
}

TEST(StreamingTest, Elementwise) {
  for (const Size& s : Sizes()) {
    Context ctx = OpContext();
    const DType other = s.dtype == DType::kF32 ? DType::kBF16 : DType::kF32;
    const Tensor a = Values(ctx, {s.rows, s.width}, s.dtype, 1),
                 b = Values(ctx, {s.rows, s.width}, s.dtype, 2),
                 c = Values(ctx, {s.rows, s.width}, s.dtype, 3),
                 mixed = Values(ctx, {s.rows, s.width}, other, 4);
    ExpectBitsOfPieces("elementwise " + NameOf(s), s.rows,
                       [&](Context& on, int64_t i, int64_t j) -> std::vector<Tensor> {
                         const Tensor x = a.Rows(i, j), y = b.Rows(i, j);
                         Tensor in_place = ops::Cast(on, x, s.dtype);
                         ops::AddInto(on, in_place, y);
                         return {ops::Add(on, x, y),
                                 ops::Add(on, x, mixed.Rows(i, j)),
                                 ops::Cast(on, x, other),
                                 ops::GeluForward(on, x),
                                 in_place,
                                 ops::GeluBackward(on, y, x)};
                       });
    ExpectBitsOfPieces("swiglu " + NameOf(s), s.rows,
                       [&](Context& on, int64_t i, int64_t j) -> std::vector<Tensor> {
                         const Tensor x = a.Rows(i, j), y = b.Rows(i, j);
                         const auto d = ops::SwiGluBackward(on, c.Rows(i, j), x, y);
                         return {ops::SwiGluForward(on, x, y), d.dgate, d.dup};
                       });
  }
}

TEST(StreamingTest, RowsOfNormAndRope) {
  for (const Size& s : Sizes()) {
    if (s.width == 1) continue;
    Context ctx = OpContext();
    const Tensor x = Values(ctx, {s.rows, s.width}, s.dtype, 1),
                 dy = Values(ctx, {s.rows, s.width}, s.dtype, 2),
                 w = Values(ctx, {s.width}, DType::kF32, 3);
    ExpectBitsOfPieces(
        "norm " + NameOf(s), s.rows, [&](Context& on, int64_t i, int64_t j) -> std::vector<Tensor> {
          const auto [y, rstd] = ops::RmsNormForward(on, x.Rows(i, j), w, kEps);
          Tensor none;
          return {y, rstd, ops::RmsNormBackward(on, dy.Rows(i, j), x.Rows(i, j), w, rstd, none)};
        });
  }
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t dim : {64, 66, 128}) {
      Context ctx = OpContext();
      const auto limit = static_cast<int64_t>(ops::internal::kStreamingBytes / SizeOf(dtype));
      const int64_t heads = 3, tokens = limit / (heads * dim) + 1;
      const Tensor x = Values(ctx, {tokens, heads, dim}, dtype, 1);
      Tensor positions = ctx.Empty({tokens}, DType::kI64);
      for (int64_t i = 0; i < tokens; ++i) positions.data<int64_t>()[i] = i;
      const ops::RopeTable table =
          ops::MakeRopeTable(ctx, positions, {.theta = 1e4, .head_dim = dim}, dtype);
      ExpectBitsOfPieces(Str("rope ", ToString(dtype), " ", dim), tokens,
                         [&](Context& on, int64_t i, int64_t j) -> std::vector<Tensor> {
                           const ops::RopeTable turns{table.cos.Rows(i, j), table.sin.Rows(i, j)};
                           return {ops::RopeForward(on, x.Rows(i, j), turns),
                                   ops::RopeBackward(on, x.Rows(i, j), turns)};
                         });
    }
  }
}

TEST(StreamingTest, Lookup) {
  for (const Size& s : Sizes()) {
    Context ctx = OpContext();
    constexpr int64_t kVocab = 97;
    const Tensor table = Values(ctx, {kVocab, s.width}, s.dtype, 1);
    Tensor ids = ctx.Empty({s.rows}, DType::kI32);
    for (int64_t t = 0; t < s.rows; ++t) {
      ids.data<int32_t>()[t] = static_cast<int32_t>(t * t % kVocab);
    }
    const DType other = s.dtype == DType::kF32 ? DType::kBF16 : DType::kF32;
    ExpectBitsOfPieces("lookup " + NameOf(s), s.rows,
                       [&](Context& on, int64_t i, int64_t j) -> std::vector<Tensor> {
                         return {ops::EmbeddingForward(on, ids.Rows(i, j), table, s.dtype),
                                 ops::EmbeddingForward(on, ids.Rows(i, j), table, other)};
                       });
  }
}

}  // namespace
}  // namespace longspan::test
