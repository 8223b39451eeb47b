#pragma once

// The emulated NCCL: ranks are threads of one process, each with a communicator and a stream of its
// own, also on one device. Where it is stricter than the library, so that mistakes show:
//   - Only non-blocking communicators. What is issued reaches its stream only after the state has
//     been asked for several times; issuing more before that is an error.
//   - Buffers must be device memory, and sizes must match.
//   - Split with operations under way is an error; the new handle is null until all ranks came.
// An operation occupies its stream until all ranks it needs have come to it, or its communicator is
// aborted. Sums add ranks 0, 1, ... in order.
namespace longspan::emulated {

// From now on the communicators of this rank (in their own group) report the error when asked for
// their state; 0 ends that.
void FailNcclRank(int rank, int error);
// Communicators that were neither destroyed nor aborted, and those that were aborted.
int LiveNcclComms();
int AbortedNcclComms();

}  // namespace longspan::emulated
