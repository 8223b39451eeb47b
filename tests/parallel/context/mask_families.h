#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/attention/pattern.h"

namespace longspan::test {

// The 14 mask families of LongCA-bench (arXiv 2510.17896) on one row: what it draws is drawn from
// `seed`, with lengths in proportion to the row.
struct MaskFamily {
  std::string name;
  ops::AttentionPattern pattern;
  std::vector<int64_t> ends;  // of documents, in tokens
};
std::vector<MaskFamily> MaskFamilies(int64_t tokens, uint64_t seed);

}  // namespace longspan::test
