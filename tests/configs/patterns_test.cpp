// Checks and defaults of the static attention patterns, and the counts of model.layers.
#include <gtest/gtest.h>

#include "configs/defaults.h"
#include "tests/configs/sample.h"

namespace longspan::test {
namespace {

const std::string kSoftmax = "model.mixer[s2].softmax.";

void ExpectRefused(const std::vector<std::string>& sets, const std::string& problem) {
  EXPECT_EQ(ErrorOf(kSample, sets), Str("--set ", sets.back(), ": ", problem));
}
void ExpectAccepted(const std::vector<std::string>& sets) { EXPECT_EQ(ErrorOf(kSample, sets), ""); }

configs::Attention Loaded(const std::string& set) {
  return configs::LoadText(kSample, "c.textproto", {set}).config.model().mixer(1).softmax();
}

TEST(ConfigPatternsTest, BlockSizesArePowersOfTwo) {
  const std::pair<std::string, std::string> patterns[] = {
      {"power", "local_blocks: 2"},
      {"dilated", "neighbours: 2"},
      {"block_causal", ""},
      {"random_blocks", "density: 0.5"},
  };
  for (const auto& [name, needed] : patterns) {
    ExpectRefused({Str(kSoftmax, name, "={", needed, " block_size: 48}")},
                  Str(kSoftmax, name, ".block_size: 48 is not a power of two (use 32 or 64)"));
    ExpectAccepted({Str(kSoftmax, name, "={", needed, " block_size: 256}")});
  }
}

TEST(ConfigPatternsTest, TilesAreNoSmallerThanTheSmallest) {
  const std::string random = kSoftmax + "random_blocks";
  ExpectRefused({random + "={density: 0.1 mean_blocks: 3 min_blocks: 4}"},
                random + ".min_blocks: 4 exceeds mean_blocks 3 (use at most that)");
  ExpectAccepted({random + "={density: 0.1 mean_blocks: 4 min_blocks: 4}"});
}

TEST(ConfigPatternsTest, SpansHaveOneEntryForEachKvHead) {
  const std::string spans = kSoftmax + "spans";
  ExpectAccepted({spans + "={head {} head {window: 9} head {window: 5 sinks: 3} head {}}"});
  ExpectRefused({spans + "={head {} head {window: 9}}"},
                spans +
                    ".head: has 2 entries for model.num_kv_heads 4 (give one for each kv head: "
                    "what only some of its query heads left out would still be fetched for "
                    "the others)");
  ExpectRefused({spans + "={head {} head {sinks: 9} head {} head {}}"},
                spans +
                    ".head[1].sinks: 9 has no effect without a window, where all earlier "
                    "tokens are seen (give a window or leave it out)");
}

TEST(ConfigPatternsTest, ListsOfNumbers) {
  const std::string segment = kSoftmax + "shared_question.segment";
  const auto loaded = Loaded(kSoftmax + "shared_question={segment: [100, 50] segment: 7}");
  const auto& lengths = loaded.shared_question().segment();
  EXPECT_EQ(std::vector<int64_t>(lengths.begin(), lengths.end()),
            (std::vector<int64_t>{100, 50, 7}));
  ExpectRefused({kSoftmax + "causal_blockwise={}"},
                kSoftmax + "causal_blockwise.segment: is missing (give at least one)");
  ExpectRefused({kSoftmax + "shared_question={segment: [5, 0]}"},
                segment + "[1]: 0 is out of range (use a whole number from 1 to 1073741824)");
  // One element of a list that is there is replaced, not added to.
  const auto changed =
      configs::LoadText(kSample, "c.textproto",
                        {kSoftmax + "shared_question={segment: [5, 6]}", segment + "[1]=9"})
          .config.model()
          .mixer(1)
          .softmax()
          .shared_question();
  EXPECT_EQ(changed.segment_size(), 2);
  EXPECT_EQ(changed.segment(0), 5);
  EXPECT_EQ(changed.segment(1), 9);
  ExpectRefused({kSoftmax + "shared_question={segment: [5, 6]}", segment + "[2]=9"},
                segment + " has no element 2 (positions: 0 to 1)");
}

TEST(ConfigPatternsTest, ResolvedFormLoadsAgain) {
  for (const char* pattern :
       {"window={window: 5 bidirectional: true}", "global_window={window: 5 global_tokens: 2}",
        "power={local_blocks: 2}", "dilated={neighbours: 2}", "prefix_lm={prefix: 3}",
        "shared_question={segment: [3, 4]}", "causal_blockwise={segment: 3}", "block_causal={}",
        "random_blocks={density: 0.1}", "spans={head {} head {window: 9} head {} head {}}"}) {
    const auto loaded = configs::LoadText(kSample, "c.textproto", {kSoftmax + pattern});
    const auto again = configs::LoadText(loaded.resolved_text(), "resolved");
    EXPECT_EQ(again.config.SerializeAsString(), loaded.config.SerializeAsString()) << pattern;
  }
  // A head without a window keeps none.
  EXPECT_FALSE(
      Loaded(kSoftmax + "spans={head {} head {} head {} head {}}").spans().head(0).has_window());
}

TEST(ConfigPatternsTest, LayersWithCounts) {
  const auto mixers = [](const std::string& layers) {
    const auto loaded =
        configs::LoadText(kSample, "c.textproto", {"model.num_layers=7", "model.layers=" + layers});
    return configs::LayerMixers(loaded.config.model());
  };
  EXPECT_EQ(mixers("dense*2 s2*3 dense*2"), (std::vector<int>{0, 0, 1, 1, 1, 0, 0}));
  EXPECT_EQ(mixers("dense s2*2"), (std::vector<int>{0, 1, 1, 0, 1, 1, 0}));
  EXPECT_EQ(mixers("s2*1 dense*6"), (std::vector<int>{1, 0, 0, 0, 0, 0, 0}));
  for (const char* bad : {"*", "*0", "*-1", "*2x", "*65537", "*2*2", "* 2"}) {
    const std::string error = ErrorOf(kSample, {Str("model.layers=dense s2", bad)});
    EXPECT_NE(
        error.find("model.layers: 's2*' is not followed by a count (use a whole number from 1 "
                   "to 65536, as in s2*12)"),
        std::string::npos)
        << bad << ": " << error;
  }
  ExpectRefused({"model.layers=dense*2 s2*3"},
                "model.layers: has 5 names for num_layers 4 (shorten it)");
  ExpectRefused({"model.layers=dense s3*3"},
                "model.layers: 's3' is no mixer (use the names of mixers: dense, s2)");
}

}  // namespace
}  // namespace longspan::test
