#include "ops/attention/cpu/attention_cpu.h"
#include "ops/core/cpu/amx.h"

namespace longspan::ops::cpu {

bool AmxTilesUsable() { return AmxUsable(); }

}  // namespace longspan::ops::cpu
