#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "parallel/comm/communicator.h"

namespace longspan::trainer {

// What keeps ranks from going different ways. All of these are collective.

// Runs `body` on this rank; when it throws on any rank, throws the first such message on all.
void OnAllRanks(parallel::Communicator& world, const std::function<void()>& body);

// Throws Error on all ranks unless all pass the same `fingerprint` of `what` ("the configuration"):
// message sizes do not depend on what is in a file, so nothing else would notice that one rank
// reads another version of it.
void RequireSame(parallel::Communicator& world, const std::string& what, uint64_t fingerprint);

// The texts of all ranks, in order of rank, on every rank.
std::vector<std::string> GatherStrings(parallel::Communicator& world, const std::string& text);

// The checkpoint that a user means by `path` (ResolveCheckpoint), chosen by rank 0 for all: while
// another job saves into that run, each rank could find another newest one.
//
// Errors: those of ResolveCheckpoint.
std::filesystem::path AgreeOnCheckpoint(parallel::Communicator& world,
                                        const std::filesystem::path& path);

}  // namespace longspan::trainer
