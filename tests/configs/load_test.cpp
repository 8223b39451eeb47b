#include "configs/load.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "configs/defaults.h"
#include "configs/fields.h"
#include "tests/configs/sample.h"

namespace longspan::test {

using configs::LoadedConfig;
using configs::LoadText;

TEST(ConfigLoadTest, SampleLoadsWithStatedAndDefaultValues) {
  const LoadedConfig loaded = LoadText(kSample, "c.textproto");
  const configs::Config& config = loaded.config;
  EXPECT_EQ(config.run().steps(), 100);
  EXPECT_EQ(config.run().precision(), configs::F32);
  EXPECT_EQ(config.model().mixer(1).softmax().s2().stride_blocks(), 4);
  EXPECT_EQ(config.data().train(0).path(), "a");
  EXPECT_DOUBLE_EQ(config.optimizer().adamw().lr(), 1e-3);

  EXPECT_EQ(config.run().seed(), 1);
  EXPECT_EQ(config.run().micro_batch_rows(), 1);
  EXPECT_EQ(config.run().device(), configs::Run::CPU);
  EXPECT_EQ(config.run().threads(), 0);
  EXPECT_TRUE(config.run().deterministic());
  EXPECT_EQ(config.run().on_nonfinite(), configs::Run::STOP);
  EXPECT_EQ(config.run().max_skipped_steps(), 10);
  EXPECT_EQ(config.run().log_every_steps(), 1);
  EXPECT_EQ(config.run().recompute(), configs::Run::NONE);
  EXPECT_EQ(config.model().mlp(), configs::Model::SWIGLU);
  EXPECT_DOUBLE_EQ(config.model().norm_eps(), 1e-5);
  EXPECT_FALSE(config.model().tie_embeddings());
  EXPECT_DOUBLE_EQ(config.model().init_std(), 0.02);
  EXPECT_DOUBLE_EQ(config.model().rope().theta(), 10000);
  EXPECT_DOUBLE_EQ(config.model().z_loss(), 0);
  EXPECT_DOUBLE_EQ(config.data().train(0).weight(), 1);
  EXPECT_TRUE(config.data().document_mask());
  EXPECT_EQ(config.data().prefetch_micro_batches(), 2);
  EXPECT_EQ(config.parallel().placement(), configs::Parallel::ZIGZAG);
  EXPECT_EQ(config.parallel().strategy(), configs::RING);
  EXPECT_DOUBLE_EQ(config.optimizer().adamw().beta1(), 0.9);
  EXPECT_DOUBLE_EQ(config.optimizer().adamw().beta2(), 0.95);
  EXPECT_DOUBLE_EQ(config.optimizer().adamw().eps(), 1e-8);
  EXPECT_DOUBLE_EQ(config.optimizer().adamw().weight_decay(), 0.1);
  EXPECT_DOUBLE_EQ(config.optimizer().clip_norm(), 1);
  EXPECT_DOUBLE_EQ(config.schedule().cosine().final_fraction(), 0.1);
  EXPECT_EQ(config.checkpoint().keep_last(), 3);
  EXPECT_EQ(config.checkpoint().keep_every(), 0);
  EXPECT_EQ(config.evaluation().rows(), 0);
}

// A default that is only returned by the accessor would be missing from the saved file and would
// change with a later version of the schema.
TEST(ConfigLoadTest, DefaultsAreWrittenIntoTheConfig) {
  const LoadedConfig loaded = LoadText(kSample, "c.textproto");
  EXPECT_TRUE(loaded.config.run().has_seed());
  EXPECT_TRUE(loaded.config.run().has_device());
  EXPECT_TRUE(loaded.config.model().has_rope());
  EXPECT_TRUE(loaded.config.model().rope().has_theta());
  EXPECT_TRUE(loaded.config.data().train(0).has_weight());
  EXPECT_TRUE(loaded.config.model().mixer(1).softmax().s2().has_block_size());
  EXPECT_FALSE(loaded.config.schedule().has_wsd());  // an alternative that was not chosen stays out
}

TEST(ConfigLoadTest, DerivedDefaults) {
  configs::Config config = LoadText(kSample, "c.textproto").config;
  EXPECT_EQ(config.model().head_dim(), 8);
  EXPECT_EQ(config.model().residual_dtype(), configs::F32);
  EXPECT_EQ(config.model().mixer(1).softmax().s2().head_step(), 1);

  const std::string s2 = "model.mixer[s2].softmax.s2.";
  config = LoadText(kSample, "c",
                    {"run.precision=BF16", "model.head_dim=16", s2 + "stride_blocks=9",
                     s2 + "allow_incomplete_coverage=true", "schedule.wsd.warmup_steps=10"})
               .config;
  EXPECT_EQ(config.model().head_dim(), 16);
  EXPECT_EQ(config.model().residual_dtype(), configs::BF16);
  EXPECT_EQ(config.model().mixer(1).softmax().s2().head_step(), 2);  // 9 / 4 kv heads
  EXPECT_TRUE(config.schedule().wsd().has_decay_fraction());
  EXPECT_EQ(configs::DecaySteps(config.schedule().wsd(), 100), 20);
  EXPECT_EQ(configs::DecaySteps(config.schedule().wsd(), 1), 1);

  config = LoadText(kSample, "c", {s2 + "homogeneous=true"}).config;
  EXPECT_FALSE(config.model().mixer(1).softmax().s2().has_head_step());
}

TEST(ConfigLoadTest, LayerListIsTiled) {
  configs::Config config = LoadText(kSample, "c", {"model.num_layers=5"}).config;
  EXPECT_EQ(configs::LayerMixers(config.model()), (std::vector<int>{0, 1, 0, 1, 0}));
  config.mutable_model()->set_layers("dense nothing");
  EXPECT_THROW(configs::LayerMixers(config.model()), ConfigError);
}

TEST(ConfigLoadTest, ResolvedTextLoadsToTheSameConfig) {
  const std::string s2 = "model.mixer[s2].softmax.s2.";
  for (const std::vector<std::string>& sets : std::vector<std::vector<std::string>>{
           {},
           {"schedule.wsd.decay_steps=7", "run.precision=F64", "optimizer.adamw.lr=0.1"},
           {"schedule.wsd.warmup_steps=7", "run.precision=BF16", "model.residual_dtype=F32"},
           {s2 + "homogeneous=true", "data.train[0].path=with \"quotes\" and \xc3\xa9"},
           {s2 + "dense_heads=1", s2 + "stride_blocks=64",
            "optimizer.adamw.lr=0.30000000000000004"},
           {"model.mixer[s2].softmax.full={}", "data.train[0].weight=1e-300"},
           {"model.mixer[s2].sigmoid.causal={}", "run.context_length=2048"},
           {"model.mixer[s2].sigmoid.s2.local_blocks=1",
            "model.mixer[s2].sigmoid.s2.stride_blocks=4",
            "model.mixer[s2].sigmoid.bias=-0.30000000000000004"}}) {
    const LoadedConfig first = LoadText(kSample, "c", sets);
    const LoadedConfig again = LoadText(first.resolved_text(), "resolved");
    EXPECT_EQ(again.config.SerializeAsString(), first.config.SerializeAsString());
    EXPECT_EQ(again.resolved_text(), first.resolved_text());
    EXPECT_TRUE(configs::Validate(first.config).empty());
  }
}

TEST(ConfigLoadTest, WhereNamesLineOrArgumentOrSurroundings) {
  const LoadedConfig loaded = LoadText(
      kSample, "dir/c.textproto",
      {"run.steps=50", "model.mixer[dense].softmax.window.window=32", "model.rope.theta=5e5"});
  EXPECT_EQ(loaded.Where("run.context_length"), "dir/c.textproto:3");
  EXPECT_EQ(loaded.Where("model.mixer[s2].softmax.s2.stride_blocks"), "dir/c.textproto:20");
  EXPECT_EQ(loaded.Where("model.mixer[1].softmax.s2.stride_blocks"), "dir/c.textproto:20");
  EXPECT_EQ(loaded.Where("data.validation[0].path"), "dir/c.textproto:28");
  EXPECT_EQ(loaded.Where("run.steps"), "--set run.steps=50");
  EXPECT_EQ(loaded.Where("run.seed"), "dir/c.textproto:1");  // a default: where its group begins
  EXPECT_EQ(loaded.Where("model.mixer[s2].softmax.s2.block_size"), "dir/c.textproto:18");
  EXPECT_EQ(loaded.Where("model.mixer[dense].softmax.window.sinks"),
            "--set model.mixer[dense].softmax.window.window=32");
  EXPECT_EQ(loaded.Where("model.rope"), "--set model.rope.theta=5e5");
  EXPECT_EQ(loaded.Where("model.mixer[dense].name"), "dir/c.textproto:14");
  EXPECT_EQ(loaded.Where("data.train[0]"), "dir/c.textproto:27");
  EXPECT_EQ(loaded.Where("data.train"), "dir/c.textproto:26");  // a list has no place of its own
  EXPECT_EQ(LoadText(SampleWith("parallel { dp: 2 cp: 2 }", ""), "c").Where("parallel.cp"), "c");
}

// Everything that protobuf refuses, with the place of the offending word.
TEST(ConfigLoadTest, TextThatDoesNotParseReportsItsFirstPlace) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"run {\n  steps: abc\n}", "c.textproto:2:10: run.steps: abc is not a whole number"},
      {"run { steps: 1.5 }", "c.textproto:1:14: run.steps: 1.5 is not a whole number"},
      {"run { steps: \"1\" }", "c.textproto:1:14: run.steps: \"1\" is not a whole number"},
      {"run { steps: 99999999999999999999 }",
       "c.textproto:1:14: run.steps: 99999999999999999999 is out of range (give a whole number)"},
      {"optimizer { adamw {\n\n lr: fast } }",
       "c.textproto:3:6: optimizer.adamw.lr: fast is not a number"},
      {"run { device: GPU }", "c.textproto:1:15: run.device: GPU is not one of CPU, CUDA"},
      {"run { deterministic: maybe }",
       "c.textproto:1:22: run.deterministic: maybe is not true or false"},
      {"data { train: [ { path: \"a\" },\n { path: 5 } ] }",
       "c.textproto:2:10: data.train[1].path: 5 is not a text"},
      {"data { train { path: \"a\" }\n train { path: 5 } }",
       "c.textproto:2:16: data.train[1].path: 5 is not a text"},
      {"run: 5", "c.textproto:1:6: run: 5 is not a group of fields in braces"},
      {"run {\n steps: 1\n steps: 2 }",
       "c.textproto:3:2: run.steps: given twice, first on line 2 (remove one of them)"},
      {"run { steps: 1 }\nrun { seed: 2 }",
       "c.textproto:2:1: run: given twice, first on line 1 (remove one of them)"},
      {"model { mixer { softmax { causal {}\n s2 {} } } }",
       "c.textproto:2:2: model.mixer[0].softmax.s2: more than one choice is given (keep one of " +
           configs::MemberNames(*configs::Attention::descriptor()->FindOneofByName("pattern")) +
           ")"},
      {"run { steps: }", "c.textproto:1:14: run.steps: has no value (give a whole number)"},
      {"run { steps 4 }", "c.textproto:1:13: Expected \":\", found \"4\""},
      {"run {\n steps: 4\n",
       "c.textproto:3:1: the text ends too early (a closing brace or a value is missing)"},
      {"run { } }", "c.textproto:1:9: Expected identifier, got: }"},
      {"run { steps: 4 $ }", "c.textproto:1:16: Expected identifier, got: $"},
      {"run { steps: 4 \x01 }", "c.textproto:1:16: Invalid control characters encountered in text"},
      {"data { train { path: \"a\n\" } }",
       "c.textproto:1:24: String literals cannot cross line boundaries"},
  };
  for (const auto& [text, error] : cases) EXPECT_EQ(ErrorOf(text), error) << text;
}

