#include "configs/validate.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <set>
#include <sstream>

#include "configs/defaults.h"
#include "configs/fields.h"
#include "configs/mixer.h"
#include "configs/validate_objective.h"
#include "configs/validate_patterns.h"
#include "ops/core/error.h"

namespace longspan::configs {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::OneofDescriptor;
using Problems = std::vector<Problem>;

// Bounds are doubles in the schema; most are whole numbers of up to 13 digits.
std::string FormatNumber(double value) {
  std::ostringstream out;
  out.precision(15);
  out << value;
  return out.str();
}

std::string DescribeRule(const FieldDescriptor& field, const Rule& rule) {
  std::vector<std::string> bounds;
  if (rule.has_min() && rule.has_max()) {
    bounds.push_back(Str("from ", FormatNumber(rule.min()), " to ", FormatNumber(rule.max())));
  } else if (rule.has_min()) {
    bounds.push_back("at least " + FormatNumber(rule.min()));
  }
  if (rule.has_above()) bounds.push_back("above " + FormatNumber(rule.above()));
  if (rule.has_max() && !rule.has_min()) bounds.push_back("at most " + FormatNumber(rule.max()));
  if (rule.has_below()) bounds.push_back("below " + FormatNumber(rule.below()));
  std::string text = ValueKind(field);
  for (size_t i = 0; i < bounds.size(); ++i) text += (i == 0 ? " " : " and ") + bounds[i];
  return text;
}

void CheckNumber(const FieldDescriptor& field, const std::string& path, double value,
                 const std::string& printed, Problems& problems) {
  const Rule& rule = field.options().GetExtension(configs::rule);
  // Written so that NaN fails.
  const bool good = std::isfinite(value) && (!rule.has_min() || value >= rule.min()) &&
                    (!rule.has_above() || value > rule.above()) &&
                    (!rule.has_max() || value <= rule.max()) &&
                    (!rule.has_below() || value < rule.below());
  if (good) return;
  problems.push_back(
      {path, Str(printed, " is out of range (use ", DescribeRule(field, rule), ")")});
}

void CheckSingle(const Message& message, const FieldDescriptor& field, const std::string& path,
                 Problems& problems) {
  const auto& reflection = *message.GetReflection();
  const bool required = field.options().GetExtension(configs::rule).required();
  if (required && !reflection.HasField(message, &field)) {
    problems.push_back({path, Str("is missing (give ", ValueKind(field), ")")});
    return;
  }
  if (!reflection.HasField(message, &field)) return;
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_INT64) {
    const int64_t value = reflection.GetInt64(message, &field);
    CheckNumber(field, path, static_cast<double>(value), Str(value), problems);
  } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_DOUBLE) {
    const double value = reflection.GetDouble(message, &field);
    CheckNumber(field, path, value, FormatNumber(value), problems);
  } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_STRING && required &&
             reflection.GetString(message, &field).empty()) {
    problems.push_back({path, "is empty (give a text)"});
  }
}

void CheckRules(const Message& message, const std::string& path, Problems& problems);

// Element `index` of the repeated field at `path`.
void CheckElement(const Message& message, const FieldDescriptor& field, int index,
                  const std::string& path, Problems& problems) {
  const auto& reflection = *message.GetReflection();
  const std::string element = ElementPath(path, index);
  if (field.message_type() != nullptr) {
    CheckRules(reflection.GetRepeatedMessage(message, &field, index), element, problems);
  } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_INT64) {
    const int64_t value = reflection.GetRepeatedInt64(message, &field, index);
    CheckNumber(field, element, static_cast<double>(value), Str(value), problems);
  } else {
    throw ConfigError(Str("the schema's list ", field.full_name(), " has an unexpected type"));
  }
}

// Applies the rules of the schema to every field of `message`. `path` has positions.
void CheckRules(const Message& message, const std::string& path, Problems& problems) {
  const auto& reflection = *message.GetReflection();
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor& field = *message.GetDescriptor()->field(i);
    const std::string field_path = JoinPath(path, field.name());
    if (field.is_repeated()) {
      const int size = reflection.FieldSize(message, &field);
      if (size == 0 && field.options().GetExtension(configs::rule).required()) {
        problems.push_back({field_path, Str("is missing (give at least one)")});
      }
      for (int k = 0; k < size; ++k) CheckElement(message, field, k, field_path, problems);
    } else if (field.message_type() == nullptr) {
      CheckSingle(message, field, field_path, problems);
    } else if (field.real_containing_oneof() == nullptr || reflection.HasField(message, &field)) {
      // An absent message is checked too: what it must contain is missing.
      CheckRules(reflection.GetMessage(message, &field), field_path, problems);
    }
  }
  for (int i = 0; i < message.GetDescriptor()->real_oneof_decl_count(); ++i) {
    const OneofDescriptor& oneof = *message.GetDescriptor()->oneof_decl(i);
    if (oneof.options().GetExtension(choice) && !reflection.HasOneof(message, &oneof)) {
      problems.push_back(
          {path, Str("no ", oneof.name(), " is chosen (give one of ", MemberNames(oneof), ")")});
    }
  }
}

