#include "launch/cli/bench_step.h"

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "configs/load.h"
#include "data/loader.h"
#include "launch/bench/cases.h"
#include "launch/bench/gpu_peaks.h"
#include "launch/picture/mask_facts.h"
#include "ops/core/rng.h"
#include "parallel/comm/self.h"
#include "parallel/mesh/device_mesh.h"
#include "trainer/batch.h"
#include "trainer/from_config.h"
#include "trainer/metrics/metrics.h"
#include "trainer/model/memory.h"
#include "trainer/run_directory/file_io.h"
#include "trainer/step.h"

namespace longspan::launch {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kWarmUp = 2;
constexpr double kLongWarmUp = 10;  // seconds, after which one step is enough
constexpr const char* kAttention = "context attention";

// The configuration on one rank with one micro-batch a step.
trainer::TrainOptions OptionsOf(const StepCase& problem, const std::vector<std::string>& sets,
                                const Context& ctx) {
  const bool cuda = ctx.device().kind == DeviceKind::kCuda;
  std::vector<std::string> all = {"parallel.dp=1", "parallel.cp=1", "parallel.hybrid_shard=0",
                                  Str("run.device=", cuda ? "CUDA" : "CPU")};
  all.insert(all.end(), sets.begin(), sets.end());
  trainer::TrainOptions o =
      trainer::OptionsFromConfig(configs::LoadText(problem.text, problem.origin, all), 1);
  o.global_batch_tokens = o.context_length * o.micro_batch_rows;
  LONGSPAN_CHECK((o.device == DeviceKind::kCuda) == cuda && o.dp == 1 && o.cp == 1)
      << "bench step runs one rank on the device of --device; leave those fields out of --set";
  return o;
}

// Rows of random tokens, each one document.
data::Row RandomRow(const trainer::TrainOptions& o, int64_t sample) {
  const Philox random(o.seed, StreamOf("bench tokens"));
  std::vector<int32_t> tokens(static_cast<size_t>(o.context_length) + 1);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const uint64_t index = static_cast<uint64_t>(sample) * tokens.size() + i;
    tokens[i] =
        static_cast<int32_t>(random.Below(index, static_cast<uint64_t>(o.model.vocab_size)));
  }
  return data::PackRow(tokens, {}, /*document_mask=*/false);
}

data::LoaderOptions LoaderFrom(const trainer::TrainOptions& o, trainer::BatchBuilder& builder) {
  data::LoaderOptions loader;
  loader.row = [&o](int64_t sample) { return RandomRow(o, sample); };
  loader.rows = o.micro_batch_rows;
  loader.sample_indices = [rows = o.micro_batch_rows](int64_t n) {
    std::vector<int64_t> samples;
    for (int64_t i = 0; i < rows; ++i) samples.push_back(n * rows + i);
    return samples;
  };
  loader.attach = [&builder](const data::MicroBatch& batch) -> std::shared_ptr<void> {
    return builder.Build(batch);
  };
  return loader;
}

// Means over the layers.
void AddFractions(const trainer::TrainOptions& o, BenchRecord& r) {
  double visible = 0, blocks = 0;
  for (const int layer : o.model.layers) {
    const trainer::MixerOptions& mixer = o.model.mixers[static_cast<size_t>(layer)];
    const int64_t kv_heads = o.model.num_kv_heads;
    const MaskFacts facts = mixer.moba
                                ? FactsOf(*WholeRowPlan(*mixer.moba, kv_heads, o.context_length))
                                : FactsOf(*WholeRowMask(mixer.pattern, kv_heads, o.context_length));
    visible += facts.visible_fraction;
    blocks += facts.block_fraction;
  }
  r.visible_fraction = visible / static_cast<double>(o.model.num_layers());
  r.block_fraction = blocks / static_cast<double>(o.model.num_layers());
}

}  // namespace

StepCase ReadStepCase(const std::string& file) {
  constexpr const char* kPreset = "llama_1b_32k";
  if (file.empty()) return {kPreset, std::string(BuiltInProblems(kPreset)), kPreset};
  try {
    return {std::filesystem::path(file).stem().string(), trainer::ReadFile(file), file};
  } catch (const CheckpointError& e) {
    throw ConfigError(Str("--problem ", file, ": ", e.what()));
  }
}

