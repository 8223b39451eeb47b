#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace longspan::data {

inline constexpr int32_t kNoLabel = -1;
inline constexpr int32_t kPadding = kNoLabel;  // the label of the token before it is none

// One training row of L tokens. Token i predicts labels[i].
struct Row {
  std::vector<int32_t> tokens;     // [L]
  std::vector<int32_t> labels;     // [L], kNoLabel where nothing is predicted
  std::vector<int64_t> positions;  // [L], for RoPE: 0 at each document's start
  // Ascending; document j is [doc_ends[j - 1], doc_ends[j]), the first begins at 0, the last is L.
  std::vector<int64_t> doc_ends;
};

// Makes a row from L + 1 consecutive tokens of a stream of documents; the extra token only serves
// as the last label. `ends` (ascending, in [1, L + 1]) are the offsets just behind the last tokens
// of the documents that end among these tokens.
//
// document_mask true   labels[i] = tokens[i + 1], except that a document's last token has none. A
//                      document cut by the row's end keeps the label of its last token here, and
//                      what follows starts the next row as a document of its own, at position 0.
// document_mask false  the row is one document: positions 0..L-1, all labels, doc_ends {L}.
//
// Padding   tokens[i] == kPadding stands where no document is; both ends of each run of them are in
//           `ends`. With document_mask a run is a document of its own, so that no token outside
//           sees it and it sees none; it has no labels, nor has the token before it, and its tokens
//           become id 0. Without document_mask there is none.
// InvalidArgument for fewer than two tokens.
Row PackRow(std::span<const int32_t> tokens, std::span<const int64_t> ends, bool document_mask);

}  // namespace longspan::data
