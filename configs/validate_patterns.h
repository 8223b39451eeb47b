#pragma once
#include <string>
#include <vector>

#include "configs/validate.h"

namespace longspan::configs {

// Adds what is wrong between the fields of a static attention pattern, each of which is in order by
// itself. `path` is that of `softmax`, with positions.
void CheckPattern(const Softmax& softmax, int64_t num_kv_heads, const std::string& path,
                  std::vector<Problem>& problems);

}  // namespace longspan::configs
