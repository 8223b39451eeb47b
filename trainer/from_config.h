#pragma once
#include "configs/load.h"
#include "trainer/options.h"

namespace longspan::trainer {

// The plain options of a loaded configuration, for a job of `world_size` ranks. Adds to the checks
// of the configs module those that need other modules: attention patterns, devices, rank counts.
// Throws ConfigError with all problems and their places.
TrainOptions OptionsFromConfig(const configs::LoadedConfig& loaded, int world_size);

// The model alone, without any check of ranks or data (inspection, parameter counts).
ModelOptions ModelFromConfig(const configs::Config& config);

}  // namespace longspan::trainer