// The multiples of `unit` around `value`.
std::string NearestMultiples(int64_t value, int64_t unit) {
  const int64_t below = value / unit * unit;
  return below > 0 ? Str(below, " or ", below + unit) : Str(unit);
}

void CheckRun(const Config& config, Problems& problems) {
  const Run& run = config.run();
  const Parallel& parallel = config.parallel();
  const int64_t context = run.context_length();
  if (parallel.cp() > 1) {
    const int64_t unit = (parallel.placement() == Parallel::ZIGZAG ? 128 : 64) * parallel.cp();
    if (context % unit != 0) {
      problems.push_back({"run.context_length",
                          Str(context, " does not split into whole blocks for placement ",
                              Parallel::Placement_Name(parallel.placement()), " on ", parallel.cp(),
                              " context-parallel ranks (use a multiple of ", unit, ", such as ",
                              NearestMultiples(context, unit), ", or change parallel.cp)")});
    }
  }
  const int64_t unit = context * run.micro_batch_rows() * parallel.dp();
  if (run.global_batch_tokens() % unit != 0) {
    problems.push_back(
        {"run.global_batch_tokens",
         Str(run.global_batch_tokens(), " is not a multiple of context_length ", context,
             " x micro_batch_rows ", run.micro_batch_rows(), " x parallel.dp ", parallel.dp(),
             " (use ", NearestMultiples(run.global_batch_tokens(), unit), ")")});
  }
}

void CheckAlignment(const Config& config, Problems& problems) {
  constexpr int64_t kBlock = 64;
  if (!config.data().align_documents()) return;
  if (!config.data().document_mask()) {
    problems.push_back(
        {"data.align_documents", "needs document_mask: true, which hides the padding (use false)"});
  }
  const int64_t context = config.run().context_length();
  if (context % kBlock != 0) {
    problems.push_back({"data.align_documents",
                        Str("needs a run.context_length that is a multiple of ", kBlock, ", not ",
                            context, " (use ", NearestMultiples(context, kBlock), ", or false)")});
  }
}

void CheckPacking(const Config& config, Problems& problems) {
  if (config.data().packing() != Data::BALANCED || config.data().document_mask()) return;
  problems.push_back({"data.packing",
                      "BALANCED needs document_mask: true, because without it all rows have the "
                      "same work (use GREEDY)"});
}

void CheckSharding(const Config& config, Problems& problems) {
  const Parallel& parallel = config.parallel();
  const int64_t ranks = parallel.dp() * parallel.cp(), group = parallel.hybrid_shard();
  if (group != 0 && parallel.zero_stage() == 0) {
    problems.push_back({"parallel.hybrid_shard",
                        Str(group,
                            " does not go with parallel.zero_stage 0, which splits nothing "
                            "(use 0, or zero_stage 1, 2 or 3)")});
  } else if (group != 0 && (group < 2 || ranks % group != 0)) {
    problems.push_back({"parallel.hybrid_shard",
                        Str(group, " does not split the ", ranks, " ranks of parallel.dp ",
                            parallel.dp(), " x parallel.cp ", parallel.cp(),
                            " into groups of at least 2 (use 0 for one group, or a divisor of ",
                            ranks, " from 2 on)")});
  }
}

std::string Divisors(int64_t value) {
  std::vector<std::string> divisors;
  for (int64_t d = 1; d <= value; ++d) {
    if (value % d == 0) divisors.push_back(std::to_string(d));
  }
  return JoinNames(divisors);
}

