#pragma once
#include <vector>

#include "configs/proto/config.pb.h"
#include "configs/validate.h"

namespace longspan::configs {

// Conditions between the objective and the mixers whose gates it trains; run.context_length is in
// order. Fields are indexed paths.
void CheckObjective(const Config& config, std::vector<Problem>& problems);

}  // namespace longspan::configs
