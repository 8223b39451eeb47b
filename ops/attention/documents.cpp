#include "ops/attention/documents.h"

#include <algorithm>
#include <limits>

#include "ops/core/error.h"

namespace longspan::ops {
namespace {

void CheckSize(int64_t rows, int64_t row_length) {
  if (rows < 0 || row_length < 1) {
    throw InvalidArgument(Str("documents: ", rows, " rows of ", row_length,
                              " tokens; rows must be >= 0 and row_length >= 1"));
  }
  if (rows > std::numeric_limits<int32_t>::max() / row_length) {
    throw InvalidArgument(Str("documents: ", rows, " rows of ", row_length,
                              " tokens exceed 2^31 - 1 tokens of one micro-batch; use fewer rows"));
  }
}

}  // namespace

Documents Documents::FromEnds(int64_t row_length, const std::vector<std::vector<int64_t>>& ends) {
  const int64_t rows = static_cast<int64_t>(ends.size());
  CheckSize(rows, row_length);
  for (size_t r = 0; r < ends.size(); ++r) {
    int64_t previous = 0;
    for (const int64_t end : ends[r]) {
      if (end <= previous || end > row_length) {
        throw InvalidArgument(Str("documents: row ", r, " has a document end ", end, " after ",
                                  previous, "; ends must ascend from 1 to row_length ",
                                  row_length));
      }
      previous = end;
    }
    if (previous != row_length) {
      throw InvalidArgument(Str("documents: the last document end of row ", r, " is ", previous,
                                "; it must be row_length ", row_length));
    }
  }
  Documents d{.rows = rows, .row_length = row_length, .doc_begin = {}, .doc_end = {}};
  d.doc_begin.resize(static_cast<size_t>(d.tokens()));
  d.doc_end.resize(static_cast<size_t>(d.tokens()));
  for (size_t r = 0; r < ends.size(); ++r) {
    const int64_t row = static_cast<int64_t>(r) * row_length;
    int64_t begin = row;
    for (const int64_t end : ends[r]) {
      std::fill(d.doc_begin.begin() + begin, d.doc_begin.begin() + row + end,
                static_cast<int32_t>(begin));
      std::fill(d.doc_end.begin() + begin, d.doc_end.begin() + row + end,
                static_cast<int32_t>(row + end));
      begin = row + end;
    }
  }
  return d;
}

Documents Documents::OnePerRow(int64_t rows, int64_t row_length) {
  CheckSize(rows, row_length);
  return FromEnds(row_length,
                  std::vector<std::vector<int64_t>>(static_cast<size_t>(rows), {row_length}));
}

}  // namespace longspan::ops
