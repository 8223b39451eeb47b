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

std::string WithSeer(const std::string& seer, const std::string& objective) {
  std::string text = WithDuo("", "parallel { dp: 2 cp: 1 } " + objective);
  const size_t other = text.find("parallel { dp: 2 cp: 2 }");
  text.erase(other, std::string("parallel { dp: 2 cp: 2 }").size());
  const size_t at = text.find("duo {  }");
  return text.replace(at, 8, "seer { " + seer + " }");
}

TEST(ConfigObjectiveTest, GatesThatChooseBlocks) {
  const auto loaded =
      configs::LoadText(WithSeer("top_k: 16", "objective { seer_gates {} }"), "c.textproto");
  EXPECT_TRUE(loaded.config.objective().seer_gates().drop_first_quarter());
  EXPECT_EQ(loaded.config.model().mixer(1).softmax().seer().block_size(), 64);
  EXPECT_EQ(loaded.config.model().mixer(1).softmax().seer().gate_dim(), 64);
  EXPECT_EQ(ErrorOf(WithSeer("threshold: 0.002", "")), "");  // taught gates are used as they are

  const auto expect = [](const std::string& text, const std::string& part,
                         const std::vector<std::string>& sets = {}) {
    const std::string error = ErrorOf(text, sets);
    EXPECT_NE(error.find(part), std::string::npos) << error;
  };
  const std::string path = "model.mixer[s2].softmax.seer";
  expect(WithSeer("", ""), path + ": no selection is chosen (give one of top_k, threshold)");
  expect(WithSeer("top_k: 1", ""), path + ".top_k: 1 is out of range");
  expect(WithSeer("threshold: 1.5", ""), path + ".threshold: 1.5 is out of range");
  expect(WithSeer("top_k: 4 block_size: 100", ""),
         path + ".block_size: 100 is not a multiple of 64 (use 64 or 128)");
  expect(WithSeer("top_k: 4 gate_dim: 7", ""), path + ".gate_dim: 7 is odd");
  expect(WithSeer("top_k: 4", ""), "parallel.cp: 2 does not go with " + path, {"parallel.cp=2"});
  expect(WithSeer("top_k: 4", ""), "run.device: CUDA has no kernels for " + path,
         {"run.device=CUDA"});
  expect(WithSeer("top_k: 4", "objective { duo_gates {} }"),
         path + ": has gates that objective.duo_gates does not train");
  expect(WithDuo("", "objective { seer_gates {} }"), "objective.seer_gates: has no gates to train");
  expect(WithSeer("top_k: 4", "objective { seer_gates {} }"),
         "model.z_loss: has no effect with objective.seer_gates", {"model.z_loss=0.001"});
  expect(WithSeer("top_k: 4", "objective { seer_gates {} }"),
         "objective.seer_gates: counts rows of blocks, and the mixers have blocks of 64 and of 128",
         {"model.mixer[dense].softmax.seer.top_k=4",
          "model.mixer[dense].softmax.seer.block_size=128"});
}

}  // namespace
}  // namespace longspan::test
