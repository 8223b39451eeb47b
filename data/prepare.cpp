#include "data/prepare.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "data/encode_pool.h"
#include "data/index_writer.h"
#include "data/text_source.h"
#include "ops/core/error.h"
#include "ops/core/parallel_for.h"

namespace longspan::data {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr double kProgressSeconds = 0.2;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void CheckOptions(const PrepareOptions& options) {
  if (options.inputs.empty()) throw InvalidArgument("prepare needs at least one input");
  if (options.out.empty() || options.out.ends_with('/')) {
    throw InvalidArgument(Str("--out ", options.out, ": give a path prefix that ends in a name"));
  }
  if (!(options.validation_fraction >= 0 && options.validation_fraction < 1)) {
    throw InvalidArgument(Str("--validation-fraction ", options.validation_fraction,
                              " must be at least 0 and less than 1"));
  }
  if (options.threads < 0) {
    throw InvalidArgument(Str("--threads ", options.threads, " must not be negative"));
  }
  if (options.unit_bytes < 1) throw InvalidArgument("unit_bytes must be positive");
}

std::vector<std::string> OutputPrefixes(const PrepareOptions& options) {
  if (options.validation_fraction == 0) return {options.out};
  return {options.out + "/train", options.out + "/validation"};
}

std::vector<std::string> OutputFiles(const std::vector<std::string>& prefixes) {
  std::vector<std::string> files;
  for (const std::string& prefix : prefixes) {
    for (const char* suffix : {".bin", ".idx", ".json"}) files.push_back(prefix + suffix);
  }
  return files;
}

// Creates a folder with its parents and takes away again what it created, unless told to keep it.
class NewFolder {
 public:
  explicit NewFolder(const fs::path& folder) {
    std::error_code error;
    for (fs::path p = folder; !p.empty() && !fs::exists(p, error); p = p.parent_path()) {
      created_.push_back(p);
    }
    error.clear();
    if (!folder.empty()) fs::create_directories(folder, error);
    if (error || (!folder.empty() && !fs::is_directory(folder, error))) {
      Remove();
      throw DataError(Str("cannot create folder ", folder.string(),
                          " for --out: ", error ? error.message() : "a file of that name exists"));
    }
  }
  ~NewFolder() {
    if (!keep_) Remove();
  }
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;
  void Keep() { keep_ = true; }

 private:
  void Remove() {
    std::error_code ignored;  // someone else's files may lie there by now
    for (const fs::path& p : created_) fs::remove(p, ignored);
  }

  std::vector<fs::path> created_;  // innermost first
  bool keep_ = false;
};

// One output dataset while it is being written.
struct Output {
  Output(const std::string& prefix_in, TokenDType dtype)
      : prefix(prefix_in), writer(prefix_in, dtype) {}
  std::string prefix;
  IndexWriter writer;
  int64_t max_token_id = -1;
};

// One pass over the input. `threshold`: documents with a smaller hash go to the second output.
class Pass {
 public:
  Pass(const std::vector<std::string>& prefixes, TokenDType dtype, uint64_t threshold)
      : threshold_(threshold) {
    for (const std::string& prefix : prefixes) {
      outputs_.push_back(std::make_unique<Output>(prefix, dtype));
    }
  }

  void Add(const EncodedUnit& unit) {
    size_t at = 0;
    result.skipped_empty += unit.empty_documents;
    for (const DocumentPart& part : unit.parts) {
      const auto size = static_cast<size_t>(part.packed_bytes);
      AddPart(part, {unit.packed.data() + at, size});
      at += size;
      if (bad_kind_ && unit.rejected) *unit.rejected = true;
      if (part.last) EndDocument(part);
    }
  }

  int64_t documents() const { return Total(&IndexWriter::num_documents); }
  int64_t tokens() const { return Total(&IndexWriter::num_tokens); }
  std::vector<std::unique_ptr<Output>>& outputs() { return outputs_; }
  uint64_t min_hash() const { return min_hash_; }
  uint64_t max_hash() const { return max_hash_; }

  PrepareResult result;

 private:
  Output& OutputOf(const DocumentPart& part) {
    return *outputs_[outputs_.size() > 1 && part.hash < threshold_ ? 1 : 0];
  }

