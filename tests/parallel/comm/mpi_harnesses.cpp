// The ranks of this job.
#include "tests/parallel/comm/contract.h"
#include "tests/parallel/comm/mpi_main.h"

namespace longspan::test {

std::vector<Harness> Harnesses() {
  // A communicator of its own per test, so that one test's leftovers cannot reach the next.
  const Harness mpi{"mpi", [](const auto& body) {
                      const auto comm = Job().world().Split(0, Job().rank());
                      body(*comm);
                      comm->Barrier();
                    }};
  return {mpi, Counted(mpi)};
}

}  // namespace longspan::test
