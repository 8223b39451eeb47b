#include "configs/overrides.h"

#include <gtest/gtest.h>

#include "tests/configs/sample.h"

namespace longspan::test {

using configs::Config;
using configs::LoadText;

Config Set(const std::vector<std::string>& sets) {
  return LoadText(kSample, "c.textproto", sets).config;
}

TEST(ConfigSetTest, EveryKindOfScalar) {
  EXPECT_EQ(Set({"run.steps=7000"}).run().steps(), 7000);
  EXPECT_DOUBLE_EQ(Set({"optimizer.adamw.lr=2.5e-4"}).optimizer().adamw().lr(), 2.5e-4);
  EXPECT_DOUBLE_EQ(Set({"optimizer.clip_norm=3"}).optimizer().clip_norm(), 3);
  EXPECT_EQ(Set({"run.device=CUDA"}).run().device(), configs::Run::CUDA);
  EXPECT_FALSE(Set({"data.document_mask=false"}).data().document_mask());
  EXPECT_EQ(Set({"data.train[0].path=x/y z"}).data().train(0).path(), "x/y z");
  EXPECT_EQ(Set({"data.train[0].path=\"x y\\t\""}).data().train(0).path(), "x y\t");
  EXPECT_EQ(Set({"data.train[0].path='q'"}).data().train(0).path(), "q");
  EXPECT_EQ(Set({"data.train[0].path=a=b"}).data().train(0).path(), "a=b");
  EXPECT_EQ(Set({"data.validation[0].path=v"}).data().train(0).path(), "a");
}

TEST(ConfigSetTest, LaterArgumentsWin) {
  EXPECT_EQ(Set({"run.steps=7000", "run.steps=20"}).run().steps(), 20);
}

TEST(ConfigSetTest, ElementsByNameAndPosition) {
  for (const char* key : {"s2", "1"}) {
    const Config config = Set({Str("model.mixer[", key, "].softmax.s2.stride_blocks=2")});
    EXPECT_EQ(config.model().mixer(1).softmax().s2().stride_blocks(), 2);
    EXPECT_EQ(config.model().mixer(1).softmax().s2().local_blocks(), 2) << "the rest stays";
  }
  const Config renamed = Set({"model.mixer[s2].name=sparse", "model.layers=sparse dense",
                              "model.mixer[sparse].softmax.s2.block_size=32"});
  EXPECT_EQ(renamed.model().mixer(1).softmax().s2().block_size(), 32);
}

TEST(ConfigSetTest, GroupsThatTheFileDoesNotHaveAreAdded) {
  EXPECT_DOUBLE_EQ(Set({"model.rope.theta=5e5"}).model().rope().theta(), 5e5);
}

TEST(ConfigSetTest, SettingInsideAnAlternativeChoosesIt) {
  const Config config = Set({"schedule.wsd.decay_steps=5", "schedule.wsd.warmup_steps=3"});
  EXPECT_EQ(config.schedule().shape_case(), configs::Schedule::kWsd);
  EXPECT_EQ(config.schedule().wsd().decay_steps(), 5);
  EXPECT_EQ(config.schedule().wsd().warmup_steps(), 3);
  // Between single values as well.
  const Config fraction = Set({"schedule.wsd.decay_steps=5", "schedule.wsd.decay_fraction=0.5"});
  EXPECT_EQ(fraction.schedule().wsd().decay_length_case(), configs::WsdSchedule::kDecayFraction);

  const Config window = Set({"model.mixer[s2].softmax.window.window=128"});
  EXPECT_EQ(window.model().mixer(1).softmax().pattern_case(), configs::Attention::kWindow);
}

TEST(ConfigSetTest, AGroupTakesTextInBraces) {
  const Config causal = Set({"model.mixer[s2].softmax.causal={}"});
  EXPECT_TRUE(causal.model().mixer(1).softmax().has_causal());
  const Config window = Set({"model.mixer[s2].softmax.window={window: 64 sinks: 4}"});
  EXPECT_EQ(window.model().mixer(1).softmax().window().sinks(), 4);
  // It replaces what was there.
  const Config adamw = Set({"optimizer.adamw.beta1=0.5", "optimizer.adamw={lr: 1}"});
  EXPECT_DOUBLE_EQ(adamw.optimizer().adamw().beta1(), 0.9);
  const Config mixer = Set({"model.mixer[s2]={name: 's2' softmax { full {} }}"});
  EXPECT_TRUE(mixer.model().mixer(1).softmax().has_full());
  EXPECT_EQ(mixer.model().mixer_size(), 2);
}

TEST(ConfigSetTest, PlacesFollowTheArgument) {
  const std::string s2 = "model.mixer[s2].softmax.s2";
  // The group is replaced, so the line of the old local_blocks no longer says anything.
  EXPECT_EQ(ErrorOf(kSample, {s2 + "={stride_blocks: 1}"}),
            "--set " + s2 + "={stride_blocks: 1}: " + s2 +
                ".local_blocks: is missing (give a whole number)");
  // Leaving an alternative and coming back starts from an empty group.
  const std::string back = s2 + ".stride_blocks=2";
  EXPECT_EQ(ErrorOf(kSample, {"model.mixer[s2].softmax.causal={}", back}),
            "--set " + back + ": " + s2 + ".local_blocks: is missing (give a whole number)");
  // Its neighbours keep their places.
  EXPECT_EQ(ErrorOf(SampleWith("steps: 100", "steps: 0"), {"run.seed=4"}),
            "c.textproto:2: run.steps: 0 is out of range (use a whole number from 1 to "
            "1000000000)");
}

TEST(ConfigSetTest, AnArgumentReplacesThePlacesBelowItsPathOnly) {
  configs::Places places("c");
  int line = 0;
  for (const char* path : {"a", "a.b", "a.b.c", "a.b[0].c", "a.bc", "a.b_c", "a.b2"}) {
    places.SetLine(path, ++line);
  }
  places.SetArgument("a.b", "x");
  const auto where = [&](const char* path) { return places.Describe(places.Find(path)); };
  for (const char* path : {"a.b", "a.b.c", "a.b[0].c", "a.b[0]"}) EXPECT_EQ(where(path), "--set x");
  EXPECT_EQ(where("a"), "c:1");
  EXPECT_EQ(where("a.bc"), "c:5");
  EXPECT_EQ(where("a.b_c"), "c:6");
  EXPECT_EQ(where("a.b2"), "c:7");
  EXPECT_EQ(where("a.other"), "c:1");
  EXPECT_EQ(where("other"), "c");
}

TEST(ConfigSetTest, MistakesAreExplained) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"nonsense", "has no '=' (write path.to.field=value)"},
      {"=3", "'' is not a path of fields (write path.to.field=value)"},
      {"run..steps=3", "'run..steps' is not a path of fields (write path.to.field=value)"},
      {"model.mixer[s2=3", "'model.mixer[s2' is not a path of fields (write path.to.field=value)"},
      {"run.steps=", "run.steps has no value (give a whole number)"},
      {"data.train[0].path=", "data.train[0].path has no value (give a text)"},
      {"run.steps=abc", "run.steps: abc is not a whole number"},
      {"run.steps=1e3", "run.steps: 1e3 is not a whole number"},
      {"run.steps=3 4", "run.steps: 3 4 is not a whole number"},
      {"run.steps=99999999999999999999",
       "run.steps: 99999999999999999999 is out of range (give a whole number)"},
      {"optimizer.adamw.lr=big", "optimizer.adamw.lr: big is not a number"},
      {"run.device=GPU", "run.device: GPU is not one of CPU, CUDA"},
      {"run.deterministic=maybe", "run.deterministic: maybe is not true or false"},
      {"data.train[0].path=\"open",
       "data.train[0].path: \"open does not parse: Unexpected end of string."},
      {"run.stps=3", "run.stps: unknown field (did you mean steps?)"},
      {"optimizer.lr=3", "optimizer.lr: unknown field (did you mean optimizer.adamw.lr?)"},
      {"Run.steps=3", "Run: unknown field (did you mean run?)"},
      {"model.mixer[s2].softmax.causal.window=3",
       "model.mixer[s2].softmax.causal.window: unknown field (did you mean "
       "model.mixer[].softmax.window?)"},
      {"run.steps.more=3", "run.steps is a whole number and has no field more"},
      {"model.rope=5",
       "model.rope: 5 is not a group of fields in braces (or set one of its fields: theta)"},
      {"model.mixer[s2].softmax.causal=true",
       "model.mixer[s2].softmax.causal: true is not a group of fields in braces (give {})"},
      {"model.rope={theta: 5", "model.rope: {theta: 5 does not parse: Expected identifier, got: "},
      {"model.rope={theta: 5} x",
       "model.rope: {theta: 5} x does not parse: something follows the value"},
      {"model.rope={thta: 5}",
       "model.rope: {thta: 5} does not parse: Message type \"longspan.configs.Rope\" has no field "
       "named \"thta\"."},
      {"run[0].steps=1", "run is not a list; leave out [0]"},
      {"data.train.path=x", "data.train is a list; address one element, as in data.train[0]"},
      {"model.mixer.name=x",
       "model.mixer is a list; address one element, as in model.mixer[dense]"},
      {"model.mixer[s3].name=x", "model.mixer has no element s3 (names: dense, s2)"},
      {"model.mixer[2].name=x", "model.mixer has no element 2 (names: dense, s2)"},
      {"data.train[1].path=x", "data.train has no element 1 (positions: 0 to 0)"},
      {"data.train[-1].path=x", "data.train has no element -1 (positions: 0 to 0)"},
      {"data.train[a].path=x", "data.train has no element a (positions: 0 to 0)"},
      {"data.train[].path=x", "data.train has no element  (positions: 0 to 0)"},
  };
  for (const auto& [set, problem] : cases) {
    EXPECT_EQ(ErrorOf(kSample, {set}), Str("--set ", set, ": ", problem));
  }
  EXPECT_EQ(
      ErrorOf(SampleWith("validation { path: \"b\" }", ""),
              {"evaluation.every_steps=0", "data.validation[0].path=x"}),
      "--set data.validation[0].path=x: data.validation has no elements; add one to the file");
}

TEST(ConfigSetTest, AMistakeChangesNothing) {
  Config config = LoadText(kSample, "c.textproto").config;
  const std::string before = config.SerializeAsString();
  configs::Places places("c.textproto");
  EXPECT_TRUE(configs::ApplySet("schedule.wsd.decay_steps=x", config, places));
  EXPECT_TRUE(configs::ApplySet("model.mixer[s2].softmax.window={window: 3", config, places));
  EXPECT_EQ(config.SerializeAsString(), before);
  EXPECT_EQ(places.Describe(places.Find("schedule.wsd")), "c.textproto");
}

}  // namespace longspan::test
