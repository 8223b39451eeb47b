#pragma once
#include <cstdint>
#include <vector>

#include "configs/proto/config.pb.h"

namespace longspan::configs {

// Values that an absent field stands for and that depend on other fields. Each returns the field's
// own value when it is given. All expect a config without problems (validate.h).
int64_t HeadDim(const Model& model);
Precision ResidualDtype(const Config& config);
int64_t HeadStep(const S2Pattern& s2, int64_t num_kv_heads);
int64_t DecaySteps(const WsdSchedule& wsd, int64_t run_steps);  // at least 1

// Position in model.mixer of the mixer of each layer: model.layers, repeated up to num_layers.
// ConfigError when a name is not that of a mixer.
std::vector<int> LayerMixers(const Model& model);

// Writes every absent value explicitly, except those that only the machine decides (run.threads 0)
// and those that have no meaning beside others (head_step of a homogeneous pattern). Idempotent.
void FillDefaults(Config& config);

}  // namespace longspan::configs