TEST(ConfigLoadTest, AParseErrorIsReportedAlone) {
  // An unknown field before a wrong type: only the error that stops the parser is certain.
  EXPECT_EQ(ErrorOf("rum { steps: 1 }\nrun { steps: x }"),
            "c.textproto:2:14: run.steps: x is not a whole number");
}

TEST(ConfigLoadTest, UnknownFieldsAreAllReportedWithAdvice) {
  std::string text = kSample;
  text += "rum { steps: 1 deeper { x: [1, 2] } }\n";                     // line 36
  text += "[some.extension]: 3\n";                                       // line 37
  text.replace(text.find("  hidden_size"), 0, "  num_kv_head: 3 \n");    // line 9, others move
  text.replace(text.find("local_blocks"), 0, "local: 3 sinks\n : 7\n");  // lines 20, 21
  text.replace(text.find("train {"), 0,
               "training_data: [{ a: 1 }] train: [{ path: \"x\" }, {\n"
               " pth: \"y\" path: \"z\"}]");  // lines 30, 31
  EXPECT_EQ(ErrorOf(text),
            "c.textproto:9: model.num_kv_head: unknown field (did you mean num_kv_heads?)\n"
            "c.textproto:20: model.mixer[s2].softmax.s2.local: unknown field (did you mean "
            "local_blocks?)\n"
            "c.textproto:20: model.mixer[s2].softmax.s2.sinks: unknown field (did you mean "
            "model.mixer[].softmax.window.sinks?)\n"
            "c.textproto:30: data.training_data: unknown field (known fields: train, validation, "
            "document_mask, prefetch_micro_batches, align_documents, packing)\n"
            "c.textproto:31: data.train[1].pth: unknown field (did you mean path?)\n"
            "c.textproto:39: rum: unknown field (did you mean run?)\n"
            "c.textproto:40: [some.extension]: unknown field (known fields: run, model, data, "
            "parallel, optimizer, schedule, checkpoint, evaluation, objective)");
}

