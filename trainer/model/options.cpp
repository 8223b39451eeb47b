#include "trainer/model/options.h"

#include "ops/core/error.h"

namespace longspan::trainer {

std::string MixerOptions::ToString() const {
  if (duo) return Str("duo sinks ", duo->sinks, " recent ", duo->recent);
}

}  // namespace longspan::trainer