// What only some strategies look at, and numbers that do not fit the ranks.
void CheckStrategy(const Config& config, Problems& problems) {
  const Parallel& p = config.parallel();
  const Parallel defaults;
  const ContextStrategy kind = p.strategy();
  const bool hybrid = kind == HYBRID || kind == AUTO;
  const bool exchange =
      kind == EXCHANGE || kind == AUTO || (kind == HYBRID && p.hybrid_outer() == EXCHANGE);
  const ContextCost& cost = p.cost();
  const bool costs = cost.gflops() != 0 || cost.gbytes_per_s() != 0 ||
                     cost.node_gbytes_per_s() != 0 || cost.latency_us() != 0;
  const auto add = [&](const char* field, const std::string& text) {
    problems.push_back({Str("parallel.", field), text});
  };
  const auto unused = [&](bool used, bool given, const char* field, const char* by) {
    if (given && !used) {
      add(field, Str("strategy ", ContextStrategy_Name(kind), " does not look at it; it is for ",
                     by, ", so leave it out"));
    }
  };
  unused(exchange, p.exchange_stages() != defaults.exchange_stages(), "exchange_stages",
         "EXCHANGE");
  unused(exchange, p.keep_keys_mib() != defaults.keep_keys_mib(), "keep_keys_mib", "EXCHANGE");
  unused(exchange, p.deduplicate() != defaults.deduplicate(), "deduplicate", "EXCHANGE");
  unused(hybrid || kind == ALL_GATHER || kind == ULYSSES, p.head_groups() != defaults.head_groups(),
         "head_groups", "ALL_GATHER, ULYSSES and HYBRID");
  unused(hybrid, p.ulysses_ranks() != defaults.ulysses_ranks(), "ulysses_ranks", "HYBRID");
  unused(kind == HYBRID, p.hybrid_outer() != defaults.hybrid_outer(), "hybrid_outer", "HYBRID");
  unused(kind == AUTO, costs, "cost", "AUTO");
  unused(exchange || hybrid || kind == DOUBLE_RING, p.ranks_per_node() != defaults.ranks_per_node(),
         "ranks_per_node", "DOUBLE_RING, EXCHANGE, HYBRID and AUTO");
  if (p.hybrid_outer() != RING && p.hybrid_outer() != EXCHANGE) {
    add("hybrid_outer", Str(ContextStrategy_Name(p.hybrid_outer()),
                            " cannot run between groups (use RING or EXCHANGE)"));
  }
  if (hybrid && p.ulysses_ranks() > 0 && p.cp() % p.ulysses_ranks() != 0) {
    add("ulysses_ranks", Str(p.ulysses_ranks(), " does not divide parallel.cp = ", p.cp(),
                             " (use one of ", Divisors(p.cp()), ")"));
  }
  if (kind == DOUBLE_RING && p.ranks_per_node() > 0 && p.cp() % p.ranks_per_node() != 0) {
    add("ranks_per_node",
        Str(p.ranks_per_node(), " does not divide parallel.cp = ", p.cp(),
            ", and DOUBLE_RING needs whole nodes (use one of ", Divisors(p.cp()), ")"));
  }
}

void CheckHeads(const Config& config, Problems& problems) {
  const Model& model = config.model();
  if (model.num_heads() % model.num_kv_heads() != 0) {
    problems.push_back({"model.num_kv_heads",
                        Str(model.num_kv_heads(), " does not divide num_heads ", model.num_heads(),
                            " (use one of ", Divisors(model.num_heads()), ")")});
  }
  if (!model.has_head_dim() && model.hidden_size() % model.num_heads() != 0) {
    problems.push_back(
        {"model.head_dim", Str("is missing, and hidden_size ", model.hidden_size(),
                               " is not a multiple of num_heads ", model.num_heads(),
                               " (give head_dim, or another hidden_size or num_heads)")});
    return;
  }
  constexpr int64_t kMostOnCuda = 256;
  if (config.run().device() == Run::CUDA && HeadDim(model) > kMostOnCuda) {
    problems.push_back(
        {"model.head_dim", Str(HeadDim(model), " is too large for the attention kernels of CUDA (",
                               "use at most ", kMostOnCuda, ")")});
    return;
  }
  const FieldDescriptor& head_dim = *Model::descriptor()->FindFieldByName("head_dim");
  if (HeadDim(model) % 2 != 0) {
    problems.push_back({"model.head_dim", Str(HeadDim(model), " is odd (RoPE needs an even one: ",
                                              "use ", HeadDim(model) + 1, ")")});
  } else {  // a given value has been checked, a derived one has not
    CheckNumber(head_dim, "model.head_dim", static_cast<double>(HeadDim(model)),
                Str(HeadDim(model)), problems);
  }
}

