#pragma once

namespace longspan::emulated {

// Fills the static shared memory of all kernels, as this host thread has it, with poison. Nothing
// happens in a binary without symbols.
void PoisonStaticShared();

}  // namespace longspan::emulated
