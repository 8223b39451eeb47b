#pragma once
#include <string>
#include <vector>

#include "configs/proto/config.pb.h"

namespace longspan::configs {

struct Problem {
  std::string field;    // path, with names or positions (fields.h): "model.mixer[s2].softmax.s2"
  std::string message;  // what is wrong and, in parentheses, what would be right
};

// All problems that the config alone shows: absent required values, values outside the range of
// their field (configs/proto), and combinations that cannot work. Empty when the config is usable
// on some machine; what depends on the ranks, the data or the binary is for the trainer to check.
// Defaults may be filled in or absent; the result is the same.
std::vector<Problem> Validate(const Config& config);

// Share of the stride's residues that the union of the kv heads covers, in (0, 1]. 1 with at least
// one dense head.
double S2Coverage(const S2Pattern& s2, int64_t num_kv_heads);

}  // namespace longspan::configs
