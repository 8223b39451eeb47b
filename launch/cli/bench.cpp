#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "launch/bench/attention_bench.h"
#include "launch/bench/cases.h"
#include "launch/bench/context_parallel_bench.h"
#include "launch/bench/gemm_bench.h"
#include "launch/bench/gpu_peaks.h"
#include "launch/bench/memory_bench.h"
#include "launch/bench/record.h"
#include "launch/cli/bench_context_parallel.h"
#include "launch/cli/bench_step.h"
#include "launch/cli/commands.h"
#include "ops/attention/attention.h"
#include "ops/core/cuda/backend.h"
#include "ops/core/machine.h"
#include "ops/gemm/gemm.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::launch {
namespace {

struct BenchArguments {
  std::string op;
  std::vector<std::string> problems;
  std::vector<std::string> sets;
  std::string filter, pass = "both", implementation, device = "cpu", trace_file;
  int threads = 0;
  double seconds = 0.5;
  int repeats = 5;
  bool json = false, long_list = false;
  ContextParallelArguments context_parallel;
};

constexpr double kSecondsPerPeak = 0.2;

// The names of the cases, as given by --problem or from the built-in list.
std::vector<std::string> NamesOf(const BenchArguments& a) {
  if (a.problems.empty()) {
    const char* list = a.long_list ? "_long" : a.device == "cuda" ? "_gpu" : "_default";
    return ReadProblemList(BuiltInProblems(a.op + list));
  }
  std::vector<std::string> names;
  for (const std::string& problem : a.problems) {
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(problem, ignored)) {
      names.push_back(problem);
      continue;
    }
    std::ifstream file(problem);
    std::stringstream text;
    text << file.rdbuf();
    if (!file) throw InvalidArgument("--problem " + problem + ": the file cannot be read");
    const auto list = ReadProblemList(text.str());
    if (list.empty()) throw InvalidArgument("--problem " + problem + ": the file names no case");
    names.insert(names.end(), list.begin(), list.end());
  }
  return names;
}

// Parses every name before anything is measured, and keeps those that --filter asks for.
template <class Case>
std::vector<Case> CasesOf(const BenchArguments& a, Case (*parse)(const std::string&)) {
  std::vector<Case> cases;
  for (const std::string& name : NamesOf(a)) {
    Case c = parse(name);
    if (name.find(a.filter) != std::string::npos) cases.push_back(std::move(c));
  }
  if (cases.empty()) {
    throw InvalidArgument("--filter " + a.filter + " leaves no case of " + a.op);
  }
  return cases;
}

MachinePeaks Measure(Context& ctx, double seconds) {
  return ctx.device().kind == DeviceKind::kCuda ? MeasureGpuPeaks(ctx) : MeasurePeaks(ctx, seconds);
}

// Another program at the start must not leave a low peak behind that every case then beats.
void RaisePeaks(Context& ctx, MachinePeaks& peaks) {
  const MachinePeaks now = Measure(ctx, kSecondsPerPeak / 4);
  peaks.f32_gflops = std::max(peaks.f32_gflops, now.f32_gflops);
  peaks.bf16_gflops = std::max(peaks.bf16_gflops, now.bf16_gflops);
  peaks.copy_gbps = std::max(peaks.copy_gbps, now.copy_gbps);
}

BenchOptions OptionsOf(const BenchArguments& a) {
  return {.implementation = a.implementation,
          .forward = a.pass != "backward",
          .backward = a.pass != "forward",
          .seconds = a.seconds,
          .repeats = a.repeats};
}

// The entries of the op's table that run here, for operands that the widest choice accepts; why the
// others do not.
struct Implementations {
  std::vector<std::string> here, elsewhere;
};
Implementations ImplementationsOf(const std::string& op, const Context& ctx) {
  Implementations result;
  const auto add = [&](const char* name, DeviceKind device, const std::string& reason) {
    if (device != ctx.device().kind) return;
    if (reason.empty()) {
      result.here.push_back(name);
    } else {
      result.elsewhere.push_back(Str(name, " (", reason, ")"));
    }
  };
  if (op == "attention" || op == "context_parallel" || op == "step") {
    for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
      add(entry.name, entry.device,
          entry.rejects({.dtype = DType::kBF16,
                         .heads = 1,
                         .kv_heads = 1,
                         .head_dim = 64,
                         .shared_bytes = ops::AttentionSharedBytes(ctx)}));
    }
  }
  if (op == "gemm" || op == "step") {
    for (const ops::GemmImplementation& entry : ops::GemmImplementations()) {
      add(entry.name, entry.device, entry.rejects({DType::kBF16, DType::kBF16}));
    }
  }
  return result;
}

