// What a configuration says about how ranks share work, memory and data reaches the options of the
// run, field by field: one that is read nowhere would be accepted and ignored.
#include "trainer/from_config.h"

#include <gtest/gtest.h>

#include <functional>

#include "ops/core/error.h"

namespace longspan::trainer {
namespace {

using parallel::PlacementKind;
using parallel::StrategyKind;

constexpr const char* kConfig = R"(
run { steps: 6 context_length: 1024 global_batch_tokens: 8192 }
model {
  vocab_size: 320 hidden_size: 32 num_layers: 2 num_heads: 4 num_kv_heads: 2 head_dim: 8
  ffn_hidden_size: 64
  mixer { name: "dense" softmax { causal {} } }
  layers: "dense dense"
}
data { train { path: "corpus/train" } }
parallel { dp: 2 cp: 4 }
optimizer { adamw { lr: 1e-2 } }
schedule { constant {} }
)";

TrainOptions OptionsWith(const std::vector<std::string>& sets) {
  return OptionsFromConfig(configs::LoadText(kConfig, "c.textproto", sets), 8);
}

TEST(FromConfigTest, EveryFieldReachesItsOption) {
  struct Case {
    std::vector<std::string> sets;
    std::function<bool(const TrainOptions&)> arrived;
  };
  const auto strategy = [](const char* name) { return Str("parallel.strategy=", name); };
  const std::vector<Case> cases = {
      {{"run.recompute=LAYER"},
       [](auto& o) { return o.model.recompute_layers && !o.model.keep_attention; }},
      {{"run.recompute=ATTENTION_KEPT"},
       [](auto& o) { return o.model.recompute_layers && o.model.keep_attention; }},
      {{"run.mlp_tile_tokens=77"}, [](auto& o) { return o.model.mlp_tile_tokens == 77; }},
      {{"data.packing=BALANCED"}, [](auto& o) { return o.balanced_packing; }},
      {{"parallel.placement=CONTIGUOUS"},
       [](auto& o) { return o.placement == PlacementKind::kContiguous; }},
      {{"parallel.placement=STRIPED"},
       [](auto& o) { return o.placement == PlacementKind::kStriped; }},
      {{"parallel.placement=BALANCED"},
       [](auto& o) { return o.placement == PlacementKind::kBalanced; }},
      {{strategy("ALL_GATHER"), "parallel.head_groups=2"},
       [](auto& o) {
         return o.strategy.kind == StrategyKind::kAllGather && o.strategy.head_groups == 2;
       }},
      {{strategy("DOUBLE_RING"), "parallel.ranks_per_node=2"},
       [](auto& o) {
         return o.strategy.kind == StrategyKind::kDoubleRing && o.strategy.ranks_per_node == 2;
       }},
      {{strategy("ULYSSES")}, [](auto& o) { return o.strategy.kind == StrategyKind::kUlysses; }},
      {{strategy("HYBRID"), "parallel.ulysses_ranks=2", "parallel.hybrid_outer=EXCHANGE"},
       [](auto& o) {
         return o.strategy.kind == StrategyKind::kHybrid && o.strategy.ulysses_ranks == 2 &&
                o.strategy.outer == StrategyKind::kExchange;
       }},
      {{strategy("EXCHANGE"), "parallel.exchange_stages=5", "parallel.deduplicate=false"},
       [](auto& o) {
         return o.strategy.kind == StrategyKind::kExchange && o.strategy.stages == 5 &&
                !o.strategy.deduplicate;
       }},
      {{strategy("EXCHANGE"), "parallel.keep_keys_mib=1.5"},
       [](auto& o) { return o.keep_key_bytes == 3 << 19; }},
      {{strategy("AUTO"), "parallel.cost.gflops=7", "parallel.cost.gbytes_per_s=3",
        "parallel.cost.node_gbytes_per_s=2", "parallel.cost.latency_us=9"},
       [](auto& o) {
         return o.strategy.kind == StrategyKind::kAuto && o.network.flops_per_s == 7e9 &&
                o.network.intra.bytes_per_s == 3e9 && o.network.inter.bytes_per_s == 2e9 &&
                o.network.intra.latency_s == 9e-6 && o.network.inter.latency_s == 9e-6;
       }},
      {{"parallel.zero_stage=2"}, [](auto& o) { return o.zero_stage == 2; }},
      {{"parallel.zero_stage=3", "parallel.hybrid_shard=4"},
       [](auto& o) { return o.zero_stage == 3 && o.hybrid_shard == 4; }},
      {{"parallel.timeout_s=12.5"}, [](auto& o) { return o.timeout_s == 12.5; }},
  };
  const TrainOptions defaults = OptionsWith({});
  for (const Case& c : cases) {
    std::string sets;
    for (const std::string& set : c.sets) sets += set + " ";
    EXPECT_TRUE(c.arrived(OptionsWith(c.sets))) << sets;
    EXPECT_FALSE(c.arrived(defaults)) << sets;
  }
  EXPECT_EQ(defaults.placement, PlacementKind::kZigzag);
  EXPECT_EQ(defaults.strategy.kind, StrategyKind::kRing);
  EXPECT_TRUE(defaults.strategy.deduplicate);
  EXPECT_EQ(defaults.timeout_s, 1800);
}

// Nodes are those of the configuration, or else as the launcher placed the ranks; the cost model
// has the same ones.
TEST(FromConfigTest, NodesOfTheContextLayout) {
  const TrainOptions given = OptionsWith({"parallel.strategy=EXCHANGE", "parallel.keep_keys_mib=2",
                                          "run.micro_batch_rows=2", "parallel.ranks_per_node=4"});
  const ContextLayout layout = given.context_layout(2);
  EXPECT_EQ(layout.strategy.ranks_per_node, 4);
  EXPECT_EQ(layout.network.ranks_per_node, 4);
  EXPECT_EQ(layout.keep_key_bytes, 2 << 20);
  EXPECT_EQ(layout.rows, 2);
  EXPECT_EQ(layout.row_length, 1024);
  EXPECT_EQ(layout.ranks, 4);
  const ContextLayout placed = OptionsWith({}).context_layout(2);
  EXPECT_EQ(placed.strategy.ranks_per_node, 2);
  EXPECT_EQ(placed.network.ranks_per_node, 2);
}

}  // namespace
}  // namespace longspan::trainer