TEST(ConfigLoadTest, ProblemsOfAllKindsComeInFileOrderThenArguments) {
  std::string text = SampleWith("num_kv_heads: 4", "num_kv_heads: 3 nonsense: 1");
  text.replace(text.find("steps: 100"), 10, "");
  EXPECT_EQ(ErrorOf(text, {"optimizer.adamw.lr=0", "run.stps=4"}),
            "c.textproto:1: run.steps: is missing (give a whole number)\n"
            "c.textproto:12: model.nonsense: unknown field (known fields: vocab_size, hidden_size, "
            "num_layers, num_heads, num_kv_heads, head_dim, ffn_hidden_size, mlp, norm_eps, "
            "tie_embeddings, residual_dtype, init_std, embedding_init_std, mixer, layers, rope, "
            "z_loss)\n"
            "c.textproto:12: model.num_kv_heads: 3 does not divide num_heads 8 (use one of 1, 2, "
            "4, 8)\n"
            "c.textproto:20: model.mixer[s2].softmax.s2.stride_blocks: the 3 kv heads together see "
            "only 3 of every 4 far blocks, with head_step 1 (use stride_blocks of at most 3 with "
            "head_step 1, or a dense head, or allow_incomplete_coverage: true)\n"
            "--set run.stps=4: run.stps: unknown field (did you mean steps?)\n"
            "--set optimizer.adamw.lr=0: optimizer.adamw.lr: 0 is out of range (use a number above "
            "0 and at most 1000)");
}

