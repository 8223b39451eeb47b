#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "data/file.h"
#include "data/token_dtype.h"

namespace longspan::data {

// Read-only view of a Megatron indexed dataset: <prefix>.bin (tokens back to back, no header) and
// <prefix>.idx, all little-endian:
//
//   offset       bytes  type
//   0            9      "MMIDIDX\0\0"
//   9            8      u64   version, 1
//   17           1      u8    dtype code of the tokens (TokenDType)
//   18           8      u64   S, number of sequences
//   26           8      u64   K, entries of the document index = documents + 1
//   34           4 S    i32   tokens of each sequence
//   34 + 4 S     8 S    i64   byte offset of each sequence in .bin
//   34 + 12 S    8 K    i64   first sequence of each document, then S
//
// A document is one or more whole sequences. Sequences lie in .bin in order without gaps, as every
// Megatron writer leaves them, so the dataset is one stream of tokens with document borders.
// Offsets and lengths below are in tokens of that stream.
//
// Errors   the constructor checks every entry of the index and both file lengths: DataError that
//          names the file and says whether it is missing, foreign, truncated or inconsistent
// Threads  everything const is safe to call at the same time
class IndexedDataset {
 public:
  static constexpr uint8_t kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
  static constexpr int64_t kHeaderBytes = 34;

  explicit IndexedDataset(const std::string& prefix);

  const std::string& prefix() const { return prefix_; }
  TokenDType dtype() const { return dtype_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_sequences() const { return num_sequences_; }
  int64_t num_documents() const { return num_documents_; }

  int64_t SequenceLength(int64_t sequence) const;
  // The document is [DocumentBegin(d), DocumentBegin(d + 1)); d may be num_documents().
  int64_t DocumentBegin(int64_t document) const;
  int64_t DocumentLength(int64_t document) const {
    return DocumentBegin(document + 1) - DocumentBegin(document);
  }

  // Reads tokens [begin, begin + out.size()). InvalidArgument outside the stream; DataError for an
  // id that does not fit an i32.
  void Read(int64_t begin, std::span<int32_t> out) const;

  // Largest id of the whole file (-1 when empty): reads all of it. DataError naming the file and
  // the id if one is negative.
  int64_t ScanMaxTokenId() const;

  // XXH3 over the index, the length of .bin and a sample of its pages (all of it up to 16 MiB, else
  // 4096 pages spread evenly). It does not depend on names or times. Computed once.
  uint64_t Fingerprint() const;
  // XXH3 over all of .bin: what the sidecar's bin_xxh3 must be.
  uint64_t HashTokens() const;

 private:
  void CheckHeader();
  void CheckIndex() const;
  void CheckTokens();

  std::string prefix_;
  MappedFile index_, tokens_;
  TokenDType dtype_ = TokenDType::kU16;
  int64_t num_tokens_ = 0, num_sequences_ = 0, num_documents_ = 0;
  mutable std::once_flag fingerprint_once_;
  mutable uint64_t fingerprint_ = 0;
};

}  // namespace longspan::data
