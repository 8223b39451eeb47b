#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/text_source.h"
#include "data/token_dtype.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace longspan::data {

// The input cut into units of about `unit_bytes` that workers encode independently. Units depend on
// the files only, and their results in order are the corpus in order.
struct Unit {
  enum class Kind {
    kFiles,  // files [first_file, end_file), each one document (or all lines of a small .jsonl)
    kPiece,  // about bytes [begin, end) of one long document, cut where the tokenizer allows it
    kLines,  // the lines of one .jsonl file that start in [begin, end)
  };
  Kind kind = Kind::kFiles;
  size_t first_file = 0, end_file = 0;
  int64_t begin = 0, end = 0;
  // Shared by the pieces of one file: set as soon as the file is known not to be text, to spare
  // reading the rest of it.
  std::shared_ptr<std::atomic<bool>> rejected;
};

class UnitPlanner {
 public:
  UnitPlanner(const std::vector<TextFile>& files, int64_t unit_bytes)
      : files_(files), unit_bytes_(unit_bytes) {}
  std::optional<Unit> Next();

 private:
  const std::vector<TextFile>& files_;
  int64_t unit_bytes_;
  size_t next_file_ = 0;
  int64_t offset_ = 0;  // inside a file of several units
  std::shared_ptr<std::atomic<bool>> rejected_;
};

struct DocumentPart {
  uint64_t hash = 0;         // decides between train and validation; the same for all parts
  int64_t packed_bytes = 0;  // of EncodedUnit::packed; a last part includes the end-of-text token
  int64_t max_token_id = -1;
  TextKind kind = TextKind::kText;  // otherwise the whole document is left out
  bool last = true;                 // of its document
};

struct EncodedUnit {
  std::vector<uint8_t> packed;
  std::vector<DocumentPart> parts;
  int64_t bytes_read = 0;
  int64_t empty_documents = 0;
  std::shared_ptr<std::atomic<bool>> rejected;  // of a piece, for the consumer to set
};

// What every worker knows. hash = XXH3 with `seed` of TextFile::key, or of the text of a .jsonl
// line (so a line keeps its side wherever it stands, and equal lines are on the same side).
struct EncodeOptions {
  const std::vector<TextFile>& files;
  const Tokenizer& tokenizer;
  TokenDType dtype;
  std::string field = "text";
  uint64_t seed = 0;
};

// Longest line of a .jsonl file; a longer one is an error, because lines are held in memory.
inline constexpr int64_t kMaxLineBytes = int64_t{64} << 20;

// Encodes units one after another; one object a thread.
// Errors   DataError naming the file, and the line of a .jsonl file
class UnitEncoder {
 public:
  explicit UnitEncoder(const EncodeOptions& options) : options_(options) {}
  EncodedUnit Encode(const Unit& unit);

 private:
  int64_t UnitBytes(const Unit& unit) const;
  void EncodeFile(const TextFile& file, EncodedUnit& out);
  void EncodePiece(const TextFile& file, const Unit& unit, EncodedUnit& out);
  void EncodeLines(const TextFile& file, int64_t begin, int64_t end, EncodedUnit& out);
  void AddPart(std::string_view text, uint64_t hash, bool last, EncodedUnit& out);

  EncodeOptions options_;
  std::string text_;  // scratch
  std::vector<int32_t> ids_;
};

}  // namespace longspan::data
