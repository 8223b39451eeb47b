#include "trainer/model/options.h"

#include "ops/core/error.h"

namespace longspan::trainer {

std::string MixerOptions::ToString() const {
  if (seer) {
    return Str("seer block ", seer->block_size, " gate_dim ", seer->gate_dim, " ",
               seer->selection.ToString());
  }
  if (duo) return Str("duo sinks ", duo->sinks, " recent ", duo->recent);
  if (moba) return moba->ToString();
  return pattern.ToString();
}

}  // namespace longspan::trainer
