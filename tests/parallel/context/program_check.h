#pragma once
#include <vector>

#include "parallel/context/builder.h"

namespace longspan::test {

// Fails the test when a program reads rows that nothing has written, touches rows of a transfer in
// flight (sent ones may be read), leaves a transfer unfinished, or leaves its arenas. `kept`: what
// the forward program has written to kKept; becomes what this one has. Programs with masks only.
void CheckProgram(const parallel::Program& program, int64_t row_length, std::vector<bool>& kept);

// Fails unless the n-th transfer of every rank meets the n-th of all others: between two ranks the
// same messages in the same order.
void CheckTransfersMatch(const std::vector<parallel::Program>& ranks);

// Fails unless both programs have the same transfers, steps of the same work and sizes of arenas.
void CheckSameOutline(const parallel::Program& a, const parallel::Program& b);

}  // namespace longspan::test
