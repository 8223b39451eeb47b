#include "trainer/from_config.h"

#include <algorithm>
#include <utility>

#include "configs/defaults.h"
#include "configs/mixer.h"
#include "ops/core/check.h"
#include "ops/core/cuda/backend.h"
#include "parallel/comm/nccl.h"
#include "parallel/context/placement.h"

namespace longspan::trainer {
namespace {

DType DTypeOf(configs::Precision precision) {
  switch (precision) {
    case configs::BF16:
      return DType::kBF16;
    case configs::F32:
      return DType::kF32;
    case configs::F64:
      return DType::kF64;
  }
  return DType::kF32;
}

ops::StridePhase PhaseFrom(configs::BlockPhase phase) {
  return phase == configs::ROW ? ops::StridePhase::kRow : ops::StridePhase::kDocument;
}

ops::S2Options S2From(const configs::S2Pattern& p) {
  return {.block_size = p.block_size(),
          .local_blocks = p.local_blocks(),
          .stride_blocks = p.stride_blocks(),
          .homogeneous = p.homogeneous(),
          .head_step = p.has_head_step() ? p.head_step() : 0,
          .head_offset = p.head_offset(),
          .dense_heads = p.dense_heads(),
          .allow_incomplete_coverage = p.allow_incomplete_coverage(),
          .phase = PhaseFrom(p.phase())};
}

ops::RandomBlocksOptions RandomBlocksFrom(const configs::RandomBlocksPattern& p) {
  return {.block_size = p.block_size(),
          .density = p.density(),
          .seed = p.seed(),
          .mean_blocks = p.mean_blocks(),
          .min_blocks = p.min_blocks(),
          .bidirectional = p.bidirectional(),
          .per_head = p.per_head(),
          .own_block = p.own_block(),
          .phase = PhaseFrom(p.phase())};
}

ops::AttentionPattern PatternFrom(const configs::Attention& attention) {
  using ops::AttentionPattern;
  switch (attention.pattern_case()) {
    case configs::Attention::kFull:
      return AttentionPattern::Full();
    case configs::Attention::kWindow: {
      const configs::WindowPattern& p = attention.window();
      return AttentionPattern::Window(p.window(), p.sinks(), p.bidirectional());
    }
    case configs::Attention::kS2:
      return AttentionPattern::S2(S2From(attention.s2()));
    case configs::Attention::kGlobalWindow: {
      const configs::GlobalWindowPattern& p = attention.global_window();
      return AttentionPattern::GlobalWindow(p.window(), p.global_tokens(), p.bidirectional());
    }
    case configs::Attention::kPower: {
      const configs::PowerPattern& p = attention.power();
      return AttentionPattern::Power({p.block_size(), p.local_blocks(), p.sink_blocks()});
    }
    case configs::Attention::kDilated: {
      const configs::DilatedPattern& p = attention.dilated();
      return AttentionPattern::Dilated(
          {p.block_size(), p.neighbours(), p.dilation(), p.bidirectional()});
    }
    case configs::Attention::kPrefixLm:
      return AttentionPattern::Prefix(attention.prefix_lm().prefix());
    case configs::Attention::kSharedQuestion: {
      const auto& lengths = attention.shared_question().segment();
      return AttentionPattern::SharedQuestion({lengths.begin(), lengths.end()});
    }
    case configs::Attention::kCausalBlockwise: {
      const auto& lengths = attention.causal_blockwise().segment();
      return AttentionPattern::CausalBlockwise({lengths.begin(), lengths.end()});
    }
    case configs::Attention::kBlockCausal:
      return AttentionPattern::BlockCausal(attention.block_causal().block_size());
    case configs::Attention::kRandomBlocks:
      return AttentionPattern::RandomBlocks(RandomBlocksFrom(attention.random_blocks()));
    case configs::Attention::kSpans: {
      std::vector<ops::HeadSpan> spans;
      for (const configs::HeadSpan& head : attention.spans().head()) {
        spans.push_back({head.window(), head.sinks()});  // 0 stands for no window
      }
      return AttentionPattern::Spans(std::move(spans));
    }
    default:
      return AttentionPattern::Causal();
  }
}

// Path of a mixer's attention.
std::string AttentionField(const configs::Mixer& mixer) {
  return Str("model.mixer[", mixer.name(), "].", configs::NormalizationOf(mixer));
}

MixerOptions MixerFrom(const configs::Config& c, const configs::Mixer& mixer) {
  const configs::Attention& attention = configs::AttentionOf(mixer);
  MixerOptions options{mixer.name(), PatternFrom(attention)};
  if (mixer.has_sigmoid()) {
    options.normalization = ops::Normalization::kSigmoid;
    options.bias = configs::SigmoidBias(attention, c.run().context_length());
  }
  if (attention.has_duo()) options.duo = {attention.duo().sinks(), attention.duo().recent()};
  if (attention.has_seer()) {
    const configs::SeerPattern& seer = attention.seer();
    options.seer = {seer.block_size(), seer.gate_dim(), {seer.top_k(), seer.threshold()}};
  }
  if (attention.has_moba()) {
    options.moba = {.block_size = attention.moba().block_size(), .top_k = attention.moba().top_k()};
  }
  return options;
}

ScheduleOptions ScheduleFrom(const configs::Schedule& s, int64_t steps) {
  ScheduleOptions o;
  switch (s.shape_case()) {
    case configs::Schedule::kCosine:
      o.kind = ScheduleKind::kCosine;
      o.warmup_steps = s.cosine().warmup_steps();
      o.final_fraction = s.cosine().final_fraction();
      break;
    case configs::Schedule::kWsd: {
      const auto& w = s.wsd();
      o.kind = ScheduleKind::kWsd;
      o.warmup_steps = w.warmup_steps();
      o.final_fraction = w.final_fraction();
      o.decay_steps = configs::DecaySteps(w, steps);
      o.decay_shape = w.decay_shape() == configs::WsdSchedule::LINEAR ? DecayShape::kLinear
                                                                      : DecayShape::kOneMinusSqrt;
      break;
    }
    default:
      o.warmup_steps = s.constant().warmup_steps();
      break;
  }
  return o;
}

std::vector<DataSource> SourcesFrom(
    const google::protobuf::RepeatedPtrField<configs::Dataset>& datasets) {
  std::vector<DataSource> sources;
  for (const auto& d : datasets) sources.push_back({d.path(), d.weight()});
  return sources;
}

CommBackend BackendFrom(configs::Parallel::Backend backend) {
  switch (backend) {
    case configs::Parallel::NCCL:
      return CommBackend::kNccl;
    case configs::Parallel::MPI:
      return CommBackend::kMpi;
    default:
      return CommBackend::kAuto;
  }
}

parallel::PlacementKind PlacementFrom(configs::Parallel::Placement placement) {
  switch (placement) {
    case configs::Parallel::CONTIGUOUS:
      return parallel::PlacementKind::kContiguous;
    case configs::Parallel::STRIPED:
      return parallel::PlacementKind::kStriped;
    case configs::Parallel::BALANCED:
      return parallel::PlacementKind::kBalanced;
    default:
      return parallel::PlacementKind::kZigzag;
  }
}

parallel::StrategyKind StrategyKindFrom(configs::ContextStrategy strategy) {
  switch (strategy) {
    case configs::ALL_GATHER:
      return parallel::StrategyKind::kAllGather;
    case configs::DOUBLE_RING:
      return parallel::StrategyKind::kDoubleRing;
    case configs::ULYSSES:
      return parallel::StrategyKind::kUlysses;
    case configs::HYBRID:
      return parallel::StrategyKind::kHybrid;
    case configs::EXCHANGE:
      return parallel::StrategyKind::kExchange;
    case configs::AUTO:
      return parallel::StrategyKind::kAuto;
    default:
      return parallel::StrategyKind::kRing;
  }
}

parallel::StrategyOptions StrategyFrom(const configs::Parallel& c) {
  return {.kind = StrategyKindFrom(c.strategy()),
          .ranks_per_node = static_cast<int>(c.ranks_per_node()),
          .stages = static_cast<int>(c.exchange_stages()),
          .head_groups = c.head_groups(),
          .ulysses_ranks = static_cast<int>(c.ulysses_ranks()),
          .outer = StrategyKindFrom(c.hybrid_outer()),
          .deduplicate = c.deduplicate()};
}

// What a cost of 0 stands for.
parallel::NetworkOptions NetworkFrom(const configs::ContextCost& cost, DeviceKind device) {
  const bool gpu = device == DeviceKind::kCuda;
  const auto given = [](double value, double otherwise) { return value > 0 ? value : otherwise; };
  const double latency_s = 1e-6 * given(cost.latency_us(), gpu ? 10 : 20);
  parallel::NetworkOptions network;
  network.intra = {latency_s, 1e9 * given(cost.gbytes_per_s(), gpu ? 300 : 4)};
  network.inter = {latency_s, 1e9 * given(cost.node_gbytes_per_s(), gpu ? 40 : 4)};
  network.flops_per_s = 1e9 * given(cost.gflops(), gpu ? 4e5 : 100);
  return network;
}

ObjectiveOptions ObjectiveFrom(const configs::Objective& objective) {
  if (objective.has_seer_gates()) {
    return {.kind = ObjectiveKind::kSeerGates,
            .drop_first_quarter = objective.seer_gates().drop_first_quarter()};
  }
  if (!objective.has_duo_gates()) return {};
  return {.kind = ObjectiveKind::kDuoGates,
          .regularization = objective.duo_gates().regularization()};
}

void FillOptions(const configs::Config& c, TrainOptions& o) {
  const configs::Run& run = c.run();
  o.model = ModelFromConfig(c);
  o.model.attention_implementation =
      run.attention_implementation();  // of this run, not of the model
  o.objective = ObjectiveFrom(c.objective());
  o.seed = static_cast<uint64_t>(run.seed());
  o.steps = run.steps();
  o.context_length = run.context_length();
  o.micro_batch_rows = run.micro_batch_rows();
  o.global_batch_tokens = run.global_batch_tokens();
  o.threads = static_cast<int>(run.threads());
  o.deterministic = run.deterministic();
  o.sync_checks = run.sync_checks();
  o.device = run.device() == configs::Run::CUDA ? DeviceKind::kCuda : DeviceKind::kCpu;
  o.on_nonfinite =
      run.on_nonfinite() == configs::Run::SKIP ? NonFinitePolicy::kSkip : NonFinitePolicy::kStop;
  o.max_skipped_steps = run.max_skipped_steps();
  o.log_every_steps = run.log_every_steps();
  o.dp = c.parallel().dp();
  o.cp = c.parallel().cp();
  o.placement = PlacementFrom(c.parallel().placement());
  o.strategy = StrategyFrom(c.parallel());
  o.keep_key_bytes = static_cast<int64_t>(c.parallel().keep_keys_mib() * (1 << 20));
  o.network = NetworkFrom(c.parallel().cost(), o.device);
  o.backend = BackendFrom(c.parallel().backend());
  o.timeout_s = c.parallel().timeout_s();
  o.zero_stage = static_cast<int>(c.parallel().zero_stage());
  o.hybrid_shard = c.parallel().hybrid_shard();
  o.offload_optimizer = c.parallel().offload_optimizer();
  o.train = SourcesFrom(c.data().train());
  o.validation = SourcesFrom(c.data().validation());
  o.document_mask = c.data().document_mask();
  o.align_documents = c.data().align_documents();
  o.balanced_packing = c.data().packing() == configs::Data::BALANCED;
  o.prefetch_micro_batches = static_cast<int>(c.data().prefetch_micro_batches());
  const configs::AdamW& adamw = c.optimizer().adamw();
  o.adamw = {adamw.lr(), adamw.beta1(), adamw.beta2(), adamw.eps(), adamw.weight_decay()};
  o.clip_norm = c.optimizer().clip_norm();
  o.schedule = ScheduleFrom(c.schedule(), o.steps);
  o.checkpoint_every_steps = c.checkpoint().every_steps();
  o.keep_last = c.checkpoint().keep_last();
  o.keep_every = c.checkpoint().keep_every();
  o.evaluation_every_steps = c.evaluation().every_steps();
  o.evaluation_rows = c.evaluation().rows();
}

// Why the named implementation cannot run every mixer here; empty when it can.
std::string ImplementationProblem(const TrainOptions& o) {
  const std::string& name = o.model.attention_implementation;
  std::string names;
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (entry.device != o.device) continue;
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
    if (name != entry.name) continue;
    const std::vector<std::string> routed = ops::MobaImplementations(o.device);
    for (const MixerOptions& mixer : o.model.mixers) {
      const std::string reason =
          entry.rejects({.dtype = o.model.compute,
                         .heads = o.model.num_heads,
                         .kv_heads = o.model.num_kv_heads,
                         .head_dim = o.model.head_dim,
                         .block_maxima = o.objective.kind == ObjectiveKind::kSeerGates});
      if (!reason.empty()) return Str(name, " cannot run mixer ", mixer.name, " here: ", reason);
      if (mixer.moba && std::find(routed.begin(), routed.end(), name) == routed.end()) {
        return Str(name, " has no routed attention, which mixer ", mixer.name, " needs");
      }
    }
    return "";
  }
  return Str("\"", name, "\" does not exist on this device; leave it empty, or use one of ", names);
}

}  // namespace

