#pragma once
#include <string>
#include <vector>

#include "configs/validate.h"

namespace longspan::configs {

// Adds what is wrong between the fields of a static attention pattern, each of which is in order by
// itself. `path` is that of `attention`, with positions.
void CheckPattern(const Attention& attention, int64_t num_kv_heads, const std::string& path,
                  std::vector<Problem>& problems);

// Adds what the mixer's attention has that its normalization does not go with. `path` as above.
void CheckNormalization(const Mixer& mixer, const std::string& path,
                        std::vector<Problem>& problems);

}  // namespace longspan::configs