void CheckPrecision(const Config& config, Problems& problems) {
  const Precision precision = config.run().precision();
  if (precision == F64 && config.run().device() == Run::CUDA) {
    problems.push_back({"run.precision", "F64 exists on the CPU only (use F32 or BF16 on CUDA)"});
  }
  if (config.run().device() == Run::CPU && config.run().sync_checks()) {
    problems.push_back({"run.sync_checks",
                        "there are no kernels to wait for on CPU (use false, or device: CUDA)"});
  }
  if (config.run().device() == Run::CPU && config.parallel().backend() == Parallel::NCCL) {
    problems.push_back(
        {"parallel.backend", "NCCL connects GPUs only (use AUTO, or run.device: CUDA)"});
  }
  if (config.run().device() == Run::CPU && config.parallel().offload_optimizer()) {
    problems.push_back({"parallel.offload_optimizer",
                        "on CPU the optimizer's state is in host memory anyway (use false, or "
                        "run.device: CUDA)"});
  }
  const Precision residual = ResidualDtype(config);
  const bool widened = precision == BF16 && residual == F32;
  if (residual != precision && !widened) {
    problems.push_back({"model.residual_dtype",
                        Str(Precision_Name(residual), " does not go with run.precision ",
                            Precision_Name(precision), " (use ",
                            precision == BF16 ? "BF16 or F32" : Precision_Name(precision), ")")});
  }
}

void CheckLayers(const Model& model, Problems& problems) {
  std::set<std::string> known;
  for (int i = 0; i < model.mixer_size(); ++i) {
    const std::string& name = model.mixer(i).name();
    const std::string path = ElementPath("model.mixer", i) + ".name";
    if (name.empty()) continue;
    if (!IsElementName(name)) {
      problems.push_back({path, Str("'", name,
                                    "' is not a usable name (use letters, digits, '_' "
                                    "and '-', starting with a letter)")});
    } else if (!known.insert(name).second) {
      problems.push_back({path, Str("'", name, "' is the name of an earlier mixer (rename one)")});
    }
  }
  if (model.layers().empty() || known.empty()) return;

  const std::string all = JoinNames({known.begin(), known.end()});
  const size_t before = problems.size();
  std::set<std::string> used;
  int64_t position = 0;
  for (const LayerRun& run : LayerRuns(model.layers())) {
    position += std::max<int64_t>(1, run.count);
    if (run.count < 1) {
      problems.push_back({"model.layers", Str("'", run.name,
                                              "*' is not followed by a count (use a "
                                              "whole number from 1 to 65536, as in ",
                                              run.name, "*12)")});
    }
    if (!used.insert(run.name).second || known.count(run.name) != 0) continue;
    problems.push_back(
        {"model.layers", Str("'", run.name, "' is no mixer (use the names of mixers: ", all, ")")});
  }
  if (position == 0) {
    problems.push_back({"model.layers", Str("names no mixer (use names out of ", all, ")")});
  }
  // A name that is wrong is likely meant for a mixer that then looks unused.
  if (position == 0 || problems.size() > before) return;
  if (position > model.num_layers()) {
    problems.push_back({"model.layers", Str("has ", position, " names for num_layers ",
                                            model.num_layers(), " (shorten it)")});
  }
  for (int i = 0; i < model.mixer_size(); ++i) {
    const std::string& name = model.mixer(i).name();
    if (!known.count(name) || used.count(name)) continue;
    problems.push_back({ElementPath("model.mixer", i),
                        Str("is not used by model.layers (name '", name, "' there or remove it)")});
  }
}

void CheckMoba(const MobaPattern& moba, const std::string& path, Problems& problems) {
  if (moba.block_size() % 64 != 0) {
    problems.push_back(
        {path + ".block_size", Str(moba.block_size(), " is not a multiple of 64 (use ",
                                   NearestMultiples(moba.block_size(), 64), ")")});
  }
}

// `wrong`: fields that are not in order by themselves.
void CheckMixer(const Config& config, int index, const std::set<std::string>& wrong,
                Problems& problems) {
  const Mixer& mixer = config.model().mixer(index);
  const Attention& attention = AttentionOf(mixer);
  const std::string path = Str(ElementPath("model.mixer", index), ".", NormalizationOf(mixer));
  const bool in_order = std::none_of(wrong.begin(), wrong.end(), [&](const std::string& field) {
    return field.compare(0, path.size(), path) == 0;
  });
  if (!in_order) return;
  CheckNormalization(mixer, path, problems);
  if (!wrong.contains("model.num_kv_heads")) {
    CheckPattern(attention, config.model().num_kv_heads(), path, problems);
  }
  if (attention.has_moba() && !mixer.has_sigmoid()) {
    CheckMoba(attention.moba(), path + ".moba", problems);
  }
}

