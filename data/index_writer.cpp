#include "data/index_writer.h"

#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <random>
#include <string_view>
#include <system_error>

#include "data/indexed_dataset.h"
#include "data/sidecar.h"
#include "ops/core/check.h"

namespace longspan::data {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kChunkEntries = 1 << 16;

constexpr const char* kSuffixes[] = {".bin", ".idx", ".json"};

void CheckTargets(const std::string& prefix) {
  for (const char* suffix : kSuffixes) {
    std::error_code unreadable;  // then creating or renaming says why
    if (fs::is_directory(prefix + suffix, unreadable)) {
      throw DataError(Str(prefix, suffix, " is a folder; choose another output or remove it"));
    }
  }
}

// Whether `name` is `stem`, hexadecimal digits and one of the suffixes.
bool IsTemporaryName(std::string_view name, std::string_view stem) {
  if (!name.starts_with(stem)) return false;
  name.remove_prefix(stem.size());
  const size_t digits = std::min(name.find_first_not_of("0123456789abcdef"), name.size());
  return digits > 0 && std::find(std::begin(kSuffixes), std::end(kSuffixes), name.substr(digits)) !=
                           std::end(kSuffixes);
}

// The prefix of the temporary files: beside the target, so that the rename stays within one file
// system, and random, because processes in containers may have equal ids.
std::string StartTemporaryFiles(const std::string& prefix) {
  CheckTargets(prefix);
  const fs::path path(prefix), folder = path.parent_path();
  const std::string stem = Str(".", path.filename().string(), ".tmp");
  std::error_code unreadable;  // then creating a file there says why
  for (fs::directory_iterator entry(folder.empty() ? "." : folder, unreadable), end; entry != end;
       entry.increment(unreadable)) {
    if (unreadable) break;
    if (IsTemporaryName(entry->path().filename().string(), stem)) {
      RemoveIfAbandoned(entry->path().string());
    }
  }
  std::random_device random;
  return (folder / (stem + HexString((uint64_t{random()} << 32) | random()).substr(2))).string();
}

void RemoveOld(const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    throw DataError(Str("cannot replace ", path, ": ", SystemReason()));
  }
}

}  // namespace

// The running state covers everything written, `ended` only whole documents, so that dropping one
// takes its bytes out of the hash.
struct IndexWriter::Hash {
  Hash() { XXH3_64bits_reset(running), XXH3_64bits_reset(ended); }
  ~Hash() { XXH3_freeState(running), XXH3_freeState(ended); }
  Hash(const Hash&) = delete;
  Hash& operator=(const Hash&) = delete;
  XXH3_state_t* running = XXH3_createState();
  XXH3_state_t* ended = XXH3_createState();
};

IndexWriter::IndexWriter(const std::string& prefix, TokenDType dtype, int64_t max_sequence_tokens)
    : prefix_(prefix),
      temporary_prefix_(StartTemporaryFiles(prefix)),
      dtype_(dtype),
      max_sequence_tokens_(max_sequence_tokens),
      tokens_(temporary_prefix_ + ".bin"),
      index_(temporary_prefix_ + ".idx"),
      hash_(std::make_unique<Hash>()) {
  LONGSPAN_CHECK(max_sequence_tokens >= 1 && max_sequence_tokens <= kMaxSequenceTokens);
  const uint8_t header[IndexedDataset::kHeaderBytes] = {};
  index_.Write(header, sizeof header);  // the counts are known at the end only
}

IndexWriter::~IndexWriter() = default;

void IndexWriter::Append(std::span<const int32_t> ids) {
  packed_.clear();
  PackTokens(ids, dtype_, packed_);
  AppendPacked(packed_);
}

void IndexWriter::AppendPacked(std::span<const uint8_t> bytes) {
  const auto count = static_cast<int64_t>(bytes.size());
  LONGSPAN_CHECK(!finished_ && count % SizeOf(dtype_) == 0);
  tokens_.Write(bytes.data(), count);
  XXH3_64bits_update(hash_->running, bytes.data(), bytes.size());
  open_tokens_ += count / SizeOf(dtype_);
}