TEST(ConfigLoadTest, AnEmptyTextNamesEverythingThatIsRequired) {
  EXPECT_EQ(ErrorOf(""),
            "c.textproto: run.steps: is missing (give a whole number)\n"
            "c.textproto: run.context_length: is missing (give a whole number)\n"
            "c.textproto: run.global_batch_tokens: is missing (give a whole number)\n"
            "c.textproto: model.vocab_size: is missing (give a whole number)\n"
            "c.textproto: model.hidden_size: is missing (give a whole number)\n"
            "c.textproto: model.num_layers: is missing (give a whole number)\n"
            "c.textproto: model.num_heads: is missing (give a whole number)\n"
            "c.textproto: model.num_kv_heads: is missing (give a whole number)\n"
            "c.textproto: model.ffn_hidden_size: is missing (give a whole number)\n"
            "c.textproto: model.mixer: is missing (give at least one)\n"
            "c.textproto: model.layers: is missing (give a text)\n"
            "c.textproto: data.train: is missing (give at least one)\n"
            "c.textproto: optimizer: no kind is chosen (give one of adamw)\n"
            "c.textproto: schedule: no shape is chosen (give one of cosine, wsd, constant)");
}

TEST(ConfigLoadTest, FilesThatCannotBeReadAreNamed) {
  const auto error_of = [](const std::string& path) -> std::string {
    try {
      configs::Load(path);
      return "";
    } catch (const ConfigError& error) {
      return error.what();
    }
  };
  EXPECT_EQ(error_of("/no/such.textproto"),
            "cannot read the configuration /no/such.textproto: No such file or directory (give the "
            "path of a .textproto file)");
  const std::string directory = std::filesystem::temp_directory_path().string();
  EXPECT_EQ(error_of(directory), "cannot read the configuration " + directory +
                                     ": Is a directory (give the path of a .textproto file)");
  EXPECT_EQ(error_of("/dev/null"), [] {
    std::string text = ErrorOf("");
    for (size_t at; (at = text.find("c.textproto")) != std::string::npos;)
      text.replace(at, 11, "/dev/null");
    return text;
  }());
}

TEST(ConfigLoadTest, ThrowProblemsAddsPlacesToTheCallersProblems) {
  const LoadedConfig loaded = LoadText(kSample, "c.textproto", {"parallel.cp=2"});
  try {
    configs::ThrowProblems(loaded, {{"parallel.cp", "needs 4 ranks"},
                                    {"model.mixer[s2].softmax.s2", "is not built"},
                                    {"run.threads", "exceeds the cores"},
                                    {"", "nothing to do"}});
    FAIL() << "did not throw";
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(),
                 "c.textproto: nothing to do\n"
                 "c.textproto:1: run.threads: exceeds the cores\n"
                 "c.textproto:18: model.mixer[s2].softmax.s2: is not built\n"
                 "--set parallel.cp=2: parallel.cp: needs 4 ranks");
  }
}

TEST(ConfigLoadTest, DeepNestingIsRefused) {
  std::string text;
  for (int i = 0; i < 20000; ++i) text += "a {";
  EXPECT_NE(ErrorOf(text).find("Message is too deep"), std::string::npos) << ErrorOf(text);
  EXPECT_NE(ErrorOf(kSample, {"run={" + text + "}"}), "");
}

}  // namespace longspan::test