std::string Joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// What every run says first.
void PrintMachine(const Context& ctx, const BenchArguments& a, const MachinePeaks& peaks) {
  const Implementations found = ImplementationsOf(a.op, ctx);
  if (a.json) {
    std::printf("%s\n", ToJsonLine(peaks, found.here).c_str());
    return;
  }
  std::printf("%s\n", ToText(peaks).c_str());
  if (!found.here.empty()) {
    std::printf("implementations here: %s\n", Joined(found.here).c_str());
  }
  if (!found.elsewhere.empty()) {
    std::printf("not here: %s\n", Joined(found.elsewhere).c_str());
  }
  std::printf("\n");
}

// Names of the cases of a group, which are timed together.
template <class Case>
const std::vector<Case>& Members(const std::vector<Case>& group) {
  return group;
}
template <class Case>
std::vector<Case> Members(const Case& single) {
  return {single};
}

template <class Group>
void RunGroups(Context& ctx, const BenchArguments& a, const std::vector<Group>& groups,
               std::vector<BenchRecord> (*bench)(Context&, const Group&, const BenchOptions&,
                                                 const MachinePeaks&)) {
  const BenchOptions options = OptionsOf(a);
  MachinePeaks peaks = Measure(ctx, kSecondsPerPeak);
  size_t width = 0;
  for (const Group& group : groups) {
    for (const auto& c : Members(group)) width = std::max(width, c.name.size());
  }
  const auto head = [&] {
    PrintMachine(ctx, a, peaks);
    if (!a.json) std::printf("%s\n", TableHead(width).c_str());
  };
  if (!a.json) head();
  size_t records = 0;
  for (const Group& group : groups) {
    RaisePeaks(ctx, peaks);
    for (const BenchRecord& r : bench(ctx, group, options, peaks)) {
      if (a.json && records == 0) head();  // output of a run that fails at once is empty
      std::printf("%s\n", (a.json ? ToJsonLine(r) : TableLine(r, width)).c_str());
      if (!a.json && !r.shares.empty()) std::printf("%s\n", SharesLine(r).c_str());
      ++records;
    }
    std::fflush(stdout);
  }
  if (records == 0) throw InvalidArgument("--pass " + a.pass + " leaves no case of " + a.op);
}

void RunSteps(Context& ctx, const BenchArguments& a) {
  std::vector<StepCase> cases;
  for (const std::string& file : a.problems) cases.push_back(ReadStepCase(file));
  if (cases.empty()) cases.push_back(ReadStepCase(""));
  const MachinePeaks peaks = Measure(ctx, kSecondsPerPeak);
  for (const StepCase& c : cases) {
    const BenchRecord r = BenchStep(ctx, c, a.sets, OptionsOf(a), peaks);
    if (&c == cases.data()) PrintMachine(ctx, a, peaks);
    if (a.json) {
      std::printf("%s\n", ToJsonLine(r).c_str());
    } else {
      std::printf("%s\n%s\n%s\n", TableHead(r.name.size()).c_str(),
                  TableLine(r, r.name.size()).c_str(), StepText(r).c_str());
    }
    std::fflush(stdout);
  }
}

void RunContextParallel(Context& ctx, const BenchArguments& a) {
  ContextParallelOptions options = ContextParallelOptionsOf(a.context_parallel);
  options.forward = a.pass != "backward";
  options.backward = a.pass != "forward";
  const std::vector<AttentionCase> cases = CasesOf(a, ParseAttentionCase);
  size_t width = 0;
  for (const AttentionCase& c : cases) width = std::max(width, c.name.size());
  PrintMachine(ctx, a, Measure(ctx, kSecondsPerPeak));
  if (!a.json) std::printf("%s\n", ContextParallelHead(width).c_str());
  for (const AttentionCase& c : cases) {
    BenchContextParallel(c, options, [&](const BenchRecord& r) {
      std::printf("%s\n", (a.json ? ToJsonLine(r) : ContextParallelLine(r, width)).c_str());
      std::fflush(stdout);
    });
  }
}

void RunMachine(Context& ctx, const BenchArguments& a) {
  const MachinePeaks peaks = Measure(ctx, a.seconds);
  std::printf("%s\n", (a.json ? ToJsonLine(peaks) : ToText(peaks)).c_str());
}

void RunOp(Context& ctx, const BenchArguments& a) {
  if (a.op == "attention") {
    RunGroups(ctx, a, GroupByShape(CasesOf(a, ParseAttentionCase)), BenchAttention);
  } else if (a.op == "gemm") {
    RunGroups(ctx, a, CasesOf(a, ParseGemmCase), BenchGemm);
  } else if (a.op == "memory") {
    RunGroups(ctx, a, CasesOf(a, ParseMemoryCase), BenchMemory);
  } else if (a.op == "step") {
    RunSteps(ctx, a);
  } else if (a.op == "context_parallel") {
    RunContextParallel(ctx, a);
  } else {
    RunMachine(ctx, a);
  }
}