void IndexWriter::AddSequence(int64_t tokens) {
  const auto length = static_cast<int32_t>(tokens);
  index_.Write(&length, sizeof length);
  ++num_sequences_;
}

void IndexWriter::EndDocument() {
  LONGSPAN_CHECK(open_tokens_ > 0)
      << "document " << num_documents_ << " of " << prefix_ << " is empty";
  int64_t sequences = 0;
  for (int64_t rest = open_tokens_; rest > 0; rest -= max_sequence_tokens_, ++sequences) {
    AddSequence(std::min(rest, max_sequence_tokens_));
  }
  if (sequences != 1) long_documents_.emplace_back(num_documents_, sequences);
  num_tokens_ += open_tokens_;
  open_tokens_ = 0;
  ++num_documents_;
  XXH3_copyState(hash_->ended, hash_->running);
}

void IndexWriter::DropDocument() {
  if (open_tokens_ == 0) return;
  open_tokens_ = 0;
  tokens_.Truncate(num_tokens_ * SizeOf(dtype_));
  XXH3_copyState(hash_->running, hash_->ended);
}

uint64_t IndexWriter::tokens_hash() const { return XXH3_64bits_digest(hash_->ended); }

void IndexWriter::Finish() {
  LONGSPAN_CHECK(!finished_ && open_tokens_ == 0) << prefix_ << " ends inside a document";
  finished_ = true;
  // Byte offsets: the running sum of the lengths, which are read back from the file.
  std::vector<int32_t> lengths;
  std::vector<int64_t> entries;
  int64_t value = 0;
  for (int64_t begin = 0; begin < num_sequences_; begin += kChunkEntries) {
    lengths.resize(static_cast<size_t>(std::min(kChunkEntries, num_sequences_ - begin)));
    const auto bytes = static_cast<int64_t>(lengths.size() * sizeof(int32_t));
    index_.ReadAt(IndexedDataset::kHeaderBytes + begin * 4, lengths.data(), bytes);
    entries.clear();
    for (const int32_t length : lengths) {
      entries.push_back(value);
      value += length * SizeOf(dtype_);
    }
    index_.Write(entries.data(), 2 * bytes);
  }
  value = 0;
  auto next_long = long_documents_.begin();
  for (int64_t d = 0; d <= num_documents_; ++d) {
    index_.Write(&value, sizeof value);
    const bool is_long = next_long != long_documents_.end() && next_long->first == d;
    value += is_long ? (next_long++)->second : 1;
  }

  uint8_t header[IndexedDataset::kHeaderBytes];
  const uint64_t version = 1;
  const auto sequences = static_cast<uint64_t>(num_sequences_);
  const auto document_entries = static_cast<uint64_t>(num_documents_) + 1;
  std::memcpy(header, IndexedDataset::kMagic, sizeof IndexedDataset::kMagic);
  std::memcpy(header + 9, &version, 8);
  header[17] = static_cast<uint8_t>(dtype_);
  std::memcpy(header + 18, &sequences, 8);
  std::memcpy(header + 26, &document_entries, 8);
  index_.WriteAt(0, header, sizeof header);
  tokens_.Close();
  index_.Close();
}

void IndexWriter::Stage(const std::string& sidecar) {
  LONGSPAN_CHECK(!staged_) << prefix_ << " is staged twice";
  if (!finished_) Finish();
  CheckTargets(prefix_);
  if (!sidecar.empty()) {
    sidecar_ = std::make_unique<OutputFile>(temporary_prefix_ + ".json");
    sidecar_->Write(sidecar.data(), static_cast<int64_t>(sidecar.size()));
    sidecar_->Close();
  }
  staged_ = true;
}

void IndexWriter::Publish() {
  LONGSPAN_CHECK(staged_) << prefix_ << " is published before it is staged";
  RemoveOld(prefix_ + ".idx");
  RemoveOld(prefix_ + ".json");
  tokens_.Rename(prefix_ + ".bin");
  if (sidecar_) sidecar_->Rename(prefix_ + ".json");
  index_.Rename(prefix_ + ".idx");
}

void IndexWriter::Commit(const std::string& sidecar) {
  Stage(sidecar);
  Publish();
}

}  // namespace longspan::data
