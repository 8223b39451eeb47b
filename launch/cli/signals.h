#pragma once

namespace longspan::launch {

// From now on SIGUSR1, SIGTERM and SIGINT only set a flag, so that a run can save before it ends. A
// second SIGINT or SIGTERM has its usual effect.
void CatchStopSignals();
bool StopRequested();

}  // namespace longspan::launch
