// Communicators that need no launcher: self, and threads as ranks.
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/parallel/comm/contract.h"

namespace longspan::test {

std::vector<Harness> Harnesses() {
  std::vector<Harness> all;
  all.push_back({"self", [](const auto& body) {
                   parallel::SelfCommunicator self;
                   body(self);
                 }});
  for (int ranks = 1; ranks <= 5; ++ranks) {
    all.push_back(
        {Str("local_", ranks), [ranks](const auto& body) { parallel::RunLocal(ranks, body); }});
  }
  const size_t plain = all.size();
  for (size_t i = 0; i < plain; ++i) all.push_back(Counted(all[i]));
  return all;
}

}  // namespace longspan::test
