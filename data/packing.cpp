#include "data/packing.h"

#include <algorithm>

#include "ops/core/check.h"

namespace longspan::data {

Row PackRow(std::span<const int32_t> tokens, std::span<const int64_t> ends, bool document_mask) {
  LONGSPAN_CHECK(tokens.size() >= 2) << "a row needs two tokens and has " << tokens.size();
  const auto length = static_cast<int64_t>(tokens.size()) - 1;
  Row row;
  row.tokens.assign(tokens.begin(), tokens.end() - 1);
  row.labels.assign(tokens.begin() + 1, tokens.end());
  row.positions.resize(row.tokens.size());
  if (document_mask) {
    for (const int64_t end : ends) {
      if (end > length) break;  // the extra token's own document
      row.labels[static_cast<size_t>(end - 1)] = kNoLabel;
      if (end < length) row.doc_ends.push_back(end);
    }
  }
  std::replace(row.tokens.begin(), row.tokens.end(), kPadding, 0);
  row.doc_ends.push_back(length);
  int64_t begin = 0;
  for (const int64_t end : row.doc_ends) {
    for (int64_t i = begin; i < end; ++i) row.positions[static_cast<size_t>(i)] = i - begin;
    begin = end;
  }
  return row;
}

}  // namespace longspan::data
