#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/sidecar.h"
#include "data/tokenizer.h"

namespace longspan::data {

struct PrepareOptions {
  std::vector<std::string> inputs;   // files, folders, .jsonl files
  std::vector<std::string> include;  // shell patterns, see ListTextFiles
  std::string field = "text";        // of .jsonl lines
  std::string tokenizer = "byte";
  std::string out;                 // prefix P
  double validation_fraction = 0;  // 0: one dataset P; in (0, 1): P/train and P/validation
  uint64_t seed = 1;               // of the split
  int threads = 0;                 // workers; 0: one per available core
  bool overwrite = false;
  int64_t unit_bytes = 1 << 20;  // size of a worker's task; the output does not depend on it
};

struct PrepareProgress {
  int64_t bytes = 0, total_bytes = 0;  // of input
  int64_t documents = 0, tokens = 0;
  double seconds = 0;
};
// Called on the thread that called Prepare, several times a second. An exception thrown by it stops
// the work and leaves nothing behind.
using ProgressFn = std::function<void(const PrepareProgress&)>;

struct PreparedDataset {
  std::string prefix;
  Sidecar info;
};

struct PrepareResult {
  std::vector<PreparedDataset> datasets;  // {P}, or {P/train, P/validation}
  int64_t files = 0, bytes = 0;           // read
  int64_t skipped_binary = 0;             // documents with a NUL byte
  int64_t skipped_invalid_utf8 = 0;
  int64_t skipped_empty = 0;
  int64_t excluded = 0, hidden = 0, repeated = 0, unusable = 0;  // files, see TextInputs
  double seconds = 0;
};

// Turns text into datasets of tokens, every document followed by the end-of-text token, in the
// order of the inputs. Beside each dataset lies its sidecar <prefix>.json.
//
// Split    a document goes to validation if the hash of (seed, its key) falls below the fraction of
//          the hash range, so adding documents does not move others. The key is the path below
//          the input (with the input's name) for a file and the text for a .jsonl line; the second,
//          third, ... file of one key gets #2, #3, ... behind it. If a side would be empty, the
//          document with the outermost hash is moved there.
// Output   the same bytes for any number of threads and any unit_bytes
// Memory   a few units a thread (at most about 8 x unit_bytes each) plus the list of files; a line
//          of a .jsonl file is held whole
// Errors   DataError naming the file (missing, unreadable, existing output without `overwrite`, an
//          input that would be overwritten, no document), InvalidArgument naming the option,
//          Unsupported for a tokenizer. Whatever fails, no new file or folder stays, and existing
//          outputs are as they were.
PrepareResult Prepare(const PrepareOptions& options, const ProgressFn& progress = nullptr);
// The same with a tokenizer of the caller's (options.tokenizer is not looked at).
PrepareResult PrepareWith(const PrepareOptions& options, const Tokenizer& tokenizer,
                          const ProgressFn& progress = nullptr);

std::string ToJson(const PrepareResult& result);

}  // namespace longspan::data