BenchRecord BenchStep(Context& ctx, const StepCase& problem, const std::vector<std::string>& sets,
                      const BenchOptions& options, const MachinePeaks& peaks) {
  trainer::TrainOptions o = OptionsOf(problem, sets, ctx);
  o.steps = int64_t{1} << 40;  // the schedule does not end here
  parallel::SelfCommunicator self;
  self.UseDevice(ctx.runtime());
  parallel::DeviceMesh mesh(self, {.dp = 1, .cp = 1});
  parallel::ShardGroups groups(self, o.hybrid_shard);
  trainer::ParameterStore store(ctx, o.model,
                                trainer::StoreOptions{.zero_stage = o.zero_stage,
                                                      .groups = &groups,
                                                      .offload_optimizer = o.offload_optimizer});
  store.Initialize(o.seed);
  trainer::BatchBuilder builder(o.model, o.context_layout(1), 0);
  trainer::TrainStep train(ctx, mesh, o, store);
  data::Loader loader(LoaderFrom(o, builder));

  const auto attention_seconds = [&] { return ctx.trace().Totals()[kAttention]; };
  // As in a run: a step is asked for its result when the next one has been issued. On a CPU it has
  // been computed by then, on a GPU it may still be running.
  std::vector<double> milliseconds, attention;
  trainer::StepResult last;
  double first_loss = 0;
  int64_t timed_from = kWarmUp;  // steps before this one are not timed
  const auto start = Clock::now();
  std::optional<trainer::PendingStep> pending;
  Clock::time_point timing_start = start;
  const auto seconds_since = [](Clock::time_point time) {
    return std::chrono::duration<double>(Clock::now() - time).count();
  };
  const auto enough = [&] {
    return static_cast<int>(milliseconds.size()) >= options.repeats &&
           seconds_since(timing_start) >= options.seconds;
  };
  for (int64_t step = 0; !enough(); ++step) {
    if (step == 1 && seconds_since(start) > kLongWarmUp) timed_from = 1;
    if (step == timed_from) timing_start = Clock::now();
    const double attention_before = attention_seconds();
    trainer::PendingStep next = train.Begin(loader, step, nullptr);
    if (step >= timed_from) attention.push_back((attention_seconds() - attention_before) * 1e3);
    if (pending.has_value()) {
      last = train.Finish(std::move(*pending));
      if (last.step == 1) first_loss = last.loss;
      if (last.step > timed_from) milliseconds.push_back(last.seconds * 1e3);
    }
    pending = std::move(next);
  }
  attention.resize(milliseconds.size());  // without the step that is not timed
  train.Finish(std::move(*pending));

  BenchRecord r;
  r.op = "step";
  r.name = Str(problem.name, "_T", o.context_length);
  r.pass = "both";
  r.implementation = ToString(o.model.compute);
  r.device = peaks.device;
  r.threads = peaks.threads;
  r.timing = Summarize(std::move(milliseconds));
  r.flops = last.flops;
  r.peak_gflops = PeakGflops(peaks, o.model.compute);
  r.peak_gbps = peaks.copy_gbps;
  const auto known = KnownGpu(peaks.name);
  const double stated =
      known.has_value() ? (o.model.compute == DType::kBF16 ? known->bf16_gflops : known->f32_gflops)
                        : r.peak_gflops;
  r.tokens_per_s = static_cast<double>(last.tokens) / r.timing.median_ms * 1e3;
  r.mfu = r.gflops() / stated;
  AddFractions(o, r);
  r.more.emplace_back("parameters", static_cast<double>(trainer::CountParameters(o.model)));
  r.more.emplace_back("first_loss", first_loss);
  if (ctx.device().kind == DeviceKind::kCpu) {
    r.more.emplace_back("attention_ms", Summarize(std::move(attention)).median_ms);
  }
  r.more.emplace_back("recompute", o.model.keep_attention ? 2 : o.model.recompute_layers ? 1 : 0);
  r.more.emplace_back("peak_bytes", static_cast<double>(ctx.allocator().peak_bytes()));
  const auto forecast = trainer::ForecastStepMemory(
      o.model, o.context_length * o.micro_batch_rows, ctx.device().kind, o.micro_batch_rows,
      {.zero_stage = o.zero_stage, .offload_optimizer = o.offload_optimizer});
  if (forecast) r.more.emplace_back("predicted_bytes", static_cast<double>(forecast->bytes));
  r.more.emplace_back("largest_tensor_bytes", static_cast<double>(ctx.allocator().largest_bytes()));
  r.more.emplace_back("peak_rss_bytes", static_cast<double>(trainer::PeakRssBytes()));
  return r;
}

std::string StepText(const BenchRecord& r) {
  char text[128];
  std::snprintf(text, sizeof text, "%.0f tokens/s, MFU %.1f %%", r.tokens_per_s.value_or(0),
                100 * r.mfu.value_or(0));
  std::string lines = text;
  for (const auto& [key, value] : r.more) {
    std::snprintf(text, sizeof text, "\n%-20s %.8g", key.c_str(), value);
    lines += text;
  }
  return lines;
}

}  // namespace longspan::launch