void Bench(const BenchArguments& a) {
  ContextOptions options{.threads = a.threads};
  if (a.device == "cuda") {
    std::string why;
    if (cuda::DeviceCount(&why) == 0) {
      throw InvalidArgument("--device cuda cannot be used: " + why + "; use cpu");
    }
    options.device = {DeviceKind::kCuda, 0};
  }
  Context ctx(options);
  if (a.trace_file.empty()) return RunOp(ctx, a);
  // Before hours of measuring, so that a path that cannot be written is known.
  trainer::FileWriter file(a.trace_file, trainer::FileWriter::Mode::kTruncate);
  const auto recorder = std::make_shared<TraceRecorder>(0);
  ctx.trace().TimeDevice(true);
  ctx.trace().Record(recorder, "compute");
  RunOp(ctx, a);
  ctx.trace().WaitForDevice();
  file.Write(ChromeTrace({recorder->Events()}));
  file.Close();
}

// Refuses what would not be looked at.
void RefuseOptions(const CLI::App& command, const std::string& op) {
  const std::map<std::string, std::vector<const char*>> unused = {
      {"machine", {"--problem", "--filter", "--pass", "--impl", "--long", "--set", "--repeats"}},
      {"step", {"--filter", "--pass", "--impl", "--long"}},
      {"memory", {"--long", "--set"}},
      {"attention", {"--set"}},
      {"gemm", {"--set"}},
      {"context_parallel",
       {"--impl", "--threads", "--seconds", "--repeats", "--set", "--device", "--trace"}}};
  if (op != "context_parallel") {
    for (const char* option : ContextParallelArguments::Names()) {
      if (command.get_option(option)->count() > 0) {
        throw InvalidArgument(Str(option, " has no meaning for ", op, "; leave it out"));
      }
    }
  }
  for (const char* option : unused.at(op)) {
    if (command.get_option(option)->count() > 0) {
      throw InvalidArgument(Str(option, " has no meaning for ", op, "; leave it out"));
    }
  }
}

}  // namespace

void AddBenchCommand(CLI::App& root, int* exit_code) {
  auto a = std::make_shared<BenchArguments>();
  CLI::App* command =
      root.add_subcommand("bench", "Time kernels against what this machine can do at most");
  command
      ->add_option("op", a->op,
                   "attention, gemm, memory (ops that move more than they compute), step (a whole "
                   "training step), context_parallel (attention split over ranks on a simulated "
                   "network), or machine (the measured peaks alone)")
      ->required()
      ->check(
          CLI::IsMember({"attention", "gemm", "memory", "step", "context_parallel", "machine"}));
  command->add_option("--device", a->device, "cpu or cuda: the first GPU, by its own clock")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  CLI::Option* problem = command->add_option(
      "--problem", a->problems,
      "A case such as causal_f32_T4096_Hq8_Hkv4_D64 or gemm_bf16_M1024_N1024_K1024, or a file "
      "with one a line; for step a configuration; repeatable (default: a built-in list, for step "
      "the preset llama_1b_32k)");
  problem->allow_extra_args(false);
  command->add_option("--filter", a->filter, "Only cases whose name contains this");
  command->add_option("--pass", a->pass, "forward, backward or both")
      ->check(CLI::IsMember({"forward", "backward", "both"}));
  command->add_option("--impl", a->implementation,
                      "Only this implementation, or best: the one that training would use "
                      "(default: all that accept the case, without the reference; with --long: "
                      "best)");
  command->add_option("--threads", a->threads, "Host threads (0 = all cores)")
      ->check(CLI::Range(0, 4096));
  command
      ->add_option("--seconds", a->seconds,
                   "Time per measurement; at least --repeats runs are timed whatever it says")
      ->check(CLI::Range(0.0, 3600.0));
  command->add_option("--repeats", a->repeats, "Timed runs, at least (default 5)")
      ->check(CLI::Range(1, 1000000));
  command
      ->add_option("--set", a->sets, "With step: override a field of the configuration, repeatable")
      ->allow_extra_args(false);
  command->add_option("--trace", a->trace_file,
                      "Write a Chrome trace (chrome://tracing, Perfetto) of everything that runs");
  command->add_flag("--json", a->json, "Print one JSON object a line instead of a table");
  AddContextParallelOptions(*command, a->context_parallel);
  command->add_flag("--long", a->long_list, "The built-in list of large cases")->excludes(problem);
  command->callback([a, command, exit_code] {
    RefuseOptions(*command, a->op);
    if (a->long_list && a->implementation.empty()) a->implementation = kBest;
    Bench(*a);
    *exit_code = 0;
  });
}

}  // namespace longspan::launch
