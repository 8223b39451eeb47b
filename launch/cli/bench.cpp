#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "launch/bench/attention_bench.h"
#include "launch/bench/cases.h"
#include "launch/bench/gemm_bench.h"
#include "launch/bench/record.h"
#include "launch/cli/commands.h"
#include "ops/core/machine.h"

namespace longspan::launch {
namespace {

struct BenchArguments {
  std::string op;
  std::vector<std::string> problems;
  std::string filter, pass = "both", implementation;
  int threads = 0;
  double seconds = 0.5;
  bool json = false, long_list = false;
};

constexpr double kSecondsPerPeak = 0.2;

// The names of the cases, as given by --problem or from the built-in list.
std::vector<std::string> NamesOf(const BenchArguments& a) {
  if (a.problems.empty()) {
    return ReadProblemList(BuiltInProblems(a.op + (a.long_list ? "_long" : "_default")));
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

// Another program at the start must not leave a low peak behind that every case then beats.
void RaisePeaks(Context& ctx, MachinePeaks& peaks) {
  const MachinePeaks now = MeasurePeaks(ctx, kSecondsPerPeak / 4);
  peaks.f32_gflops = std::max(peaks.f32_gflops, now.f32_gflops);
  peaks.bf16_gflops = std::max(peaks.bf16_gflops, now.bf16_gflops);
  peaks.copy_gbps = std::max(peaks.copy_gbps, now.copy_gbps);
}

template <class Case>
void RunCases(Context& ctx, const BenchArguments& a, const std::vector<Case>& cases,
              std::vector<BenchRecord> (*bench)(Context&, const Case&, const BenchOptions&,
                                                const MachinePeaks&)) {
  const BenchOptions options{.implementation = a.implementation,
                             .forward = a.pass != "backward",
                             .backward = a.pass != "forward",
                             .seconds = a.seconds};
  MachinePeaks peaks = MeasurePeaks(ctx, kSecondsPerPeak);
  size_t width = 0;
  for (const Case& c : cases) width = std::max(width, c.name.size());
  if (!a.json) std::printf("%s\n\n%s\n", ToText(peaks).c_str(), TableHead(width).c_str());
  size_t records = 0;
  for (const Case& c : cases) {
    RaisePeaks(ctx, peaks);
    for (const BenchRecord& r : bench(ctx, c, options, peaks)) {
      std::printf("%s\n", (a.json ? ToJsonLine(r) : TableLine(r, width)).c_str());
      ++records;
    }
    std::fflush(stdout);
  }
  if (records == 0) throw InvalidArgument("--pass " + a.pass + " leaves no case of " + a.op);
}

void RunMachine(Context& ctx, const BenchArguments& a) {
  const MachinePeaks peaks = MeasurePeaks(ctx, a.seconds);
  std::printf("%s\n", (a.json ? ToJsonLine(peaks) : ToText(peaks)).c_str());
}

void Bench(const BenchArguments& a) {
  Context ctx(ContextOptions{.threads = a.threads});
  if (a.op == "attention") {
    RunCases(ctx, a, CasesOf(a, ParseAttentionCase), BenchAttention);
  } else if (a.op == "gemm") {
    RunCases(ctx, a, CasesOf(a, ParseGemmCase), BenchGemm);
  } else {
    RunMachine(ctx, a);
  }
}

// A case and its passes mean nothing to `bench machine`.
void RefuseCaseOptions(const CLI::App& command) {
  for (const char* option : {"--problem", "--filter", "--pass", "--impl", "--long"}) {
    if (command.get_option(option)->count() > 0) {
      throw InvalidArgument(std::string(option) +
                            " has no meaning for machine, which has no cases; leave it out");
    }
  }
}

}  // namespace

void AddBenchCommand(CLI::App& root, int* exit_code) {
  auto a = std::make_shared<BenchArguments>();
  CLI::App* command =
      root.add_subcommand("bench", "Time kernels against what this machine can do at most");
  command->add_option("op", a->op, "attention, gemm, or machine (the measured peaks alone)")
      ->required()
      ->check(CLI::IsMember({"attention", "gemm", "machine"}));
  CLI::Option* problem = command->add_option(
      "--problem", a->problems,
      "A case such as causal_f32_T4096_Hq8_Hkv4_D64 or gemm_bf16_M1024_N1024_K1024, or a file "
      "with one a line; repeatable (default: a built-in list)");
  problem->allow_extra_args(false);
  command->add_option("--filter", a->filter, "Only cases whose name contains this");
  command->add_option("--pass", a->pass, "forward, backward or both")
      ->check(CLI::IsMember({"forward", "backward", "both"}));
  command->add_option("--impl", a->implementation,
                      "Only this implementation (default: all that accept the case, without the "
                      "reference)");
  command->add_option("--threads", a->threads, "Host threads (0 = all cores)")
      ->check(CLI::Range(0, 4096));
  command
      ->add_option("--seconds", a->seconds,
                   "Time per measurement; at least 5 runs are timed whatever it says")
      ->check(CLI::Range(0.0, 3600.0));
  command->add_flag("--json", a->json, "Print one JSON object a line instead of a table");
  command->add_flag("--long", a->long_list, "The built-in list of large cases")->excludes(problem);
  command->callback([a, command, exit_code] {
    if (a->op == "machine") RefuseCaseOptions(*command);
    Bench(*a);
    *exit_code = 0;
  });
}

}  // namespace longspan::launch
