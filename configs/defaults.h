#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "configs/proto/config.pb.h"

namespace longspan::configs {

// Values that an absent field stands for and that depend on other fields. Each returns the field's
// own value when it is given. All expect a config without problems (validate.h).
int64_t HeadDim(const Model& model);
Precision ResidualDtype(const Config& config);
int64_t HeadStep(const S2Pattern& s2, int64_t num_kv_heads);
double SigmoidBias(const Attention& sigmoid, int64_t context_length);
int64_t DecaySteps(const WsdSchedule& wsd, int64_t run_steps);  // at least 1

// One word of model.layers: a mixer's name and how many layers in a row have it. `count` is 0 when
// what follows the name is not * and a whole number from 1 to 65536.
struct LayerRun {
  std::string name;
  int64_t count;
};
std::vector<LayerRun> LayerRuns(const std::string& layers);

// Position in model.mixer of the mixer of each layer: model.layers, repeated up to num_layers.
// ConfigError when a word of it is not a mixer's name with a count.
std::vector<int> LayerMixers(const Model& model);

// Writes every absent value explicitly, except those that only the machine decides (run.threads 0)
// and those that have no meaning beside others (head_step of a homogeneous pattern). Idempotent.
void FillDefaults(Config& config);

}  // namespace longspan::configs
