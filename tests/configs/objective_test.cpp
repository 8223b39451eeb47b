// The objective and the mixers whose gates it trains.
#include <gtest/gtest.h>

#include "tests/configs/sample.h"

namespace longspan::test {
namespace {

// kSample with gates in the layers that were S2.
std::string WithDuo(const std::string& duo, const std::string& objective) {
  std::string text = kSample;
  const size_t begin = text.find("      s2 {"), end = text.find("      }\n", begin);
  text.replace(begin, end + 8 - begin, "      duo { " + duo + " }\n");
  return text + objective;
}

TEST(ConfigObjectiveTest, NextTokenUnlessGiven) {
  const auto loaded = configs::LoadText(kSample, "c.textproto");
  EXPECT_TRUE(loaded.config.objective().has_next_token());
  EXPECT_NE(loaded.resolved_text().find("next_token"), std::string::npos);
}

TEST(ConfigObjectiveTest, GatesAndTheirObjectiveGoTogether) {
  EXPECT_EQ(ErrorOf(WithDuo("", "objective { duo_gates {} }")), "");
  const auto loaded =
      configs::LoadText(WithDuo("sinks: 64", "objective { duo_gates {} }"), "c.textproto");
  EXPECT_EQ(loaded.config.objective().duo_gates().regularization(), 0.05);
  EXPECT_EQ(loaded.config.model().mixer(1).softmax().duo().sinks(), 64);
  EXPECT_EQ(loaded.config.model().mixer(1).softmax().duo().recent(), 256);

  const std::string alone = ErrorOf(WithDuo("", ""));
  EXPECT_NE(
      alone.find("model.mixer[s2].softmax.duo: has gates that only objective.duo_gates trains"),
      std::string::npos)
      << alone;
  const std::string none = ErrorOf(std::string(kSample) + "objective { duo_gates {} }");
  EXPECT_NE(none.find("objective.duo_gates: has no gates to train"), std::string::npos) << none;
  EXPECT_NE(ErrorOf(std::string(kSample) + "objective { duo_gates {} next_token {} }"), "");
}

// Branches that see the same would close every gate.
TEST(ConfigObjectiveTest, StreamsMustSeeLessThanTheRow) {
  const std::string objective = "objective { duo_gates {} }";
  const std::string same = ErrorOf(WithDuo("sinks: 24 recent: 1000", objective));
  EXPECT_NE(same.find("model.mixer[s2].softmax.duo.recent: 1000 and 24 sinks are all of "
                      "run.context_length 1024"),
            std::string::npos)
      << same;
  EXPECT_EQ(ErrorOf(WithDuo("sinks: 24 recent: 999", objective)), "");
}

TEST(ConfigObjectiveTest, TheLossOfLogitsHasNoPlace) {
  const std::string text = WithDuo("", "objective { duo_gates {} }");
  const std::string error = ErrorOf(text, {"model.z_loss=0.001"});
  EXPECT_NE(error.find("model.z_loss: has no effect with objective.duo_gates"), std::string::npos)
      << error;
}

}  // namespace
}  // namespace longspan::test
