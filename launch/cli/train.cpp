#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "configs/load.h"
#include "launch/cli/commands.h"
#include "launch/cli/rank_device.h"
#include "launch/cli/session.h"
#include "launch/cli/signals.h"
#include "ops/core/rng.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/faulty.h"
#include "parallel/mesh/device_mesh.h"
#include "trainer/agreement.h"
#include "trainer/from_config.h"
#include "trainer/loop.h"

namespace longspan::launch {
namespace {

struct TrainArguments {
  std::string config;
  std::vector<std::string> sets;
  trainer::RunSettings run;
  double max_minutes = 0;
  double lock_wait_seconds = 30;
  int local_ranks = 0;
  std::vector<std::string> faults;
  bool json = false;
};

void PrintStart(const trainer::TrainOptions& o, const TrainArguments& a, const RankDevice& device,
                int threads) {
  const double millions = static_cast<double>(trainer::CountParameters(o.model)) * 1e-6;
  const std::string trained =
      o.model.gates_only ? Str(" (", trainer::CountTrainedParameters(o.model), " of them trained)")
                         : "";
  std::printf(
      "longspan: %.2fM parameters%s, %s, context %lld, %lld tokens a step (%lld x %lld rows), "
      "dp %lld x cp %lld (%s, %s), %s, %d threads a rank, run directory %s\n",
      millions, trained.c_str(), ToString(o.model.compute),
      static_cast<long long>(o.context_length), static_cast<long long>(o.global_batch_tokens),
      static_cast<long long>(o.accumulation()), static_cast<long long>(o.dp * o.micro_batch_rows),
      static_cast<long long>(o.dp), static_cast<long long>(o.cp), ToString(o.placement),
      ToString(o.strategy.kind), device.name.c_str(), threads, a.run.run_directory.c_str());
  std::fflush(stdout);
}

void PrintSummary(const trainer::RunSummary& s, const TrainArguments& a,
                  const trainer::ObjectiveOptions& objective) {
  if (a.json) {
    nlohmann::json j = {{"step", s.step},
                        {"stopped", s.stopped},
                        {"objective", objective.name()},
                        {"loss", nullptr},
                        {"validation_loss", nullptr},
                        {"seconds", s.seconds},
                        {"tokens_per_s", nullptr},
                        {"skipped_steps", s.skipped_steps},
                        {"attention_share", nullptr},
                        {"wait_share", nullptr},
                        {"run_directory", a.run.run_directory.string()}};
    if (s.last_loss.has_value()) j["loss"] = *s.last_loss;
    if (s.tokens_per_s.has_value()) j["tokens_per_s"] = *s.tokens_per_s;
    if (s.attention_share.has_value()) j["attention_share"] = *s.attention_share;
    if (s.wait_share.has_value()) j["wait_share"] = *s.wait_share;
    if (s.validation_loss.has_value()) j["validation_loss"] = *s.validation_loss;
    std::printf("%s\n", j.dump().c_str());
    return;
  }
  if (!s.last_loss.has_value()) {
    std::printf("done: all %lld steps were done before\n", static_cast<long long>(s.step));
    return;
  }
  const bool next_token = objective.kind == trainer::ObjectiveKind::kNextToken;
  std::printf("%s at step %lld: ", s.stopped ? "stopped and saved" : "done",
              static_cast<long long>(s.step));
  if (next_token) {
    std::printf("loss %.4f", *s.last_loss);
  } else {
    std::printf("%s loss %.4g", objective.name(), *s.last_loss);
  }
  if (s.validation_loss.has_value()) std::printf(", validation loss %.4f", *s.validation_loss);
  if (next_token || s.validation_loss.has_value()) std::printf(" nats/token");
  std::printf("; %.0f tokens/s", s.tokens_per_s.value_or(0));
  if (s.attention_share.has_value() && s.wait_share.has_value()) {
    std::printf(", %.0f %% of the time in attention, %.0f %% waiting for other ranks",
                100 * *s.attention_share, 100 * *s.wait_share);
  }
  if (s.skipped_steps > 0) {
    std::printf("; %lld steps skipped", static_cast<long long>(s.skipped_steps));
  }
  std::printf("\n");
}

void Train(const Rank& rank, TrainArguments a) {
  std::vector<parallel::Fault> faults;
  for (const std::string& text : a.faults) {
    faults.push_back(parallel::ParseFault(text));
    if (faults.back().rank < rank.world.size()) continue;
    throw InvalidArgument(Str("--fault ", text, ": there is no rank ", faults.back().rank,
                              " in a job of ", rank.world.size(),
                              rank.world.size() == 1 ? " rank" : " ranks"));
  }
  const configs::LoadedConfig loaded = configs::Load(a.config, a.sets);
  // Before anything is built on it: ranks with other layouts would wait for each other for ever.
  trainer::RequireSame(rank.world, "the configuration", StreamOf(loaded.resolved_text().c_str()));
  const trainer::TrainOptions options = trainer::OptionsFromConfig(loaded, rank.world.size());
  if (a.run.run_directory.empty()) {
    a.run.run_directory = std::filesystem::path("runs") / std::filesystem::path(a.config).stem();
  }
  a.run.config_text = loaded.resolved_text();
  a.run.stop_requested = StopRequested;
  a.run.max_seconds = 60 * a.max_minutes;
  a.run.lock_wait = std::chrono::milliseconds(std::llround(1e3 * a.lock_wait_seconds));
  if (a.json) a.run.quiet = true;

  const RankDevice device = ChooseDevice(rank, options);
  Context ctx = MakeContext(rank, device, options);
  const auto carrier = MakeCarrier(rank, options, ctx);
  parallel::Communicator& carried = carrier != nullptr ? *carrier : rank.world;
  std::unique_ptr<parallel::FaultyCommunicator> faulty;
  if (!faults.empty()) faulty = std::make_unique<parallel::FaultyCommunicator>(carried, faults);
  parallel::CountingCommunicator world(faulty != nullptr ? *faulty : carried);
  world.SetTimeout(options.timeout_s);
  world.UseDevice(ctx.runtime());
  parallel::DeviceMesh mesh(world, {.dp = static_cast<int>(options.dp),
                                    .cp = static_cast<int>(options.cp),
                                    .node_ranks = NodeRanks(rank)});
  ctx.SetProgress([&] {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point begin = Clock::now();
    mesh.axis("cp").Progress();
    mesh.world().Progress();
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    // Most calls find nothing to do.
    if (seconds.count() > 1e-5) ctx.trace().Add(trainer::kProgressTime, seconds.count());
  });
  a.run.peak_flops = PeakFlops(ctx, world, device, options.model.compute);
  const bool root = world.rank() == 0;
  if (root && !a.run.quiet) PrintStart(options, a, device, ctx.threads());
  const trainer::RunSummary summary = trainer::RunTraining(ctx, mesh, world, options, a.run);
  if (root) PrintSummary(summary, a, options.objective);
}

}  // namespace

void AddTrainCommand(CLI::App& root, int* exit_code) {
  auto a = std::make_shared<TrainArguments>();
  CLI::App* command = root.add_subcommand(
      "train", "Pretrain or fine-tune; run it plainly or under launch/mpirun.sh");
  command->add_option("config", a->config, "Configuration in protobuf text format")->required();
  command
      ->add_option("--set", a->sets,
                   "Override a field: path.to.field=value, repeatable; "
                   "model.mixer[NAME].softmax.s2.stride_blocks=8 addresses a mixer by name")
      ->take_all()
      ->allow_extra_args(false);
  command->add_option("--run-dir", a->run.run_directory,
                      "Where checkpoints, metrics and logs go (default runs/<config name>)");
  command->add_option("--resume", a->run.resume,
                      "auto: continue the run directory if it has checkpoints (default); never: "
                      "refuse if it has; or a checkpoint's path or step number");
  command->add_option("--init-from", a->run.init_from,
                      "Start a new run from the weights of this checkpoint or run directory");
  command
      ->add_option("--max-minutes", a->max_minutes,
                   "Save, validate and end after this much time since the start (0 = no limit)")
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option("--lock-wait", a->lock_wait_seconds,
                   "Seconds to wait for another job to leave the run directory (default 30)")
      ->check(CLI::Range(0.0, 1e6));
  command
      ->add_option("--local-ranks", a->local_ranks,
                   "Run this many ranks as threads of one process, all on one device, instead of "
                   "under a launcher")
      ->check(CLI::Range(1, 1024));
  command->add_option("--trace", a->run.trace_file,
                      "Write a Chrome trace (chrome://tracing, Perfetto) of the first steps");
  command
      ->add_option("--trace-steps", a->run.trace_steps, "How many steps --trace covers (default 3)")
      ->check(CLI::Range(1, 10000))
      ->needs("--trace");
  command->add_flag("--json", a->json, "Print one JSON object at the end and no progress");
  command
      ->add_option("--checkpoint-bytes-per-second", a->run.checkpoint_bytes_per_second,
                   "Slow checkpoint writing down, to test interruptions (0 = full speed)")
      ->group("Testing");
  command
      ->add_option("--fault", a->faults,
                   "Let something fail, to test what happens: lose:RANK:OPERATION, "
                   "delay:RANK:OPERATION:SECONDS or throw:RANK:OPERATION, repeatable")
      ->allow_extra_args(false)
      ->group("Testing");
  command->callback([a, exit_code] {
    CatchStopSignals();  // before the start: a signal that comes early ends the run after one step
    *exit_code = RunRanks(a->local_ranks, [&](const Rank& rank) { Train(rank, *a); });
  });
}

}  // namespace longspan::launch
