#pragma once

namespace longspan {

// Whether this process may use AMX tiles with bf16: the processor has them and the kernel has given
// its permission, which is asked for at the first call.
bool AmxUsable();

}  // namespace longspan
