// Sigmoid mixers: their bias, and what they do not go with.
#include <gtest/gtest.h>

#include <cmath>

#include "configs/mixer.h"
#include "tests/configs/sample.h"

namespace longspan::test {
namespace {

const std::string kSigmoid = "model.mixer[s2].sigmoid";
const std::string kCausal = kSigmoid + ".causal={}";

configs::Mixer Loaded(const std::vector<std::string>& sets) {
  return configs::LoadText(kSample, "c.textproto", sets).config.model().mixer(1);
}
void ExpectRefused(const std::vector<std::string>& sets, const std::string& problem) {
  EXPECT_EQ(ErrorOf(kSample, sets), Str("--set ", sets.back(), ": ", problem));
}

TEST(ConfigNormalizationTest, EitherKindHasEveryStaticPattern) {
  const configs::Mixer sigmoid = Loaded({kCausal});
  EXPECT_TRUE(sigmoid.has_sigmoid());
  EXPECT_FALSE(sigmoid.has_softmax());
  EXPECT_TRUE(configs::AttentionOf(sigmoid).has_causal());
  EXPECT_STREQ(configs::NormalizationOf(sigmoid), "sigmoid");
  EXPECT_EQ(configs::PatternOf(sigmoid), "causal");
  const configs::Mixer softmax = Loaded({kCausal, "model.mixer[s2].softmax.window.window=64"});
  EXPECT_STREQ(configs::NormalizationOf(softmax), "softmax");
  EXPECT_EQ(configs::PatternOf(softmax), "window");
  EXPECT_FALSE(configs::AttentionOf(softmax).has_bias());

  // The rules of patterns hold, under the name that was written.
  ExpectRefused({kSigmoid + ".power={local_blocks: 2 block_size: 48}"},
                kSigmoid + ".power.block_size: 48 is not a power of two (use 32 or 64)");
  ExpectRefused({kSigmoid + ".s2={local_blocks: 2 stride_blocks: 4 dense_heads: 5}"},
                kSigmoid + ".s2.dense_heads: 5 exceeds model.num_kv_heads 4 (use at most that)");
  EXPECT_EQ(configs::AttentionOf(Loaded({kSigmoid + ".s2={local_blocks: 2 stride_blocks: 4}"}))
                .s2()
                .head_step(),
            1);
}

TEST(ConfigNormalizationTest, BiasIsOfTheContextUnlessGiven) {
  EXPECT_DOUBLE_EQ(Loaded({kCausal}).sigmoid().bias(), -std::log(1024.0));
  EXPECT_DOUBLE_EQ(Loaded({kCausal, "run.context_length=2048"}).sigmoid().bias(),
                   -std::log(2048.0));
  EXPECT_EQ(Loaded({kCausal, kSigmoid + ".bias=0"}).sigmoid().bias(), 0);
  ExpectRefused({kCausal, kSigmoid + ".bias=-101"},
                kSigmoid + ".bias: -101 is out of range (use a number from -100 to 100)");
}

// What a checkpoint carries is the resolved text: another length must not change the model in it.
TEST(ConfigNormalizationTest, BiasOfTheResolvedFormStays) {
  const auto first = configs::LoadText(kSample, "c.textproto", {kCausal});
  const auto longer =
      configs::LoadText(first.resolved_text(), "resolved", {"run.context_length=2048"});
  EXPECT_EQ(longer.config.run().context_length(), 2048);
  EXPECT_EQ(longer.config.model().mixer(1).sigmoid().bias(), -std::log(1024.0));
}

TEST(ConfigNormalizationTest, SoftmaxHasNoBias) {
  const std::string effect =
      ": has no effect on softmax, which does not change when all scores move alike (leave it out, "
      "or use sigmoid)";
  ExpectRefused({"model.mixer[s2].softmax.bias=-3"}, "model.mixer[s2].softmax.bias" + effect);
  EXPECT_EQ(ErrorOf(SampleWith("softmax { causal {} }", "softmax { bias: 0 causal {} }")),
            "c.textproto:14: model.mixer[dense].softmax.bias" + effect);
}

TEST(ConfigNormalizationTest, GatesAndRoutingAreForSoftmax) {
  const auto refused = [](const std::string& pattern, const std::vector<std::string>& more = {}) {
    std::vector<std::string> sets = more;
    sets.push_back(Str(kSigmoid, ".", pattern, "={", pattern == "seer" ? "top_k: 4" : "", "}"));
    ExpectRefused(sets, Str(kSigmoid, ".", pattern, ": is built for softmax only (use softmax { ",
                            pattern, " { ... } }, or another pattern)"));
  };
  // One mistake, one message: nothing about ranks, or about gates without their objective.
  refused("moba");
  refused("duo");
  refused("duo", {"objective.duo_gates={}"});
  refused("seer");
  refused("seer", {"objective.seer_gates={}"});
}

TEST(ConfigNormalizationTest, KindsAreNotMixed) {
  const std::string both =
      ErrorOf(SampleWith("softmax { causal {} }", "softmax { causal {} } sigmoid { causal {} }"));
  EXPECT_NE(both.find("model.mixer[0].sigmoid: more than one choice is given"), std::string::npos)
      << both;
  // A field of a kind chooses it, and starts anew.
  EXPECT_NE(ErrorOf(kSample, {kSigmoid + ".bias=-3"}).find(kSigmoid + ": no pattern is chosen"),
            std::string::npos);
}

}  // namespace
}  // namespace longspan::test