ModelOptions ModelFromConfig(const configs::Config& c) {
  const configs::Model& m = c.model();
  ModelOptions o;
  o.vocab_size = m.vocab_size();
  o.hidden_size = m.hidden_size();
  o.num_heads = m.num_heads();
  o.num_kv_heads = m.num_kv_heads();
  o.head_dim = m.has_head_dim() ? m.head_dim() : m.hidden_size() / m.num_heads();
  o.ffn_hidden_size = m.ffn_hidden_size();
  o.mlp = m.mlp() == configs::Model::GELU ? MlpKind::kGelu : MlpKind::kSwiGlu;
  o.norm_eps = m.norm_eps();
  o.tie_embeddings = m.tie_embeddings();
  o.init_std = m.init_std();
  o.embedding_init_std = m.has_embedding_init_std() ? m.embedding_init_std() : m.init_std();
  o.rope_theta = m.rope().theta();
  o.z_loss = m.z_loss();
  o.compute = DTypeOf(c.run().precision());
  o.residual = m.has_residual_dtype() ? DTypeOf(m.residual_dtype()) : o.compute;
  o.recompute_layers = c.run().recompute() != configs::Run::NONE;
  o.keep_attention = c.run().recompute() == configs::Run::ATTENTION_KEPT;
  o.mlp_tile_tokens = c.run().mlp_tile_tokens();
  o.gates_only = c.objective().has_duo_gates() || c.objective().has_seer_gates();
  for (const configs::Mixer& mixer : m.mixer()) o.mixers.push_back(MixerFrom(c, mixer));
  o.layers = configs::LayerMixers(m);
  return o;
}