  void AddPart(const DocumentPart& part, std::span<const uint8_t> packed) {
    if (bad_kind_) return;
    if (part.kind != TextKind::kText) {
      bad_kind_ = part.kind;
      return;
    }
    OutputOf(part).writer.AppendPacked(packed);
    max_token_id_ = std::max(max_token_id_, part.max_token_id);
  }

  void EndDocument(const DocumentPart& part) {
    Output& output = OutputOf(part);
    if (bad_kind_) {
      output.writer.DropDocument();
      ++(*bad_kind_ == TextKind::kBinary ? result.skipped_binary : result.skipped_invalid_utf8);
    } else {
      output.writer.EndDocument();
      output.max_token_id = std::max(output.max_token_id, max_token_id_);
      min_hash_ = std::min(min_hash_, part.hash);
      max_hash_ = std::max(max_hash_, part.hash);
    }
    bad_kind_.reset();
    max_token_id_ = -1;
  }

  int64_t Total(int64_t (IndexWriter::*count)() const) const {
    int64_t sum = 0;
    for (const auto& output : outputs_) sum += (output->writer.*count)();
    return sum;
  }

  uint64_t threshold_;
  std::vector<std::unique_ptr<Output>> outputs_;
  std::optional<TextKind> bad_kind_;  // of the current document
  int64_t max_token_id_ = -1;         // of the current document
  uint64_t min_hash_ = std::numeric_limits<uint64_t>::max(), max_hash_ = 0;
};

class Preparation {
 public:
  Preparation(const PrepareOptions& options, const Tokenizer& tokenizer, const ProgressFn& progress)
      : options_(options),
        tokenizer_(tokenizer),
        progress_(progress),
        prefixes_(OutputPrefixes(options)) {}

  PrepareResult Run() {
    CheckOptions(options_);
    CheckOutputs();
    const std::vector<std::string> own = OutputFiles(prefixes_);
    inputs_ = ListTextFiles(options_.inputs, options_.include, own);
    NewFolder folder(fs::path(prefixes_.front()).parent_path());
    auto threshold = static_cast<uint64_t>(std::ldexp(options_.validation_fraction, 64));
    std::unique_ptr<Pass> pass = RunPass(threshold);
    if (prefixes_.size() > 1) {
      // Only a small corpus can have an empty side: read it once more with the border moved just
      // past the outermost document.
      const bool no_validation = pass->outputs()[1]->writer.num_documents() == 0;
      if (no_validation || pass->outputs()[0]->writer.num_documents() == 0) {
        threshold = no_validation ? pass->min_hash() + 1 : pass->max_hash();
        pass.reset();  // makes room on the disk
        pass = RunPass(threshold);
      }
    }
    PrepareResult result = Finish(*pass);
    folder.Keep();
    return result;
  }

 private:
  void CheckOutputs() const {
    if (options_.overwrite) return;
    for (const std::string& file : OutputFiles(prefixes_)) {
      std::error_code unreadable;  // then creating the file will say why
      if (fs::exists(file, unreadable)) {
        throw DataError(Str(file, " exists; choose another --out or allow --overwrite"));
      }
    }
  }

  std::unique_ptr<Pass> RunPass(uint64_t threshold) {
    const TokenDType dtype = TokenDTypeForVocabulary(tokenizer_.vocab_size());
    auto pass = std::make_unique<Pass>(prefixes_, dtype, threshold);
    PrepareProgress now;
    for (const TextFile& file : inputs_.files) now.total_bytes += file.bytes;
    const EncodeOptions encode{inputs_.files, tokenizer_, dtype, options_.field, options_.seed};
    EncodePool pool(encode, options_.unit_bytes,
                    options_.threads > 0 ? options_.threads : AvailableCores());
    double reported = 0;
    const auto report = [&] {
      now.documents = pass->documents();
      now.tokens = pass->tokens();
      now.seconds = reported = SecondsSince(start_);
      if (progress_) progress_(now);
    };
    while (const std::optional<EncodedUnit> unit = pool.Next()) {
      pass->Add(*unit);
      now.bytes += unit->bytes_read;
      if (SecondsSince(start_) - reported > kProgressSeconds) report();
    }
    report();
    pass->result.bytes = now.bytes;
    CheckDocuments(*pass);
    return pass;
  }

