#include "trainer/agreement.h"

#include "ops/core/error.h"
#include "trainer/checkpoint/directory.h"

namespace longspan::trainer {

void OnAllRanks(parallel::Communicator& world, const std::function<void()>& body) {
  std::string error;
  try {
    body();
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "unknown error";
  }
  error = parallel::FirstError(world, error);
  if (!error.empty()) throw Error(error);
}

void RequireSame(parallel::Communicator& world, const std::string& what, uint64_t fingerprint) {
  const std::string mine = std::to_string(fingerprint);
  const std::string root = parallel::BroadcastString(world, mine, 0);
  OnAllRanks(world, [&] {
    if (mine == root) return;
    throw Error(Str(what, " of rank ", world.rank(), " is not that of rank 0 (fingerprints ", mine,
                    " and ", root, "); let all ranks read the same files"));
  });
}

std::vector<std::string> GatherStrings(parallel::Communicator& world, const std::string& text) {
  std::vector<std::string> texts;
  for (int rank = 0; rank < world.size(); ++rank) {
    texts.push_back(parallel::BroadcastString(world, rank == world.rank() ? text : "", rank));
  }
  return texts;
}

std::filesystem::path AgreeOnCheckpoint(parallel::Communicator& world,
                                        const std::filesystem::path& path) {
  std::string resolved;
  OnAllRanks(world, [&] {
    if (world.rank() == 0) resolved = ResolveCheckpoint(path).string();
  });
  return parallel::BroadcastString(world, resolved, 0);
}

}  // namespace longspan::trainer
