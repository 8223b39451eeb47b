#pragma once
#include <cstdint>
#include <vector>

#include "ops/attention/device_copies.h"

namespace longspan::ops {

// The documents of one micro-batch: `rows` packed rows of `row_length` tokens laid one after
// another. A token's global index is row * row_length + position in the row.
//
// `doc_begin[t]` is the global index of the first token of t's document; two tokens may see each
// other only when it is equal, so rows never mix (a row's first token begins a document). With
// data.document_mask: false every row is one document. `doc_end[t]` is one past its last token.
struct Documents {
  int64_t rows = 0;
  int64_t row_length = 0;
  std::vector<int32_t> doc_begin;  // [rows * row_length]
  std::vector<int32_t> doc_end;    // [rows * row_length]
  DeviceCopies device_copies;      // of doc_begin; see cuda/device_mask.h

  int64_t tokens() const { return rows * row_length; }
  bool operator==(const Documents&) const = default;

  // `ends[r]` holds the ascending ends (exclusive, in tokens of the row) of the documents of row r;
  // the last one is row_length. Throws InvalidArgument otherwise.
  static Documents FromEnds(int64_t row_length, const std::vector<std::vector<int64_t>>& ends);
  static Documents OnePerRow(int64_t rows, int64_t row_length);
};

}  // namespace longspan::ops
