#include "configs/validate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <sstream>

#include "configs/fields.h"
#include "tests/configs/sample.h"

namespace longspan::test {

using configs::Config;
using configs::Rule;
using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

// Expects that kSample with the arguments has one problem, in the place of the last argument.
void ExpectProblem(const std::vector<std::string>& sets, const std::string& problem) {
  EXPECT_EQ(ErrorOf(kSample, sets), Str("--set ", sets.back(), ": ", problem));
}

void ExpectFine(const std::vector<std::string>& sets) { EXPECT_EQ(ErrorOf(kSample, sets), ""); }

// A scalar field in kSample: its path, and how --set gives it a value: set_begin, value, set_end. A
// list that kSample does not have is set with the group around it.
struct Place {
  std::string path, set_begin, set_end;
};

// Visits every scalar field of the schema.
void ForEachScalar(const Descriptor& message, const Place& place,
                   const std::function<void(const FieldDescriptor&, const Place&)>& visit) {
  for (int i = 0; i < message.field_count(); ++i) {
    const FieldDescriptor& field = *message.field(i);
    Place below = place;
    below.path = configs::JoinPath(place.path, field.name());
    const bool in_sample = field.name() == "mixer" || place.path == "data";
    if (field.is_repeated()) below.path += field.name() == "mixer" ? "[s2]" : "[0]";
    if (place.set_end.empty() && (!field.is_repeated() || in_sample)) {
      below.set_begin = below.path + "=";
    } else if (field.message_type() == nullptr) {
      below.set_begin = place.set_begin + (place.set_end.empty() ? "{" : "") + field.name() + ":";
      below.set_end = (place.set_end.empty() ? "}" : "") + place.set_end;
    } else {
      below.set_begin = place.set_begin + "{" + field.name() + "{";
      below.set_end = "}}" + place.set_end;
    }
    if (field.message_type() == nullptr) {
      visit(field, below);
    } else {
      ForEachScalar(*field.message_type(), below, visit);
    }
  }
}

std::string Print(double value) {
  std::ostringstream out;
  out.precision(17);
  out << value;
  return out.str();
}

TEST(ConfigValidateTest, EveryBoundOfTheSchemaIsEnforced) {
  int bounds = 0, numbers = 0;
  ForEachScalar(*Config::descriptor(), {}, [&](const FieldDescriptor& field, const Place& place) {
    const std::string& path = place.path;
    const bool whole = field.cpp_type() == FieldDescriptor::CPPTYPE_INT64;
    if (!whole && field.cpp_type() != FieldDescriptor::CPPTYPE_DOUBLE) return;
    ++numbers;
    const Rule& rule = field.options().GetExtension(configs::rule);
    EXPECT_TRUE(rule.has_min() || rule.has_above()) << path << " has no lower bound";
    const auto out_of_range = [&](double value) {
      const std::string set = place.set_begin + Print(value) + place.set_end;
      const std::string expected = Str("--set ", set, ": ", path, ": ");
      const std::string error = ErrorOf(kSample, {set});
      const size_t at = error.find(expected);
      return at != std::string::npos &&
             error.substr(at, error.find('\n', at) - at).find("is out of range (use a ") !=
                 std::string::npos;
    };
    const double step = whole ? 1 : 1e-9;
    const auto check = [&](bool present, double inside, double outside) {
      if (!present) return;
      ++bounds;
      EXPECT_FALSE(out_of_range(inside)) << path << " = " << inside;
      EXPECT_TRUE(out_of_range(outside)) << path << " = " << outside;
    };
    check(rule.has_min(), rule.min(), rule.min() - step);
    check(rule.has_above(), rule.above() + step, rule.above());
    check(rule.has_max(), rule.max(), rule.max() + (whole ? 1 : rule.max() * 1e-9));
    check(rule.has_below(), rule.below() - step, rule.below());
    if (!whole) {
      EXPECT_TRUE(out_of_range(std::nan(""))) << path;
      EXPECT_TRUE(out_of_range(INFINITY)) << path;
    }
  });
  EXPECT_GE(numbers, 40);  // the walk has reached the leaves
  EXPECT_GE(bounds, 70);
}

TEST(ConfigValidateTest, RequiredTextsAreNotEmpty) {
  ExpectProblem({"data.train[0].path=\"\""}, "data.train[0].path: is empty (give a text)");
  ExpectProblem({"model.layers=\"\""}, "model.layers: is empty (give a text)");
}

TEST(ConfigValidateTest, OneofsNeedAChoice) {
  EXPECT_EQ(
      ErrorOf(SampleWith("softmax { causal {} }", "softmax {}")),
      "c.textproto:14: model.mixer[dense].softmax: no pattern is chosen (give one of " +
          configs::MemberNames(*configs::Attention::descriptor()->FindOneofByName("pattern")) +
          ")");
  EXPECT_EQ(ErrorOf(SampleWith("softmax { causal {} }", "")),
            "c.textproto:14: model.mixer[dense]: no kind is chosen (give one of softmax, sigmoid)");
  EXPECT_EQ(ErrorOf(SampleWith("adamw { lr: 1e-3 }", "clip_norm: 2")),
            "c.textproto:31: optimizer: no kind is chosen (give one of adamw)");
  EXPECT_EQ(ErrorOf(SampleWith("cosine { warmup_steps: 10 }", "")),
            "c.textproto:32: schedule: no shape is chosen (give one of cosine, wsd, constant)");
}

TEST(ConfigValidateTest, Heads) {
  ExpectProblem(
      {"model.num_kv_heads=3", "model.mixer[s2].softmax.causal={}", "model.num_kv_heads=3"},
      "model.num_kv_heads: 3 does not divide num_heads 8 (use one of 1, 2, 4, 8)");
  ExpectProblem({"model.mixer[s2].softmax.causal={}", "model.num_kv_heads=16"},
                "model.num_kv_heads: 16 does not divide num_heads 8 (use one of 1, 2, 4, 8)");
  EXPECT_EQ(ErrorOf(SampleWith("hidden_size: 64", "hidden_size: 60")),
            "c.textproto:7: model.head_dim: is missing, and hidden_size 60 is not a multiple of "
            "num_heads 8 (give head_dim, or another hidden_size or num_heads)");
  EXPECT_EQ(ErrorOf(SampleWith("hidden_size: 64", "hidden_size: 60 head_dim: 8")), "");
  ExpectProblem({"model.head_dim=7"}, "model.head_dim: 7 is odd (RoPE needs an even one: use 8)");
  EXPECT_EQ(ErrorOf(SampleWith("hidden_size: 64", "hidden_size: 8")),
            "c.textproto:7: model.head_dim: 1 is odd (RoPE needs an even one: use 2)");
  EXPECT_EQ(ErrorOf(SampleWith("hidden_size: 64", "hidden_size: 16384")),
            "c.textproto:7: model.head_dim: 2048 is out of range (use a whole number from 2 to "
            "1024)");
}

TEST(ConfigValidateTest, Layers) {
  const std::string known = "is no mixer (use the names of mixers: dense, s2)";
  ExpectProblem({"model.layers=dense s2 s3"}, "model.layers: 's3' " + known);
  EXPECT_EQ(ErrorOf(kSample, {"model.layers=dense x y x s2", "model.num_layers=9"}),
            "--set model.layers=dense x y x s2: model.layers: 'x' " + known +
                "\n--set model.layers=dense x y x s2: model.layers: 'y' " + known);
  EXPECT_EQ(ErrorOf(kSample, {"model.layers=dense"}),
            "c.textproto:15: model.mixer[s2]: is not used by model.layers (name 's2' there or "
            "remove it)");
  ExpectProblem({"model.layers=dense s2 s2 s2 s2"},
                "model.layers: has 5 names for num_layers 4 (shorten it)");
  ExpectFine({"model.layers=dense s2 s2 s2"});
  ExpectFine({"model.layers=  dense\ts2 s2 "});  // 3 names over 4 layers: the tile may be cut
  EXPECT_EQ(ErrorOf(SampleWith("layers: \"dense s2\"", "layers: \" \"")),
            "c.textproto:24: model.layers: names no mixer (use names out of dense, s2)");
  // A misspelt name does not make its mixer unused as well.
  EXPECT_EQ(ErrorOf(SampleWith("layers: \"dense s2\"", "layers: \"dense s3\"")),
            "c.textproto:24: model.layers: 's3' " + known);
  EXPECT_EQ(ErrorOf(SampleWith("name: \"s2\"", "name: \"dense\"")),
            "c.textproto:16: model.mixer[1].name: 'dense' is the name of an earlier mixer (rename "
            "one)\n"
            "c.textproto:24: model.layers: 's2' is no mixer (use the names of mixers: dense)");
}

TEST(ConfigValidateTest, MixersHaveNamesThatPathsCanHold) {
  EXPECT_EQ(ErrorOf(SampleWith("name: \"s2\"", "")),
            "c.textproto:15: model.mixer[1].name: is missing (give a text)\n"
            "c.textproto:24: model.layers: 's2' is no mixer (use the names of mixers: dense)");
  for (const char* name : {"4", "0", "a b", "-a", "a.b", "a[0]", "a]", "\xc3\xa9"}) {
    const std::string error = ErrorOf(SampleWith("name: \"s2\"", Str("name: \"", name, "\"")));
    EXPECT_EQ(error.substr(0, error.find('\n')),
              Str("c.textproto:16: model.mixer[1].name: '", name,
                  "' is not a usable name (use letters, digits, '_' and '-', starting with a "
                  "letter)"));
  }
  EXPECT_EQ(ErrorOf(SampleWith("\"s2\"", "\"S_2-x\""), {"model.layers=dense S_2-x"}), "");
}

TEST(ConfigValidateTest, ContextLengthSplitsIntoWholeBlocks) {
  const std::string tail = " context-parallel ranks (use a multiple of ";
  const std::string head = "run.context_length: ";
  const auto error = [&](int64_t context, int cp, const char* placement) {
    return ErrorOf(kSample, {Str("parallel.cp=", cp), Str("parallel.placement=", placement),
                             Str("run.global_batch_tokens=", 4 * context),
                             Str("run.context_length=", context)});
  };
  const auto expected = [&](int64_t context, const std::string& message) {
    return Str("--set run.context_length=", context, ": run.context_length: ", context, message);
  };
  EXPECT_EQ(error(1000, 2, "ZIGZAG"),
            expected(1000, " does not split into whole blocks for placement ZIGZAG on 2" + tail +
                               "256, such as 768 or 1024, or change parallel.cp)"));
  EXPECT_EQ(error(128, 4, "ZIGZAG"),
            expected(128, " does not split into whole blocks for placement ZIGZAG on 4" + tail +
                              "512, such as 512, or change parallel.cp)"));
  EXPECT_EQ(error(320, 4, "CONTIGUOUS"),
            expected(320, " does not split into whole blocks for placement CONTIGUOUS on 4" + tail +
                              "256, such as 256 or 512, or change parallel.cp)"));
  EXPECT_EQ(error(128 * 3, 3, "ZIGZAG"), "");
  EXPECT_EQ(error(64 * 3, 3, "CONTIGUOUS"), "");
  EXPECT_NE(error(64 * 3, 3, "ZIGZAG"), "");
  EXPECT_EQ(error(77, 1, "ZIGZAG"), "");
}

TEST(ConfigValidateTest, StrategiesRefuseWhatTheyDoNotLookAt) {
  ExpectFine({"parallel.strategy=EXCHANGE", "parallel.exchange_stages=3",
              "parallel.keep_keys_mib=10", "parallel.ranks_per_node=2"});
  ExpectFine({"parallel.strategy=AUTO", "parallel.cost.gflops=10", "parallel.head_groups=2"});
  ExpectFine({"parallel.strategy=HYBRID", "parallel.ulysses_ranks=2",
              "parallel.hybrid_outer=EXCHANGE", "parallel.exchange_stages=3"});
  const std::string unused = " does not look at it; it is for ";
  ExpectProblem({"parallel.exchange_stages=3"},
                "parallel.exchange_stages: strategy RING" + unused + "EXCHANGE, so leave it out");
  ExpectProblem({"parallel.strategy=HYBRID", "parallel.keep_keys_mib=3"},
                "parallel.keep_keys_mib: strategy HYBRID" + unused + "EXCHANGE, so leave it out");
  ExpectProblem({"parallel.strategy=ULYSSES", "parallel.deduplicate=false"},
                "parallel.deduplicate: strategy ULYSSES" + unused + "EXCHANGE, so leave it out");
  ExpectProblem({"parallel.strategy=EXCHANGE", "parallel.cost.latency_us=3"},
                "parallel.cost: strategy EXCHANGE" + unused + "AUTO, so leave it out");
  ExpectProblem({"parallel.strategy=HYBRID", "parallel.hybrid_outer=ULYSSES"},
                "parallel.hybrid_outer: ULYSSES cannot run between groups (use RING or EXCHANGE)");
  ExpectProblem({"parallel.strategy=HYBRID", "parallel.cp=2", "parallel.ulysses_ranks=3"},
                "parallel.ulysses_ranks: 3 does not divide parallel.cp = 2 (use one of 1, 2)");
  ExpectProblem({"parallel.strategy=DOUBLE_RING", "parallel.cp=2", "parallel.ranks_per_node=3"},
                "parallel.ranks_per_node: 3 does not divide parallel.cp = 2, and DOUBLE_RING needs "
                "whole nodes (use one of 1, 2)");
}

TEST(ConfigValidateTest, AlignedDocumentsNeedBlocksAndTheirMask) {
  ExpectFine({"data.align_documents=true"});
  ExpectProblem({"data.document_mask=false", "data.align_documents=true"},
                "data.align_documents: needs document_mask: true, which hides the padding (use "
                "false)");
  ExpectProblem({"run.context_length=96", "parallel.cp=1", "run.global_batch_tokens=192",
                 "data.align_documents=true"},
                "data.align_documents: needs a run.context_length that is a multiple of 64, not 96 "
                "(use 64 or 128, or false)");
}

TEST(ConfigValidateTest, BalancedPackingNeedsTheDocumentMask) {
  ExpectFine({"data.packing=BALANCED"});
  ExpectFine({"data.packing=GREEDY", "data.document_mask=false"});
  ExpectProblem(
      {"data.document_mask=false", "data.packing=BALANCED"},
      "data.packing: BALANCED needs document_mask: true, because without it all rows have "
      "the same work (use GREEDY)");
}

TEST(ConfigValidateTest, MlpTilesAreCounted) {
  ExpectFine({"run.mlp_tile_tokens=1", "run.recompute=ATTENTION_KEPT"});
  ExpectProblem(
      {"run.mlp_tile_tokens=-1"},
      "run.mlp_tile_tokens: -1 is out of range (use a whole number from 0 to 1073741824)");
}

TEST(ConfigValidateTest, GlobalBatchIsWholeMicroBatches) {
  ExpectProblem({"run.global_batch_tokens=5000"},
                "run.global_batch_tokens: 5000 is not a multiple of context_length 1024 x "
                "micro_batch_rows 1 x parallel.dp 2 (use 4096 or 6144)");
  ExpectProblem({"run.micro_batch_rows=3", "run.global_batch_tokens=1024"},
                "run.global_batch_tokens: 1024 is not a multiple of context_length 1024 x "
                "micro_batch_rows 3 x parallel.dp 2 (use 6144)");
  ExpectFine({"run.micro_batch_rows=3", "run.global_batch_tokens=12288"});
  // The product of the largest values does not overflow.
  ExpectProblem({"run.context_length=1073741824", "run.micro_batch_rows=65536", "parallel.dp=65536",
                 "run.global_batch_tokens=1099511627776"},
                "run.global_batch_tokens: 1099511627776 is not a multiple of context_length "
                "1073741824 x micro_batch_rows 65536 x parallel.dp 65536 (use "
                "4611686018427387904)");
}

TEST(ConfigValidateTest, Precision) {
  ExpectFine({"run.precision=F64"});
  ExpectProblem({"run.device=CUDA", "run.precision=F64"},
                "run.precision: F64 exists on the CPU only (use F32 or BF16 on CUDA)");
  ExpectProblem({"parallel.backend=NCCL"},
                "parallel.backend: NCCL connects GPUs only (use AUTO, or run.device: CUDA)");
  ExpectFine({"parallel.backend=NCCL", "run.device=CUDA"});
  for (const char* seconds : {"0", "0.5", "-3", "604801", "inf"}) {
    ExpectProblem(
        {Str("parallel.timeout_s=", seconds)},
        Str("parallel.timeout_s: ", seconds, " is out of range (use a number from 1 to 604800)"));
  }
  ExpectFine({"parallel.timeout_s=1.5"});
  ExpectProblem({"parallel.offload_optimizer=true"},
                "parallel.offload_optimizer: on CPU the optimizer's state is in host memory anyway "
                "(use false, or run.device: CUDA)");
  ExpectFine({"parallel.offload_optimizer=true", "run.device=CUDA"});
  ExpectProblem({"run.sync_checks=true"},
                "run.sync_checks: there are no kernels to wait for on CPU (use false, or device: "
                "CUDA)");
  ExpectFine({"run.sync_checks=true", "run.device=CUDA"});
  ExpectFine({"model.head_dim=256", "run.device=CUDA"});
  ExpectFine({"model.head_dim=264"});
  ExpectProblem({"run.device=CUDA", "model.head_dim=264"},
                "model.head_dim: 264 is too large for the attention kernels of CUDA (use at most "
                "256)");
  const auto refused = [](const char* residual, const char* precision, const char* right) {
    ExpectProblem({Str("run.precision=", precision), Str("model.residual_dtype=", residual)},
                  Str("model.residual_dtype: ", residual, " does not go with run.precision ",
                      precision, " (use ", right, ")"));
  };
  refused("F64", "BF16", "BF16 or F32");
  refused("BF16", "F32", "F32");
  refused("F64", "F32", "F32");
  refused("F32", "F64", "F64");
  refused("BF16", "F64", "F64");
  for (const char* fine : {"BF16", "F32"}) {
    ExpectFine({"run.precision=BF16", Str("model.residual_dtype=", fine)});
  }
}

TEST(ConfigValidateTest, GroupsThatShareState) {
  const std::string divisors =
      " does not split the 4 ranks of parallel.dp 2 x parallel.cp 2 into groups of at least 2 (use "
      "0 for one group, or a divisor of 4 from 2 on)";
  for (const char* stage : {"parallel.zero_stage=1", "parallel.zero_stage=3"}) {
    for (const char* fine : {"0", "2", "4"}) {
      ExpectFine({stage, Str("parallel.hybrid_shard=", fine)});
    }
    for (const char* wrong : {"1", "3", "8"}) {
      ExpectProblem({stage, Str("parallel.hybrid_shard=", wrong)},
                    Str("parallel.hybrid_shard: ", wrong, divisors));
    }
  }
  ExpectProblem({"parallel.hybrid_shard=2"},
                "parallel.hybrid_shard: 2 does not go with parallel.zero_stage 0, which splits "
                "nothing (use 0, or zero_stage 1, 2 or 3)");
  ExpectProblem({"parallel.zero_stage=4"},
                "parallel.zero_stage: 4 is out of range (use a whole number from 0 to 3)");
  ExpectFine({"parallel.dp=1", "parallel.cp=1", "parallel.zero_stage=3"});
}

TEST(ConfigValidateTest, S2Options) {
  const std::string s2 = "model.mixer[s2].softmax.s2.";
  ExpectProblem({s2 + "block_size=48"}, s2 + "block_size: 48 is not a power of two (use 32 or 64)");
  ExpectFine({s2 + "block_size=16"});
  ExpectProblem({s2 + "dense_heads=5"},
                s2 + "dense_heads: 5 exceeds model.num_kv_heads 4 (use at most that)");
  ExpectFine({s2 + "dense_heads=4"});
  ExpectProblem({s2 + "homogeneous=true", s2 + "dense_heads=1"},
                s2 + "dense_heads: 1 contradicts homogeneous: true (use 0)");
  ExpectProblem({s2 + "homogeneous=true", s2 + "head_step=1"},
                s2 + "head_step: has no effect with homogeneous: true (remove one of them)");
  ExpectFine({s2 + "homogeneous=true"});
}

TEST(ConfigValidateTest, S2HeadsMustCoverTheContext) {
  const std::string s2 = "model.mixer[s2].softmax.s2.";
  const auto incomplete = [&](int seen, int stride, int step) {
    return Str(s2, "stride_blocks: the 4 kv heads together see only ", seen, " of every ", stride,
               " far blocks, with head_step ", step,
               " (use stride_blocks of at most 4 with head_step 1, or a dense head, or "
               "allow_incomplete_coverage: true)");
  };
  ExpectProblem({s2 + "stride_blocks=5"}, incomplete(4, 5, 1));
  ExpectProblem({s2 + "stride_blocks=8"}, incomplete(4, 8, 2));
  EXPECT_EQ(ErrorOf(kSample, {s2 + "head_step=2"}), "c.textproto:20: " + incomplete(2, 4, 2));
  EXPECT_EQ(ErrorOf(kSample, {s2 + "head_step=4"}), "c.textproto:20: " + incomplete(1, 4, 4));
  ExpectFine({s2 + "head_step=3"});  // 0, 3, 6, 9 are four residues of 4
  ExpectFine({s2 + "head_offset=3"});
  ExpectFine({s2 + "stride_blocks=8", s2 + "dense_heads=1"});
  ExpectFine({s2 + "stride_blocks=8", s2 + "allow_incomplete_coverage=true"});
}

// Against the definition: which key blocks of a long row does any head see.
TEST(ConfigValidateTest, CoverageMatchesEnumeration) {
  for (int64_t heads : {1, 2, 3, 4, 6, 8}) {
    for (int64_t stride = 1; stride <= 12; ++stride) {
      for (int64_t step = 0; step <= 5; ++step) {
        for (int64_t offset : {0, 1, 7}) {
          configs::S2Pattern s2;
          s2.set_stride_blocks(stride);
          s2.set_head_offset(offset);
          if (step > 0) s2.set_head_step(step);
          const int64_t used = step > 0 ? step : std::max<int64_t>(1, stride / heads);
          int64_t seen = 0;
          for (int64_t block = 0; block < 10 * stride; ++block) {
            bool any = false;
            for (int64_t h = 0; h < heads; ++h) any |= (block + h * used + offset) % stride == 0;
            seen += any;
          }
          EXPECT_DOUBLE_EQ(configs::S2Coverage(s2, heads), seen / (10.0 * stride))
              << heads << " heads, stride " << stride << ", step " << step;
        }
      }
    }
  }
}

TEST(ConfigValidateTest, Moba) {
  const std::string moba = "model.mixer[dense].softmax.moba.";
  for (const std::string ranks : {"parallel.cp=1", "parallel.cp=2"}) {
    ExpectFine({ranks, moba + "top_k=1"});
    ExpectFine({ranks, moba + "block_size=192"});
    ExpectProblem({ranks, moba + "block_size=100"},
                  moba + "block_size: 100 is not a multiple of 64 (use 64 or 128)");
  }
}

TEST(ConfigValidateTest, Schedules) {
  const std::string last = " leaves no step after warm-up in run.steps 100 (use at most 99)";
  ExpectProblem({"schedule.cosine.warmup_steps=100"}, "schedule.cosine.warmup_steps: 100" + last);
  ExpectFine({"schedule.cosine.warmup_steps=99"});
  ExpectProblem({"schedule.constant.warmup_steps=100"},
                "schedule.constant.warmup_steps: 100" + last);
  ExpectFine({"schedule.constant.warmup_steps=99"});
  ExpectFine({"schedule.constant={}"});
  ExpectFine({"schedule.wsd.warmup_steps=80"});
  ExpectProblem({"schedule.wsd.warmup_steps=81"},
                "schedule.wsd.warmup_steps: 81 and 20 steps of decay are more than run.steps 100 "
                "(use at most 80, or a shorter decay)");
  ExpectProblem({"schedule.wsd.decay_steps=150"},
                "schedule.wsd.warmup_steps: 0 and 150 steps of decay are more than run.steps 100 "
                "(use at most 0, or a shorter decay)");
  ExpectFine({"schedule.wsd={warmup_steps: 40 decay_steps: 60}"});
  ExpectFine({"schedule.wsd={decay_fraction: 1}"});
}

TEST(ConfigValidateTest, SavingAndEvaluation) {
  ExpectProblem({"checkpoint.keep_every=30"},
                "checkpoint.keep_every: 30 is not a multiple of every_steps 20 (use 20 or 40)");
  ExpectProblem({"checkpoint.keep_every=10"},
                "checkpoint.keep_every: 10 is not a multiple of every_steps 20 (use 20)");
  ExpectFine({"checkpoint.keep_every=40"});
  ExpectProblem({"checkpoint.every_steps=0", "checkpoint.keep_every=30"},
                "checkpoint.keep_every: has no effect while every_steps is 0 (give every_steps, or "
                "use 0)");
  EXPECT_EQ(ErrorOf(SampleWith("validation { path: \"b\" }", "")),
            "c.textproto:34: evaluation.every_steps: needs a validation dataset (give "
            "data.validation, or use 0)");
  ExpectProblem({"data.validation[0].weight=2"},
                "data.validation[0].weight: has no effect, because validation reads its datasets "
                "in order (leave it out)");
  ExpectFine({"evaluation.rows=5", "data.train[0].weight=2"});
}

// One mistake must not drag others behind it that vanish with it.
TEST(ConfigValidateTest, CombinationsOfWrongValuesAreNotReported) {
  for (const char* set :
       {"run.context_length=0", "run.micro_batch_rows=0", "parallel.dp=0", "parallel.cp=-1",
        "model.num_heads=0", "model.num_kv_heads=0", "model.head_dim=1", "model.num_layers=0",
        "run.steps=0", "schedule.wsd.decay_fraction=5",
        "model.mixer[s2].softmax.s2.stride_blocks=0", "model.mixer[s2].softmax.s2.block_size=15"}) {
    const std::string error = ErrorOf(kSample, {set});
    EXPECT_EQ(std::count(error.begin(), error.end(), '\n'), 0) << error;
    EXPECT_NE(error.find("is out of range"), std::string::npos) << set << ": " << error;
  }
}

}  // namespace longspan::test
