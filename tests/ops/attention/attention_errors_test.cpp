// The implementation table and every refusal of AttentionForward and AttentionBackward.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "ops/attention/attention.h"
#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using ops::AttentionImplementations;
using ops::AttentionProblem;
using ops::BlockList;
using ops::BlockMask;

constexpr int64_t kTokens = 100, kHeads = 4, kKvHeads = 2, kDim = 16;
// Plain storage: elements between tokens, and the second block of the second kv head.
constexpr int64_t kStride = kKvHeads * kDim, kSecond = 64 * kStride + kDim;

// A valid problem; each test spoils one part of it.
struct Problem {
  Context ctx = OpContext();
  std::shared_ptr<const ops::Documents> documents =
      std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, kTokens));
  BlockList all = BlockList::All(*documents);
  std::shared_ptr<const BlockMask> mask =
      BlockMask::Build(ops::AttentionPattern::Causal(), kKvHeads, documents, all, all);
  Tensor q = Zeros({kTokens, kHeads, kDim}), d_out = Zeros({kTokens, kHeads, kDim});
  Tensor dq = Zeros({kTokens, kHeads, kDim}), lse = Zeros({kTokens, kHeads});
  Tensor delta = Zeros({kTokens, kHeads}), dlse;
  ops::KvView kv =
      ops::MakeKvView(Zeros({kTokens, kKvHeads, kDim}), Zeros({kTokens, kKvHeads, kDim}), all);
  ops::KvGradView dkv =
      ops::MakeKvGradView(Zeros({kTokens, kKvHeads, kDim}), Zeros({kTokens, kKvHeads, kDim}), all);
  ops::AttentionOptions options;

  Tensor Zeros(Shape shape, DType dtype = DType::kF32) { return ctx.Zeros(shape, dtype); }
  // Another table for kv or dkv.
  template <class View>
  void Table(View& view, int64_t kv_heads, int64_t token_stride, int64_t first_block,
             const std::vector<int64_t>& offsets) {
    view.table = std::make_shared<ops::KvTable>(kv_heads, token_stride, first_block, offsets);
  }
  void Forward() { ops::AttentionForward(ctx, q, kv, *mask, options); }
  void Backward() {
    ops::AttentionBackward(ctx, d_out, q, kv, lse, delta, *mask, dq, dkv, options, dlse);
  }
};

