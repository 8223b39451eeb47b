#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "configs/load.h"
#include "launch/cli/commands.h"
#include "launch/cli/rank_device.h"
#include "launch/cli/session.h"
#include "parallel/mesh/device_mesh.h"
#include "trainer/agreement.h"
#include "trainer/checkpoint/reader.h"
#include "trainer/eval/loss.h"
#include "trainer/from_config.h"
#include "trainer/run_directory/file_io.h"
#include "trainer/trainer.h"

namespace longspan::launch {
namespace {

struct EvalArguments {
  std::string target;
  std::vector<std::string> tasks = {"loss"};
  std::vector<int64_t> lengths;
  std::vector<std::string> data;
  std::vector<std::string> sets;
  int64_t rows = 0;
  int local_ranks = 0;
  std::string trace_file;
  bool json = false;
};

void CheckTasks(const EvalArguments& a) {
  for (const std::string& task : a.tasks) {
    if (task != "loss") {
      throw Unsupported("--tasks " + task + " is not built; this binary evaluates: loss");
    }
  }
}

// The options of one length: the checkpoint's own configuration, spread over all ranks of this job.
trainer::TrainOptions OptionsFor(const configs::LoadedConfig& loaded, const EvalArguments& a,
                                 int world_size, int64_t length) {
  trainer::TrainOptions o = trainer::OptionsFromConfig(loaded, world_size);
  if (length > 0) o.context_length = length;
  const std::string problem = parallel::Placement::Problem(o.placement, o.context_length, o.cp);
  if (!problem.empty()) throw ConfigError("--lengths: " + problem);
  if (!a.data.empty()) {
    o.validation.clear();
    for (const std::string& path : a.data) o.validation.push_back({path, 1});
  }
  if (o.validation.empty()) {
    throw ConfigError("there is no validation data: name a dataset with --data PREFIX");
  }
  return o;
}

// Writes what all ranks recorded.
void WriteTrace(parallel::Communicator& world, const TraceRecorder& recorder,
                const std::string& file) {
  const auto events = trainer::GatherStrings(world, recorder.Events());
  trainer::OnAllRanks(world, [&] {
    if (world.rank() == 0) trainer::WriteFileAtomically(file, ChromeTrace(events));
  });
}

void Eval(const Rank& rank, const EvalArguments& a) {
  CheckTasks(a);
  const auto path = trainer::AgreeOnCheckpoint(rank.world, a.target);
  const auto reader = trainer::CheckpointReader::Open(path);
  // One replica that all ranks share, unless --set says otherwise. What the training split its
  // ranks into need not divide these.
  std::vector<std::string> sets = {"parallel.dp=1",
                                   Str("parallel.cp=", rank.world.size()),
                                   "parallel.ulysses_ranks=0",
                                   "parallel.ranks_per_node=0",
                                   "parallel.hybrid_shard=0",
                                   "parallel.offload_optimizer=false"};
  sets.insert(sets.end(), a.sets.begin(), a.sets.end());
  auto loaded = configs::LoadText(reader.info().config_text, path.string(), sets);
  // What the training ran with may not exist here.
  constexpr std::string_view kChoice = "run.attention_implementation=";
  if (std::none_of(a.sets.begin(), a.sets.end(),
                   [&](const std::string& set) { return set.starts_with(kChoice); })) {
    loaded.config.mutable_run()->clear_attention_implementation();
  }

  std::shared_ptr<TraceRecorder> recorder;
  if (!a.trace_file.empty()) {
    rank.world.Barrier();
    recorder = std::make_shared<TraceRecorder>(rank.world.rank());
  }
  nlohmann::json results = nlohmann::json::array();
  for (int64_t length : a.lengths.empty() ? std::vector<int64_t>{0} : a.lengths) {
    const trainer::TrainOptions o = OptionsFor(loaded, a, rank.world.size(), length);
    const RankDevice device = ChooseDevice(rank, o);
    Context ctx = MakeContext(rank, device, o);
    const auto carrier = MakeCarrier(rank, o, ctx);
    parallel::Communicator& world = carrier != nullptr ? *carrier : rank.world;
    world.SetTimeout(o.timeout_s);
    world.UseDevice(ctx.runtime());
    parallel::DeviceMesh mesh(world, {.dp = static_cast<int>(o.dp),
                                      .cp = static_cast<int>(o.cp),
                                      .node_ranks = NodeRanks(rank)});
    ctx.SetProgress([&] { mesh.axis("cp").Progress(); });
    if (recorder != nullptr) {
      ctx.trace().TimeDevice(true);
      ctx.trace().Record(recorder, "compute");
    }
    const trainer::EvaluationLoss e = trainer::EvaluateCheckpoint(ctx, mesh, o, reader, a.rows);
    ctx.trace().WaitForDevice();
    if (rank.world.rank() != 0) continue;
    results.push_back({{"task", "loss"},
                       {"length", o.context_length},
                       {"step", reader.info().step},
                       {"value", e.loss},
                       {"valid_tokens", e.valid_tokens},
                       {"rows", e.rows}});
    if (!a.json) {
      std::printf(
          "loss at length %lld: %.6f nats/token over %lld tokens in %lld rows (step %lld)\n",
          static_cast<long long>(o.context_length), e.loss, static_cast<long long>(e.valid_tokens),
          static_cast<long long>(e.rows), static_cast<long long>(reader.info().step));
    }
  }
  if (recorder != nullptr) WriteTrace(rank.world, *recorder, a.trace_file);
  if (a.json && rank.world.rank() == 0) std::printf("%s\n", results.dump(2).c_str());
}

}  // namespace

void AddEvalCommand(CLI::App& root, int* exit_code) {
  auto a = std::make_shared<EvalArguments>();
  CLI::App* command = root.add_subcommand(
      "eval", "Evaluate a checkpoint; run it plainly or under launch/mpirun.sh");
  command->add_option("target", a->target, "Checkpoint or run directory (its newest checkpoint)")
      ->required();
  command->add_option("--tasks", a->tasks, "What to measure: loss")->delimiter(',');
  command
      ->add_option("--lengths", a->lengths,
                   "Context lengths in tokens (default: the one it was trained with)")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--data", a->data,
                   "Dataset prefix, repeatable (default: data.validation of the checkpoint)")
      ->allow_extra_args(false);
  command->add_option("--rows", a->rows, "Rows to use (0 = all)")->check(CLI::NonNegativeNumber);
  command->add_option("--set", a->sets, "Override a field of the checkpoint's configuration")
      ->allow_extra_args(false);
  command
      ->add_option("--local-ranks", a->local_ranks,
                   "Run this many ranks as threads of one process, all on one device")
      ->check(CLI::Range(1, 1024));
  command->add_option("--trace", a->trace_file,
                      "Write a Chrome trace (chrome://tracing, Perfetto) of the evaluation");
  command->add_flag("--json", a->json, "Print a JSON array");
  command->callback([a, exit_code] {
    *exit_code = RunRanks(a->local_ranks, [&](const Rank& rank) { Eval(rank, *a); });
  });
}

}  // namespace longspan::launch
