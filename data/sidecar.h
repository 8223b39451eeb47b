#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "data/indexed_dataset.h"

namespace longspan::data {

// What 'longspan prepare' knows about a dataset beyond Megatron's two files: <prefix>.json.
struct Sidecar {
  std::string tokenizer;
  int32_t vocab_size = 0;
  int32_t eot_id = 0;
  int64_t documents = 0;
  int64_t tokens = 0;
  int64_t max_token_id = -1;
  uint64_t fingerprint = 0;  // IndexedDataset::Fingerprint
  uint64_t bin_xxh3 = 0;     // IndexedDataset::HashTokens
};

std::string ToJson(const Sidecar& sidecar);

// Nothing if <prefix>.json does not exist (Megatron writes none); DataError if it cannot be parsed.
std::optional<Sidecar> ReadSidecar(const std::string& prefix);

// Largest token id: from the sidecar where its fingerprint still fits, else by reading all tokens.
int64_t MaxTokenId(const IndexedDataset& dataset);

// Reads every byte of the dataset and compares it with its sidecar. DataError naming the file that
// changed, or if there is no sidecar to compare with.
void VerifyAgainstSidecar(const IndexedDataset& dataset);

// 64-bit hashes as they are printed and stored: "0x" and 16 digits.
std::string HexString(uint64_t value);

}  // namespace longspan::data