void CheckSchedule(const Config& config, Problems& problems) {
  const Schedule& schedule = config.schedule();
  const int64_t steps = config.run().steps();
  const auto check_warmup = [&](const char* shape, int64_t warmup) {
    if (warmup < steps) return;
    problems.push_back({Str("schedule.", shape, ".warmup_steps"),
                        Str(warmup, " leaves no step after warm-up in run.steps ", steps,
                            " (use at most ", steps - 1, ")")});
  };
  if (schedule.has_cosine()) check_warmup("cosine", schedule.cosine().warmup_steps());
  if (schedule.has_constant()) check_warmup("constant", schedule.constant().warmup_steps());
  if (schedule.has_wsd()) {
    const WsdSchedule& wsd = schedule.wsd();
    const int64_t decay = DecaySteps(wsd, steps);
    if (wsd.warmup_steps() + decay > steps) {
      problems.push_back({"schedule.wsd.warmup_steps",
                          Str(wsd.warmup_steps(), " and ", decay,
                              " steps of decay are more than run.steps ", steps, " (use at most ",
                              std::max<int64_t>(0, steps - decay), ", or a shorter decay)")});
    }
  }
}

void CheckSavingAndEvaluation(const Config& config, Problems& problems) {
  const Checkpoint& checkpoint = config.checkpoint();
  if (checkpoint.keep_every() > 0) {
    if (checkpoint.every_steps() == 0) {
      problems.push_back({"checkpoint.keep_every",
                          "has no effect while every_steps is 0 (give every_steps, or use 0)"});
    } else if (checkpoint.keep_every() % checkpoint.every_steps() != 0) {
      problems.push_back(
          {"checkpoint.keep_every",
           Str(checkpoint.keep_every(), " is not a multiple of every_steps ",
               checkpoint.every_steps(), " (use ",
               NearestMultiples(checkpoint.keep_every(), checkpoint.every_steps()), ")")});
    }
  }
  if (config.evaluation().every_steps() > 0 && config.data().validation_size() == 0) {
    problems.push_back(
        {"evaluation.every_steps", "needs a validation dataset (give data.validation, or use 0)"});
  }
  for (int i = 0; i < config.data().validation_size(); ++i) {
    if (config.data().validation(i).weight() == 1) continue;
    problems.push_back({ElementPath("data.validation", i) + ".weight",
                        "has no effect, because validation reads its datasets in order (leave it "
                        "out)"});
  }
}

}  // namespace

std::vector<Problem> Validate(const Config& config) {
  Problems problems;
  CheckRules(config, "", problems);
  // A combination is checked only when each of its fields is in order by itself: otherwise it would
  // divide by zero, or complain twice about one mistake.
  std::set<std::string> wrong;
  for (const Problem& problem : problems) wrong.insert(problem.field);
  const auto good = [&](std::initializer_list<const char*> fields) {
    return std::none_of(fields.begin(), fields.end(),
                        [&](const char* field) { return wrong.count(field) != 0; });
  };
  const Model& model = config.model();
  if (good({"run.context_length", "run.micro_batch_rows", "run.global_batch_tokens", "parallel.dp",
            "parallel.cp"})) {
    CheckRun(config, problems);
  }
  if (good({"run.context_length"})) CheckAlignment(config, problems);
  CheckPacking(config, problems);
  if (good({"parallel.cp", "parallel.ulysses_ranks", "parallel.ranks_per_node"})) {
    CheckStrategy(config, problems);
  }
  if (good({"model.hidden_size", "model.num_heads", "model.num_kv_heads", "model.head_dim"})) {
    CheckHeads(config, problems);
  }
  if (good({"model.num_layers"})) CheckLayers(model, problems);
  for (int i = 0; i < model.mixer_size(); ++i) {
    CheckMixer(config, i, wrong, problems);
  }
  if (good({"run.steps", "schedule.cosine.warmup_steps", "schedule.constant.warmup_steps",
            "schedule.wsd.warmup_steps", "schedule.wsd.decay_steps",
            "schedule.wsd.decay_fraction"})) {
    CheckSchedule(config, problems);
  }
  CheckPrecision(config, problems);
  if (good({"parallel.dp", "parallel.cp", "parallel.zero_stage", "parallel.hybrid_shard"})) {
    CheckSharding(config, problems);
  }
  CheckSavingAndEvaluation(config, problems);
  if (good({"run.context_length"})) CheckObjective(config, problems);
  for (Problem& problem : problems) problem.field = DisplayPath(config, problem.field);
  return problems;
}

}  // namespace longspan::configs
