#include "launch/cli/prepare.h"

#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>

#include "data/prepare.h"
#include "launch/cli/signals.h"
#include "ops/core/error.h"

namespace longspan::launch {
namespace {

// Seconds between two progress lines where they cannot replace each other.
constexpr double kPlainLineSeconds = 10;

struct PrepareArguments {
  data::PrepareOptions options;
  bool json = false;
};

long long Wide(int64_t value) { return static_cast<long long>(value); }

// One line that replaces itself on a terminal, plain lines now and then elsewhere.
class ProgressLine {
 public:
  void Show(const data::PrepareProgress& now) {
    if (StopRequested()) throw Error("prepare was interrupted; no output was written");
    if (!terminal_ && now.seconds - shown_seconds_ < kPlainLineSeconds) return;
    shown_seconds_ = now.seconds;
    const double mb = static_cast<double>(now.bytes) / 1e6;
    const double total_mb = static_cast<double>(now.total_bytes) / 1e6;
    std::fprintf(stderr, "%sprepare: %.1f of %.1f MB, %lld documents, %lld tokens, %.1f MB/s%s",
                 terminal_ ? "\r\033[K" : "", mb, total_mb, Wide(now.documents), Wide(now.tokens),
                 now.seconds > 0 ? mb / now.seconds : 0.0, terminal_ ? "" : "\n");
    open_ = terminal_;
  }
  ~ProgressLine() {
    if (open_) std::fputc('\n', stderr);
  }

 private:
  const bool terminal_ = ::isatty(STDERR_FILENO) != 0;
  double shown_seconds_ = 0;
  bool open_ = false;  // the cursor stands behind a line without its end
};

void PrintCount(int64_t count, const char* what) {
  if (count > 0) std::printf("  %lld %s\n", Wide(count), what);
}

void PrintSummary(const data::PrepareResult& result) {
  const double mb = static_cast<double>(result.bytes) / 1e6;
  std::printf("read %lld files, %.1f MB in %.1f s (%.1f MB/s)\n", Wide(result.files), mb,
              result.seconds, result.seconds > 0 ? mb / result.seconds : 0.0);
  PrintCount(result.skipped_binary, "binary documents skipped");
  PrintCount(result.skipped_invalid_utf8, "documents skipped because they are not UTF-8");
  PrintCount(result.skipped_empty, "empty documents skipped");
  PrintCount(result.excluded, "files left out by --include");
  PrintCount(result.hidden, "hidden files and folders left out");
  PrintCount(result.repeated, "files reached twice and taken once");
  PrintCount(result.unusable, "broken links and special files left out");
  for (const data::PreparedDataset& dataset : result.datasets) {
    const data::Sidecar& info = dataset.info;
    std::printf("%s: %lld documents, %lld tokens, largest id %lld, tokenizer %s (%d ids), %s\n",
                dataset.prefix.c_str(), Wide(info.documents), Wide(info.tokens),
                Wide(info.max_token_id), info.tokenizer.c_str(), info.vocab_size,
                data::HexString(info.fingerprint).c_str());
  }
}

void RunPrepare(const PrepareArguments& arguments) {
  CatchStopSignals();
  data::PrepareResult result;
  {
    ProgressLine line;
    result =
        data::Prepare(arguments.options, [&](const data::PrepareProgress& now) { line.Show(now); });
  }
  if (arguments.json) {
    std::fputs(data::ToJson(result).c_str(), stdout);
  } else {
    PrintSummary(result);
  }
}

}  // namespace

void AddPrepareCommand(CLI::App& root, int* exit_code) {
  auto arguments = std::make_shared<PrepareArguments>();
  data::PrepareOptions& o = arguments->options;
  CLI::App* command = root.add_subcommand(
      "prepare", "Turn text files, folders and .jsonl files into datasets of tokens.");
  command
      ->add_option("inputs", o.inputs,
                   "Text files (one document each), folders (searched recursively, hidden entries "
                   "left out) and .jsonl files (one document a line)")
      ->required()
      ->type_name("INPUT");
  command->add_option("--tokenizer", o.tokenizer, "byte, or a tokenizer file (not supported yet)")
      ->capture_default_str()
      ->type_name("byte|FILE");
  command
      ->add_option("--out", o.out,
                   "Prefix P of the output: P.bin, P.idx and P.json, or with "
                   "--validation-fraction P/train.* and P/validation.*")
      ->required()
      ->type_name("P");
  command
      ->add_option(
          "--validation-fraction", o.validation_fraction,
          "Share of the documents that go to P/validation, 0 <= F < 1; 0 writes one dataset")
      ->capture_default_str()
      ->type_name("F");
  command
      ->add_option(
          "--include", o.include,
          "Take only files in folders that fit this shell pattern (quote it): compared with "
          "the name, or with the path below the input if it has a /; may be repeated")
      ->allow_extra_args(false)
      ->type_name("GLOB");
  command->add_option("--field", o.field, "Field of a .jsonl line that holds the text")
      ->capture_default_str()
      ->type_name("NAME");
  command->add_option("--threads", o.threads, "Worker threads; 0 takes one for each core")
      ->capture_default_str()
      ->type_name("N");
  command
      ->add_option("--seed", o.seed,
                   "Chooses which documents go to validation; the same seed chooses the same ones")
      ->capture_default_str()
      ->type_name("N");
  command->add_flag("--overwrite", o.overwrite, "Replace an existing output");
  command->add_flag("--json", arguments->json, "Print the summary as JSON");
  command->callback([arguments, exit_code] {
    RunPrepare(*arguments);
    *exit_code = 0;
  });
}

}  // namespace longspan::launch
