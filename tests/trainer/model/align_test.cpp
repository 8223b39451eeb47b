// Rows whose documents start on block borders (data.align_documents).
#include <gtest/gtest.h>

#include "data/sampler.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/batch.h"
#include "trainer/identity.h"

namespace longspan::test {
namespace {

using namespace trainer;

constexpr int32_t kVocab = 19;

struct Totals {
  double loss = 0;
  int64_t valid = 0;
  std::vector<Vec> gradients;  // of each bucket
};

// Loss and gradients of the rows, summed.
Totals Compute(const ModelOptions& model, const std::vector<data::Row>& rows) {
  Context ctx(ContextOptions{.threads = 2, .poison_buffers = true});
  parallel::SelfCommunicator self;
  ParameterStore store(ctx, model, /*training=*/true);
  store.Initialize(3);
  store.ZeroGrads();
  Totals totals;
  for (const data::Row& row : rows) {
    const auto length = static_cast<int64_t>(row.tokens.size());
    data::MicroBatch batch{.rows = 1, .row_length = length};
    batch.tokens = row.tokens;
    batch.labels = row.labels;
    batch.positions = row.positions;
    batch.doc_ends = {row.doc_ends};
    BatchBuilder builder(model,
                         parallel::Placement(parallel::PlacementKind::kContiguous, 1, length, 1),
                         parallel::StrategyKind::kRing, 0);
    autograd::Tape tape(ctx);
    const auto loss = DecoderForward(tape, self, model, store, builder.Build(batch)->local, {});
    const ops::LossSums sums = ops::ReadLossSums(loss.sums);
    totals.loss += sums.loss;
    totals.valid += sums.valid;
    tape.Backward();
  }
  for (Bucket& b : store.buckets()) totals.gradients.push_back(ToVec(b.grad));
  return totals;
}

class AlignTest : public ::testing::Test {
 protected:
  AlignTest() {
    data::IndexWriter writer(prefix_, data::TokenDTypeForVocabulary(kVocab));
    const Philox rng(1, StreamOf("align test"));
    uint64_t n = 0;
    for (const int64_t length : {1, 63, 64, 65, 130, 200}) {  // 12 blocks
      std::vector<int32_t>& ids = documents_.emplace_back();
      for (int64_t i = 0; i < length; ++i) {
        ids.push_back(static_cast<int32_t>(rng.Below(n++, kVocab)));
      }
      writer.Append(ids);
      writer.EndDocument();
    }
    writer.Commit();
  }

  data::Row OneRow(int64_t alignment, int64_t length) const {
    data::RowSamplerOptions o;
    o.sources = {{prefix_, 1}};
    o.context_length = length;
    o.shuffle = false;
    o.alignment = alignment;
    return data::RowSampler(o).Get(0);
  }
  std::vector<data::Row> EachAlone() const {
    std::vector<data::Row> rows;
    for (const auto& ids : documents_) {
      data::Row row{.tokens = ids, .labels = ids};
      row.labels.erase(row.labels.begin());
      row.labels.push_back(data::kNoLabel);
      for (size_t i = 0; i < ids.size(); ++i) row.positions.push_back(static_cast<int64_t>(i));
      row.doc_ends = {static_cast<int64_t>(ids.size())};
      rows.push_back(row);
    }
    return rows;
  }

  TemporaryFolder folder_;
  const std::string prefix_ = (folder_.path() / "set").string();
  std::vector<std::vector<int32_t>> documents_;
};

ModelOptions Model(const ops::AttentionPattern& pattern) {
  ModelOptions m = SmallModel(DType::kF64);
  m.mixers = {{"one", pattern}};
  m.layers = {0, 0};
  return m;
}

// Also where attention looks ahead, into what would be padding, and where it counts blocks of the
// row's grid.
TEST_F(AlignTest, EveryDocumentIsComputedAsIfItWereAlone) {
  const data::Row row = OneRow(ops::kMaskBlock, 12 * ops::kMaskBlock);
  const std::vector<data::Row> alone = EachAlone();
  for (const ops::AttentionPattern& pattern :
       {ops::AttentionPattern::Full(), ops::AttentionPattern::Window(70, 3),
        ops::AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 2})}) {
    SCOPED_TRACE(pattern.ToString());
    const Totals expected = Compute(Model(pattern), alone), got = Compute(Model(pattern), {row});
    EXPECT_EQ(got.valid, 1 + 63 + 64 + 65 + 130 + 200 - 6);
    EXPECT_EQ(got.valid, expected.valid);
    EXPECT_NEAR(got.loss / expected.loss, 1, 1e-12);
    for (size_t b = 0; b < got.gradients.size(); ++b) {
      EXPECT_LT(RelMax(got.gradients[b], expected.gradients[b]), 1e-11) << "bucket " << b;
    }
  }
  // The test can tell: without borders S2 counts from other blocks.
  const ModelOptions s2 = Model(ops::AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 2}));
  const Totals packed = Compute(s2, {OneRow(1, 522)}), expected = Compute(s2, alone);
  EXPECT_GT(std::abs(packed.loss / static_cast<double>(packed.valid) -
                     expected.loss / static_cast<double>(expected.valid)),
            1e-6);
}

TEST_F(AlignTest, WhatStandsInThePaddingChangesNothing) {
  const data::Row row = OneRow(ops::kMaskBlock, 12 * ops::kMaskBlock);
  data::Row other = row;
  int64_t begin = 0, padding = 0;
  for (const int64_t end : row.doc_ends) {
    if (begin % ops::kMaskBlock != 0) {  // documents start on borders, padding never does
      for (int64_t i = begin; i < end; ++i) {
        EXPECT_EQ(row.tokens[static_cast<size_t>(i)], 0);
        EXPECT_EQ(row.labels[static_cast<size_t>(i)], data::kNoLabel);
        other.tokens[static_cast<size_t>(i)] = 7;
        ++padding;
      }
    }
    begin = end;
  }
  EXPECT_EQ(padding, 63 + 1 + 0 + 63 + 62 + 56);
  const ModelOptions model = Model(ops::AttentionPattern::Full());
  const Totals a = Compute(model, {row}), b = Compute(model, {other});
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.gradients, b.gradients);
}

TEST_F(AlignTest, ARunIsResumedOnlyAsItWasAligned) {
  TrainOptions plain, aligned;
  plain.model = aligned.model = Model(ops::AttentionPattern::Causal());
  aligned.align_documents = true;
  const auto of = [](const TrainOptions& o) { return IdentityOf(o, "corpus"); };
  EXPECT_EQ(of(plain).count("data.align_documents"), 0u) << "older checkpoints do not know it";
  EXPECT_EQ(of(aligned).at("data.align_documents"), "1");
}

}  // namespace
}  // namespace longspan::test
