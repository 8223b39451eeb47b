#include "data/encode.h"

#include <xxhash.h>

#include <algorithm>
#include <string_view>

#include "data/file.h"
#include "data/json_field.h"
#include "ops/core/error.h"

namespace longspan::data {
namespace {

constexpr size_t kMaxFilesInUnit = 512;
// How far after a nominal border the cut between two pieces is looked for.
constexpr int64_t kCutWindowBytes = 64 << 10;
constexpr int64_t kSliceBytes = 128 << 10;

uint64_t HashText(std::string_view text, uint64_t seed) {
  return XXH3_64bits_withSeed(text.data(), text.size(), seed);
}

// Where the cut for nominal border `border` lies; `text` holds the file's bytes from there on (a
// window of them, or up to the file's end). A pure function of those bytes, so the two pieces that
// meet there agree on it.
int64_t CutAfter(int64_t border, std::string_view text, const Tokenizer& tokenizer) {
  text = text.substr(0, kCutWindowBytes);
  size_t skipped = 0;
  while (skipped < 3 && skipped < text.size() && IsUtf8Continuation(text[skipped])) ++skipped;
  if (skipped == text.size()) return border + static_cast<int64_t>(skipped);  // the last character
  size_t cut = skipped + tokenizer.FindCut(text.substr(skipped));
  if (cut >= text.size()) {  // none in the window: the last character border in it
    cut = text.size() - 1;
    while (cut > skipped && IsUtf8Continuation(text[cut])) --cut;
  }
  return border + static_cast<int64_t>(cut);
}

[[noreturn]] void FailChanged(const TextFile& file) {
  throw DataError(Str("input ", file.path, " changed while it was read; run prepare again"));
}

int64_t CountLines(const InputFile& file, int64_t end) {
  std::string block;
  int64_t lines = 0;
  for (int64_t at = 0; at < end; at += static_cast<int64_t>(block.size())) {
    block.clear();
    if (file.ReadAt(at, std::min(end - at, int64_t{1} << 20), block) == 0) break;
    lines += std::count(block.begin(), block.end(), '\n');
  }
  return lines;
}

}  // namespace

std::optional<Unit> UnitPlanner::Next() {
  if (next_file_ == files_.size()) return std::nullopt;
  Unit unit;
  unit.first_file = next_file_;
  const TextFile& file = files_[next_file_];
  if (file.bytes > unit_bytes_) {
    unit.kind = file.jsonl ? Unit::Kind::kLines : Unit::Kind::kPiece;
    if (offset_ == 0) rejected_ = std::make_shared<std::atomic<bool>>(false);
    unit.rejected = rejected_;
    unit.begin = offset_;
    unit.end = std::min(offset_ + unit_bytes_, file.bytes);
    offset_ = unit.end == file.bytes ? 0 : unit.end;
    if (offset_ == 0) ++next_file_;
    unit.end_file = unit.first_file + 1;
    return unit;
  }
  int64_t bytes = 0;
  while (next_file_ < files_.size() && next_file_ - unit.first_file < kMaxFilesInUnit &&
         files_[next_file_].bytes <= unit_bytes_ - bytes) {
    bytes += files_[next_file_++].bytes;
  }
  unit.end_file = next_file_;
  return unit;
}

EncodedUnit UnitEncoder::Encode(const Unit& unit) {
  EncodedUnit out;
  const TextFile& first = options_.files[unit.first_file];
  out.packed.reserve(static_cast<size_t>(UnitBytes(unit) * SizeOf(options_.dtype)));
  switch (unit.kind) {
    case Unit::Kind::kFiles:
      for (size_t f = unit.first_file; f < unit.end_file; ++f) EncodeFile(options_.files[f], out);
      break;
    case Unit::Kind::kPiece:
      EncodePiece(first, unit, out);
      break;
    case Unit::Kind::kLines:
      EncodeLines(first, unit.begin, unit.end, out);
      break;
  }
  return out;
}

// An estimate of its text in bytes, which is an estimate of its tokens for a byte tokenizer and
// more than enough for others.
int64_t UnitEncoder::UnitBytes(const Unit& unit) const {
  if (unit.kind != Unit::Kind::kFiles) return unit.end - unit.begin;
  int64_t bytes = 0;
  for (size_t f = unit.first_file; f < unit.end_file; ++f) bytes += options_.files[f].bytes + 1;
  return bytes;
}

void UnitEncoder::AddPart(std::string_view text, uint64_t hash, bool last, EncodedUnit& out) {
  DocumentPart part;
  part.hash = hash;
  part.last = last;
  part.kind = ClassifyText(text);
  if (part.kind == TextKind::kText) {
    const size_t before = out.packed.size();
    do {  // in slices, so that the ids stay in the cache
      const int64_t length = static_cast<int64_t>(text.size());
      const auto cut = static_cast<size_t>(
          length <= kSliceBytes
              ? length
              : CutAfter(kSliceBytes, text.substr(kSliceBytes), options_.tokenizer));
      ids_.clear();
      options_.tokenizer.Encode(text.substr(0, cut), ids_);
      text.remove_prefix(cut);
      if (text.empty() && last) ids_.push_back(options_.tokenizer.eot_id());
      part.max_token_id = std::max(part.max_token_id, PackTokens(ids_, options_.dtype, out.packed));
    } while (!text.empty());
    part.packed_bytes = static_cast<int64_t>(out.packed.size() - before);
  }
  out.parts.push_back(part);
}

void UnitEncoder::EncodeFile(const TextFile& file, EncodedUnit& out) {
  if (file.jsonl) {
    EncodeLines(file, 0, file.bytes, out);
    return;
  }
  const InputFile input(file.path);
  text_.clear();
  out.bytes_read += input.ReadAt(0, input.size(), text_);
  if (text_.empty()) {
    ++out.empty_documents;
  } else {
    AddPart(text_, HashText(file.key, options_.seed), true, out);
  }
}

void UnitEncoder::EncodePiece(const TextFile& file, const Unit& unit, EncodedUnit& out) {
  const bool last = unit.end == file.bytes;
  const uint64_t hash = HashText(file.key, options_.seed);
  out.rejected = unit.rejected;
  out.bytes_read += unit.end - unit.begin;
  if (unit.rejected->load(std::memory_order_relaxed)) {
    DocumentPart part;
    part.hash = hash;
    part.kind = TextKind::kInvalidUtf8;  // an earlier piece has already said why
    part.last = last;
    out.parts.push_back(part);
    return;
  }
  const InputFile input(file.path);
  const int64_t wanted = std::min(unit.end + kCutWindowBytes, file.bytes) - unit.begin;
  text_.clear();
  if (input.ReadAt(unit.begin, wanted, text_) != wanted || input.size() != file.bytes) {
    FailChanged(file);
  }
  const std::string_view text = text_;
  const int64_t from = unit.begin == 0 ? 0 : CutAfter(unit.begin, text, options_.tokenizer);
  const auto border = static_cast<size_t>(unit.end - unit.begin);
  const int64_t to =
      last ? file.bytes : CutAfter(unit.end, text.substr(border), options_.tokenizer);
  // A tiny last unit may lie wholly before the cut at its own begin.
  const auto length = static_cast<size_t>(std::max<int64_t>(to - from, 0));
  AddPart(text.substr(static_cast<size_t>(from - unit.begin), length), hash, last, out);
}

void UnitEncoder::EncodeLines(const TextFile& file, int64_t begin, int64_t end, EncodedUnit& out) {
  const InputFile input(file.path);
  // One byte more in front shows whether a line starts at `begin`.
  int64_t at = std::max<int64_t>(begin - 1, 0);
  text_.clear();
  if (input.ReadAt(at, end - at, text_) != end - at || input.size() != file.bytes) {
    FailChanged(file);
  }
  out.bytes_read += end - begin;
  size_t start = 0;
  if (begin > 0) {
    const size_t newline = text_.find('\n');
    if (newline == std::string::npos) return;  // inside one long line of an earlier unit
    start = newline + 1;
  }
  while (at + static_cast<int64_t>(start) < end) {
    size_t stop = text_.find('\n', start);
    // The last line may go on behind the unit.
    while (stop == std::string::npos) {
      const size_t known = text_.size();
      const int64_t length = static_cast<int64_t>(known - start);
      if (length > kMaxLineBytes) {
        throw DataError(Str(file.path, ":", CountLines(input, at + static_cast<int64_t>(start)) + 1,
                            ": the line is longer than ", kMaxLineBytes >> 20,
                            " MiB; split it or give the text as a plain file"));
      }
      const int64_t next = std::max<int64_t>(length, 64 << 10);
      if (input.ReadAt(at + static_cast<int64_t>(known), next, text_) == 0) {
        stop = known;
      } else {
        stop = text_.find('\n', known);
      }
    }
    const std::string_view line = std::string_view(text_).substr(start, stop - start);
    if (line.find_first_not_of(" \t\r") != std::string_view::npos) {
      std::string value;
      try {
        value = ExtractJsonField(line, options_.field);
      } catch (const DataError& error) {
        throw DataError(Str(file.path, ":", CountLines(input, at + static_cast<int64_t>(start)) + 1,
                            ": the line ", error.what()));
      }
      if (value.empty()) {
        ++out.empty_documents;
      } else {
        AddPart(value, HashText(value, options_.seed), true, out);
      }
    }
    start = stop + 1;
  }
}

}  // namespace longspan::data