  void CheckDocuments(Pass& pass) const {
    const PrepareResult& r = pass.result;
    const int64_t documents = pass.documents(), needed = prefixes_.size() > 1 ? 2 : 1;
    if (documents >= needed && (needed == 1 || pass.min_hash() < pass.max_hash())) return;
    throw DataError(Str(
        "the input ", options_.inputs.front(),
        options_.inputs.size() > 1 ? " and the other inputs hold " : " holds ", documents,
        documents >= 2 ? " equal" : "", " document(s) of text (", r.skipped_binary, " binary, ",
        r.skipped_invalid_utf8, " not UTF-8 and ", r.skipped_empty, " empty ones skipped)",
        needed == 2 ? "; --validation-fraction needs two different ones" : "; give at least one"));
  }

  PrepareResult Finish(Pass& pass) {
    PrepareResult result = pass.result;
    for (const auto& output : pass.outputs()) {
      output->writer.Finish();
      // Reading it back checks the files with the code that will train on them.
      const IndexedDataset dataset(output->writer.temporary_prefix());
      PreparedDataset prepared;
      prepared.prefix = output->prefix;
      prepared.info = {.tokenizer = tokenizer_.name(),
                       .vocab_size = tokenizer_.vocab_size(),
                       .eot_id = tokenizer_.eot_id(),
                       .documents = dataset.num_documents(),
                       .tokens = dataset.num_tokens(),
                       .max_token_id = output->max_token_id,
                       .fingerprint = dataset.Fingerprint(),
                       .bin_xxh3 = output->writer.tokens_hash()};
      result.datasets.push_back(std::move(prepared));
    }
    for (size_t i = 0; i < result.datasets.size(); ++i) {
      pass.outputs()[i]->writer.Stage(ToJson(result.datasets[i].info));
    }
    for (const auto& output : pass.outputs()) output->writer.Publish();
    result.files = static_cast<int64_t>(inputs_.files.size());
    result.excluded = inputs_.excluded;
    result.hidden = inputs_.hidden;
    result.repeated = inputs_.repeated;
    result.unusable = inputs_.unusable;
    result.seconds = SecondsSince(start_);
    return result;
  }

  const PrepareOptions& options_;
  const Tokenizer& tokenizer_;
  const ProgressFn& progress_;
  const std::vector<std::string> prefixes_;
  const Clock::time_point start_ = Clock::now();
  TextInputs inputs_;
};

}  // namespace

PrepareResult PrepareWith(const PrepareOptions& options, const Tokenizer& tokenizer,
                          const ProgressFn& progress) {
  return Preparation(options, tokenizer, progress).Run();
}

PrepareResult Prepare(const PrepareOptions& options, const ProgressFn& progress) {
  return PrepareWith(options, *MakeTokenizer(options.tokenizer), progress);
}

std::string ToJson(const PrepareResult& result) {
  using Json = nlohmann::ordered_json;
  Json datasets = Json::array();
  for (const PreparedDataset& dataset : result.datasets) {
    Json entry = {{"prefix", dataset.prefix}};
    entry.update(Json::parse(ToJson(dataset.info)));
    datasets.push_back(std::move(entry));
  }
  const double mb = static_cast<double>(result.bytes) / 1e6;
  const Json json = {{"datasets", std::move(datasets)},
                     {"files", result.files},
                     {"bytes", result.bytes},
                     {"skipped_binary", result.skipped_binary},
                     {"skipped_invalid_utf8", result.skipped_invalid_utf8},
                     {"skipped_empty", result.skipped_empty},
                     {"excluded", result.excluded},
                     {"hidden", result.hidden},
                     {"repeated", result.repeated},
                     {"unusable", result.unusable},
                     {"seconds", result.seconds},
                     {"mb_per_s", result.seconds > 0 ? mb / result.seconds : 0}};
  return json.dump(2) + "\n";
}

}  // namespace longspan::data