// Expects InvalidArgument with `text` from a problem changed by `spoil`.
void ExpectRefusal(bool backward, const std::string& text,
                   const std::function<void(Problem&)>& spoil) {
  Problem problem;
  spoil(problem);
  try {
    backward ? problem.Backward() : problem.Forward();
    ADD_FAILURE() << "accepted; expected: " << text;
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(AttentionErrorsTest, ValidProblemRuns) {
  Problem problem;
  problem.Forward();
  problem.Backward();
}

TEST(AttentionErrorsTest, InputsOfBothDirections) {
  for (const bool backward : {false, true}) {
    ExpectRefusal(backward, "q is undefined", [](Problem& p) { p.q = {}; });
    ExpectRefusal(backward, "q is i32",
                  [](Problem& p) { p.q = p.Zeros(p.q.shape(), DType::kI32); });
    ExpectRefusal(backward, "mask.queries() has 100 tokens", [](Problem& p) {
      p.q = p.Zeros({kTokens - 1, kHeads, kDim});
    });
    ExpectRefusal(backward, "kv.head_dim is 16", [](Problem& p) {
      p.q = p.Zeros({kTokens, kHeads, kDim + 8});
    });
    ExpectRefusal(backward, "kv has 3 kv heads",
                  [](Problem& p) { p.Table(p.kv, 3, kStride, 0, {}); });
    ExpectRefusal(backward, "not a multiple of the 2 kv heads", [](Problem& p) {
      p.q = p.Zeros({kTokens, 3, kDim});
    });
    ExpectRefusal(backward, "must have the dtype of q",
                  [](Problem& p) { p.kv.v = p.Zeros(p.kv.v.shape(), DType::kBF16); });
    ExpectRefusal(backward, "kv lacks block 1 of kv head 0", [](Problem& p) {
      p.Table(p.kv, kKvHeads, kStride, 0, {0, -1, kDim, kSecond});
    });
    ExpectRefusal(backward, "kv lacks block 0 of kv head 0", [](Problem& p) {
      p.Table(p.kv, kKvHeads, kStride, 1, {64 * 32, 64 * 32 + 16});
    });
    ExpectRefusal(backward, "but the storage has 3200", [](Problem& p) {
      p.Table(p.kv, kKvHeads, kStride, 0, {0, 64 * kStride, kDim, kSecond + 1});
    });
    ExpectRefusal(backward, "kv has no table", [](Problem& p) { p.kv.table = nullptr; });
    ExpectRefusal(backward, "kv.token_stride is 15", [](Problem& p) {
      p.Table(p.kv, kKvHeads, 15, 0, {0, 64 * kStride, kDim, kSecond});
    });
    ExpectRefusal(backward, "options.scale",
                  [](Problem& p) { p.options.scale = std::numeric_limits<double>::quiet_NaN(); });
    ExpectRefusal(
        backward,
        Str("use one of ", OnCuda() ? "mma_bf16, reference_cuda"
                                    : "amx_bf16, avx512_bf16, avx512, portable, reference"),
        [](Problem& p) { p.options.implementation = "amx"; });
    ExpectRefusal(
        backward,
        OnCuda() ? "implementation reference cannot run this: it runs on a CPU and the "
                   "device is cuda:0; use one of mma_bf16, reference_cuda"
                 : "implementation mma_bf16 cannot run this: it runs on a GPU and the "
                   "device is cpu:0; use one of amx_bf16, avx512_bf16, avx512, portable, reference",
        [](Problem& p) { p.options.implementation = OnCuda() ? "reference" : "mma_bf16"; });
  }
}

// Operands of a Context on a GPU that are in host memory.
TEST(AttentionErrorsTest, TensorsOfAnotherDevice) {
  if (!OnCuda()) return;  // a second device is needed
  Context host;
  const auto away = [&](const Tensor& t) { return host.Zeros(t.shape(), t.dtype()); };
  for (const bool backward : {false, true}) {
    ExpectRefusal(backward, "q is on cpu:0 but the Context is on cuda:0",
                  [&](Problem& p) { p.q = away(p.q); });
    ExpectRefusal(backward, "kv.k is on cpu:0", [&](Problem& p) { p.kv.k = away(p.kv.k); });
    ExpectRefusal(backward, "kv.v is on cpu:0", [&](Problem& p) { p.kv.v = away(p.kv.v); });
  }
  ExpectRefusal(true, "d_out is on cpu:0", [&](Problem& p) { p.d_out = away(p.d_out); });
  ExpectRefusal(true, "lse is on cpu:0", [&](Problem& p) { p.lse = away(p.lse); });
  ExpectRefusal(true, "delta is on cpu:0", [&](Problem& p) { p.delta = away(p.delta); });
  ExpectRefusal(true, "dlse is on cpu:0", [&](Problem& p) { p.dlse = away(p.lse); });
  ExpectRefusal(true, "dq is on cpu:0", [&](Problem& p) { p.dq = away(p.dq); });
  ExpectRefusal(true, "dkv.dk is on cpu:0", [&](Problem& p) { p.dkv.dk = away(p.dkv.dk); });
  ExpectRefusal(true, "dkv.dv is on cpu:0", [&](Problem& p) { p.dkv.dv = away(p.dkv.dv); });

  Problem p;
  const auto expect = [](const std::string& text, const std::function<void()>& call) {
    try {
      call();
      ADD_FAILURE() << "accepted; expected: " << text;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  const Tensor& here = p.d_out;
  expect("AttentionDelta: d_out is on cpu:0",
         [&] { ops::AttentionDelta(p.ctx, away(here), here); });
  expect("AttentionDelta: o is on cpu:0", [&] { ops::AttentionDelta(p.ctx, here, away(here)); });
  for (const std::string name : {"o", "lse", "o2", "lse2"}) {
    const auto at = [&](const char* operand, const Tensor& t) {
      return name == operand ? away(t) : t;
    };
    Tensor o = at("o", here), lse = at("lse", p.lse);
    expect(Str("MergePartial: ", name, " is on cpu:0"),
           [&] { ops::MergePartial(p.ctx, o, lse, at("o2", here), at("lse2", p.lse)); });
  }
}

TEST(AttentionErrorsTest, GpusTakeNeitherF64NorHugeHeads) {
  if (!OnCuda()) return;  // CPUs do
  Problem p;
  const Tensor k = p.Zeros(p.kv.k.shape(), DType::kF64);
  EXPECT_THROW(ops::AttentionForward(p.ctx, p.Zeros(p.q.shape(), DType::kF64),
                                     ops::MakeKvView(k, k, p.all), *p.mask),
               Unsupported);
  const Tensor wide = p.Zeros({kTokens, kKvHeads, 264});
  EXPECT_THROW(ops::AttentionForward(p.ctx, p.Zeros({kTokens, kHeads, 264}),
                                     ops::MakeKvView(wide, wide, p.all), *p.mask),
               Unsupported);
  Tensor o = p.Zeros({2, 1, 4}, DType::kF64), lse = p.Zeros({2, 1}, DType::kF64);
  EXPECT_THROW(ops::MergePartial(p.ctx, o, lse, o, lse), Unsupported);
  EXPECT_THROW(ops::AttentionDelta(p.ctx, o, o), Unsupported);
}

TEST(AttentionErrorsTest, InputsOfBackward) {
  const auto expect = [](const std::string& text, const std::function<void(Problem&)>& spoil) {
    ExpectRefusal(true, text, spoil);
  };
  expect("d_out is f64", [](Problem& p) { p.d_out = p.Zeros(p.q.shape(), DType::kF64); });
  expect("d_out is undefined", [](Problem& p) { p.d_out = {}; });
  expect("lse is f32[100, 3]", [](Problem& p) { p.lse = p.Zeros({kTokens, 3}); });
  expect("delta is f32[99, 4]", [](Problem& p) { p.delta = p.Zeros({99, kHeads}); });
  expect("dlse is bf16", [](Problem& p) { p.dlse = p.Zeros({kTokens, kHeads}, DType::kBF16); });
  expect("dq is bf16", [](Problem& p) { p.dq = p.Zeros(p.q.shape(), DType::kBF16); });
  expect("dkv.dk and dkv.dv must be f32",
         [](Problem& p) { p.dkv.dk = p.Zeros(p.dkv.dk.shape(), DType::kF64); });
  expect("dkv lacks block 1 of kv head 1", [](Problem& p) {
    p.Table(p.dkv, kKvHeads, kStride, 0, {0, 64 * kStride, kDim, -1});
  });
  expect("dkv: block 1", [](Problem& p) {
    p.Table(p.dkv, kKvHeads, kStride, 0, {0, 64 * kStride, kDim, kSecond + 1});
  });
  expect("dkv has 3 kv heads", [](Problem& p) { p.Table(p.dkv, 3, kStride, 0, {}); });
  expect("dkv has no table", [](Problem& p) { p.dkv.table = nullptr; });
}

TEST(AttentionErrorsTest, WhatTheNormalizationExcludes) {
  const auto of_sigmoid = [](const std::function<void(Problem&)>& spoil) {
    return [spoil](Problem& p) {
      p.options.normalization = ops::Normalization::kSigmoid;
      p.lse = p.delta = {};
      spoil(p);
    };
  };
  for (const bool backward : {false, true}) {
    for (const double bias : {0.0, 0.5}) {
      ExpectRefusal(backward,
                    Str("options.bias is ", bias, " but options.normalization is softmax"),
                    [&](Problem& p) { p.options.bias = bias; });
    }
    ExpectRefusal(
        backward, "options.bias is inf; it must be between -1e30 and 1e30",
        of_sigmoid([](Problem& p) { p.options.bias = std::numeric_limits<double>::infinity(); }));
    ExpectRefusal(backward, "options.bias is nan", of_sigmoid([](Problem& p) {
                    p.options.bias = std::numeric_limits<double>::quiet_NaN();
                  }));
    ExpectRefusal(backward,
                  "options.want_block_maxima is true but options.normalization is sigmoid",
                  of_sigmoid([](Problem& p) { p.options.want_block_maxima = true; }));
  }
  ExpectRefusal(true, "lse is f32[100, 4] but options.normalization is sigmoid",
                of_sigmoid([](Problem& p) {
                  p.lse = p.Zeros({kTokens, kHeads});
                }));
  ExpectRefusal(true, "delta is f32[100, 4] but options.normalization is sigmoid",
                of_sigmoid([](Problem& p) {
                  p.delta = p.Zeros({kTokens, kHeads});
                }));
  ExpectRefusal(true, "dlse is f32[100, 4] but options.normalization is sigmoid",
                of_sigmoid([](Problem& p) {
                  p.dlse = p.Zeros({kTokens, kHeads});
                }));
  ExpectRefusal(true, "lse is undefined", [](Problem& p) { p.lse = {}; });
  ExpectRefusal(true, "delta is undefined", [](Problem& p) { p.delta = {}; });
}

TEST(AttentionErrorsTest, ForcedImplementationSaysWhyItCannotRun) {
  if (OnCuda()) {
    ExpectRefusal(false, "implementation reference_cuda cannot run this: head_dim 264 is above 256",
                  [](Problem& p) {
                    p.q = p.Zeros({kTokens, kHeads, 264});
                    p.kv = ops::MakeKvView(p.Zeros({kTokens, kKvHeads, 264}),
                                           p.Zeros({kTokens, kKvHeads, 264}), p.all);
                    p.options.implementation = "reference_cuda";
                  });
    ExpectRefusal(false, "implementation mma_bf16 cannot run this: it takes bf16",
                  [](Problem& p) { p.options.implementation = "mma_bf16"; });
    ExpectRefusal(true,
                  "implementation mma_bf16 cannot run this: q, k, v, d_out or dq has rows that do "
                  "not start at 16 bytes",
                  [](Problem& p) {
                    p.q = p.Zeros(p.q.shape(), DType::kBF16);
                    const Tensor k = p.Zeros({kTokens, kKvHeads, kDim}, DType::kBF16);
                    p.kv = ops::MakeKvView(k, k, p.all);
                    p.dq = FromVecUnaligned(p.ctx, p.q.shape(), DType::kF32,
                                            Vec(static_cast<size_t>(p.q.numel())));
                    p.options.implementation = "mma_bf16";
                  });
    return;
  }
  ExpectRefusal(false, "implementation portable cannot run this: head_dim 264 is above 256",
                [](Problem& p) {
                  p.q = p.Zeros({kTokens, kHeads, 264});
                  p.kv = ops::MakeKvView(p.Zeros({kTokens, kKvHeads, 264}),
                                         p.Zeros({kTokens, kKvHeads, 264}), p.all);
                  p.options.implementation = "portable";
                });
  ExpectRefusal(false, "implementation portable cannot run this: it computes in f32",
                [](Problem& p) {
                  p.q = p.Zeros(p.q.shape(), DType::kF64);
                  p.kv = ops::MakeKvView(p.Zeros(p.kv.k.shape(), DType::kF64),
                                         p.Zeros(p.kv.k.shape(), DType::kF64), p.all);
                  p.options.implementation = "portable";
                });
  ExpectRefusal(false, "implementation avx512 cannot run this: ", [](Problem& p) {
    p.q = p.Zeros({kTokens, kHeads, 12});  // also refused where the processor lacks AVX-512
    p.kv =
        ops::MakeKvView(p.Zeros({kTokens, kKvHeads, 12}), p.Zeros({kTokens, kKvHeads, 12}), p.all);
    p.options.implementation = "avx512";
  });
}

TEST(AttentionErrorsTest, TableIsOrderedAndTheFirstThatAcceptsRuns) {
  const auto& table = AttentionImplementations();
  ASSERT_EQ(table.size(), 7u);
  EXPECT_STREQ(table[0].name, "amx_bf16");
  EXPECT_STREQ(table[1].name, "avx512_bf16");
  EXPECT_STREQ(table[2].name, "avx512");
  EXPECT_STREQ(table[3].name, "portable");
  EXPECT_STREQ(table[4].name, "reference");
  EXPECT_STREQ(table[5].name, "mma_bf16");
  EXPECT_STREQ(table[6].name, "reference_cuda");
  for (const AttentionProblem& problem :
       {AttentionProblem{DType::kF32, 4, 2, 16}, AttentionProblem{DType::kF32, 4, 2, 12},
        AttentionProblem{DType::kBF16, 4, 2, 16}, AttentionProblem{DType::kBF16, 4, 2, 12},
        AttentionProblem{DType::kF64, 4, 2, 16}, AttentionProblem{DType::kBF16, 4, 2, 512}}) {
    if (OnCuda() && (problem.dtype == DType::kF64 || problem.head_dim > 256)) continue;
    EXPECT_TRUE(table[4].rejects(problem).empty());
    std::string first;
    for (const auto& entry : table) {
      if (entry.device == TestDevice().kind && first.empty() && entry.rejects(problem).empty())
        first = entry.name;
    }
    Problem p;
    p.q = p.Zeros({kTokens, problem.heads, problem.head_dim}, problem.dtype);
    const Tensor k = p.Zeros({kTokens, problem.kv_heads, problem.head_dim}, problem.dtype);
    p.kv = ops::MakeKvView(k, k, p.all);
    EXPECT_EQ(ops::AttentionForward(p.ctx, p.q, p.kv, *p.mask).implementation, first);
  }
  EXPECT_FALSE(table[3].rejects({DType::kF64, 4, 2, 16}).empty());
  EXPECT_TRUE(table[3].rejects({DType::kF32, 4, 2, 12}).empty());
  EXPECT_EQ(table[1].rejects({DType::kF32, 4, 2, 16}), "it takes bf16 and the problem is f32");
}

// A NaN in a query must reach its row of the result and the gradients of its row and of the keys
// that it sees, and never look like a row that sees nothing.
void ExpectNanReachesTheResult(DType dtype, ops::Normalization normalization,
                               const std::string& name) {
  constexpr int64_t kToken = 70, kHead = 1, kRow = kToken * kHeads + kHead;
  const bool sigmoid = normalization == ops::Normalization::kSigmoid;
  SCOPED_TRACE(Str(name, " ", ToString(dtype), sigmoid ? " sigmoid" : ""));
  Problem p;
  Vec q(static_cast<size_t>(p.q.numel()));
  q[kRow * kDim] = std::numeric_limits<double>::quiet_NaN();
  p.q = FromVec(p.ctx, p.q.shape(), dtype, q);
  p.kv = ops::MakeKvView(p.Zeros({kTokens, kKvHeads, kDim}, dtype),
                         p.Zeros({kTokens, kKvHeads, kDim}, dtype), p.all);
  p.options.implementation = name;
  p.options.normalization = normalization;
  const auto result = ops::AttentionForward(p.ctx, p.q, p.kv, *p.mask, p.options);
  p.lse = result.lse;
  p.delta = sigmoid ? Tensor() : ops::AttentionDelta(p.ctx, p.d_out, result.o);
  p.Backward();
  const Vec lse = sigmoid ? Vec() : ToVec(p.lse), o = ToVec(result.o), dq = ToVec(p.dq);
  for (int64_t row = 0; row < kTokens * kHeads; ++row) {
    const bool bad = row == kRow;
    if (!sigmoid) {
      EXPECT_EQ(std::isnan(lse[static_cast<size_t>(row)]), bad) << "row " << row;
    }
    EXPECT_EQ(std::isnan(o[static_cast<size_t>(row * kDim + 3)]), bad) << "row " << row;
    EXPECT_EQ(std::isnan(dq[static_cast<size_t>(row * kDim + 3)]), bad) << "row " << row;
  }
  const Vec dk = ToVec(p.dkv.dk), dv = ToVec(p.dkv.dv);
  for (int64_t key = 0; key <= kToken; ++key) {
    for (int64_t head = 0; head < kKvHeads; ++head) {
      const auto at = static_cast<size_t>((key * kKvHeads + head) * kDim);
      EXPECT_EQ(std::isnan(dk[at]), head == 0) << "key " << key << " kv head " << head;
      EXPECT_EQ(std::isnan(dv[at]), head == 0) << "key " << key << " kv head " << head;
    }
  }
}

TEST(AttentionErrorsTest, NanReachesTheResult) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const ops::Normalization normalization : kNormalizations) {
      for (const std::string& name : ImplementationsFor(
               Problem().ctx,
               {.dtype = dtype, .heads = kHeads, .kv_heads = kKvHeads, .head_dim = kDim})) {
        ExpectNanReachesTheResult(dtype, normalization, name);
      }
    }
  }
}

TEST(KvViewTest, TablesNeedEqualHeads) {
  EXPECT_THROW(ops::KvTable(2, kStride, 0, {0, 5, 10}), InvalidArgument);
  EXPECT_THROW(ops::KvTable(0, kStride, 0, {}), InvalidArgument);
}

TEST(KvViewTest, RejectsTensorsThatDoNotMatchTheKeys) {
  Problem p;
  const Tensor k = p.Zeros({kTokens, kKvHeads, kDim});
  EXPECT_THROW(ops::MakeKvView(k, p.Zeros({kTokens, kKvHeads, 8}), p.all), InvalidArgument);
  EXPECT_THROW(ops::MakeKvView(k, p.Zeros(k.shape(), DType::kBF16), p.all), InvalidArgument);
  const Tensor shorter = p.Zeros({kTokens - 1, kKvHeads, kDim});
  EXPECT_THROW(ops::MakeKvView(shorter, shorter, p.all), InvalidArgument);
  EXPECT_THROW(ops::MakeKvGradView(shorter, shorter, p.all), InvalidArgument);
}

TEST(KvViewTest, PlacesBlocksWhereTheCallerSays) {
  Problem p;
  const std::vector<int64_t> rows = {kTokens + 7, 3};  // block 0 behind block 1
  const Tensor storage = p.Zeros({2 * kTokens, kKvHeads, kDim});
  const auto view = ops::MakeKvView(storage, storage, p.all, rows);
  const auto grads = ops::MakeKvGradView(storage, storage, p.all, rows);
  for (int64_t head = 0; head < kKvHeads; ++head) {
    for (int64_t block = 0; block < 2; ++block) {
      const int64_t expected = (rows[static_cast<size_t>(block)] * kKvHeads + head) * kDim;
      EXPECT_EQ(view.Offset(head, block), expected);
      EXPECT_EQ(grads.Offset(head, block), expected);
    }
  }
}

TEST(KvViewTest, RejectsBlocksOutsideTheStorage) {
  Problem p;
  const Tensor k = p.Zeros({kTokens + 5, kKvHeads, kDim});
  const int64_t last = p.all.token_begin[1];
  const auto refused = [&](const Tensor& v, std::vector<int64_t> rows) {
    EXPECT_THROW(ops::MakeKvView(k, v, p.all, rows), InvalidArgument);
    EXPECT_THROW(ops::MakeKvGradView(k, v, p.all, rows), InvalidArgument);
  };
  EXPECT_NO_THROW(ops::MakeKvView(k, k, p.all, std::vector<int64_t>{0, last + 5}));
  refused(k, {0, last + 6});
  refused(k, {-1, last});
  refused(k, {0});
  refused(k.Rows(0, kTokens), {0, last + 1});  // fits k only
  refused(p.Zeros({kTokens + 5, kKvHeads, 8}), {0, last});
}

}  // namespace
}  // namespace longspan::test
