#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "data/file.h"
#include "data/token_dtype.h"

namespace longspan::data {

// Writes a dataset that IndexedDataset and Megatron read. Everything goes to temporary files beside
// the target until Publish; a writer that dies before that removes them, and those that a killed
// process left behind are removed by the next writer of the same prefix. Memory does not grow with
// the number of tokens or documents.
//
//   IndexWriter writer("corpus/train", TokenDTypeForVocabulary(vocab_size));
//   for each document: writer.Append(ids); writer.EndDocument();
//   writer.Commit();
//
// Errors   DataError naming the file (a full disk, a folder that cannot be written, or one that has
//          the name of an output)
class IndexWriter {
 public:
  // An .idx stores sequence lengths as i32, so longer documents become several sequences.
  static constexpr int64_t kMaxSequenceTokens = int64_t{1} << 30;

  IndexWriter(const std::string& prefix, TokenDType dtype,
              int64_t max_sequence_tokens = kMaxSequenceTokens);
  ~IndexWriter();

  // Continue the current document; a document may arrive in any number of parts.
  void Append(std::span<const int32_t> ids);
  void AppendPacked(std::span<const uint8_t> bytes);  // as PackTokens leaves them
  // Ends the current document, which must hold at least one token (InvalidArgument).
  void EndDocument();
  // Forgets what was appended since the last EndDocument.
  void DropDocument();

  // Completes both temporary files, which IndexedDataset(temporary_prefix()) can then open.
  // Nothing may be appended afterwards. An unfinished document is an InvalidArgument.
  void Finish();
  // Finishes if that is still to be done and writes `sidecar` to a temporary file (none if it is
  // empty): everything that may fail for want of room, while old outputs are as they were. A caller
  // with several datasets stages all of them before it publishes one.
  void Stage(const std::string& sidecar = "");
  // Moves what was staged to <prefix>.bin, .idx and .json (an old .json is removed if there is no
  // new one). An old .idx is taken away first and the new one arrives last, so no mixture of old
  // and new files ever looks complete.
  void Publish();
  // Both.
  void Commit(const std::string& sidecar = "");

  int64_t num_tokens() const { return num_tokens_; }        // of ended documents
  int64_t num_documents() const { return num_documents_; }  // ended
  uint64_t tokens_hash() const;  // XXH3 of .bin up to the last EndDocument
  const std::string& temporary_prefix() const { return temporary_prefix_; }

 private:
  struct Hash;
  void AddSequence(int64_t tokens);

  std::string prefix_, temporary_prefix_;
  TokenDType dtype_;
  int64_t max_sequence_tokens_;
  OutputFile tokens_, index_;
  std::unique_ptr<OutputFile> sidecar_;
  std::unique_ptr<Hash> hash_;
  std::vector<uint8_t> packed_;
  int64_t num_tokens_ = 0, num_documents_ = 0, num_sequences_ = 0;
  int64_t open_tokens_ = 0;                                  // of the document being written
  std::vector<std::pair<int64_t, int64_t>> long_documents_;  // document, sequences (if not 1)
  bool finished_ = false, staged_ = false;
};

}  // namespace longspan::data