TrainOptions OptionsFromConfig(const configs::LoadedConfig& loaded, int world_size) {
  const configs::Config& c = loaded.config;
  TrainOptions options;
  FillOptions(c, options);
  std::vector<configs::Problem> problems;
  std::string why;
  if (options.device == DeviceKind::kCuda && cuda::DeviceCount(&why) == 0) {
    problems.push_back({"run.device", Str("CUDA cannot be used: ", why, "; use CPU")});
  } else if (options.backend == CommBackend::kNccl && !parallel::NcclBuiltIn()) {
    problems.push_back({"parallel.backend", "this binary was built without NCCL; use MPI"});
  }
  if (options.dp * options.cp != world_size) {
    problems.push_back(
        {"parallel.cp",
         Str("parallel.dp = ", options.dp, " times parallel.cp = ", options.cp, " is ",
             options.dp * options.cp, ", but the job has ", world_size,
             world_size == 1 ? " rank" : " ranks", "; start it with launch/mpirun.sh -n ",
             options.dp * options.cp, " or change them")});
  }
  const std::string placement =
      parallel::Placement::Problem(options.placement, options.context_length, options.cp);
  if (!placement.empty()) problems.push_back({"run.context_length", placement});
  if (options.cp > 1) {
    parallel::StrategyOptions strategy = options.strategy;
    strategy.heads = options.model.num_heads;
    if (strategy.kind == parallel::StrategyKind::kAuto) strategy.kind = {};  // takes what fits
    for (const std::string& text :
         strategy.Problems(options.model.num_kv_heads, static_cast<int>(options.cp))) {
      problems.push_back({"parallel.strategy", text});
    }
  }
  if (!options.model.attention_implementation.empty()) {
    const std::string problem = ImplementationProblem(options);
    if (!problem.empty()) problems.push_back({"run.attention_implementation", problem});
  }
  for (int i = 0; i < c.model().mixer_size(); ++i) {
    const configs::Mixer& mixer = c.model().mixer(i);
    const ops::AttentionPattern& pattern = options.model.mixers[static_cast<size_t>(i)].pattern;
    const std::string field = AttentionField(mixer);
    if (pattern.LooksAhead()) {
      problems.push_back(
          {Str(field, ".", configs::PatternOf(mixer)),
           "a token would see the next one, which it is to predict; use causal or "
           "another pattern that looks back only (this one is for inspect and bench)"});
    }
    for (const std::string& text : pattern.Problems(options.model.num_kv_heads)) {
      problems.push_back({field, text});
    }
  }
  if (!problems.empty()) configs::ThrowProblems(loaded, std::move(problems));
  return options;
}

}  // namespace longspan::trainer
