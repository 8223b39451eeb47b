// Binaries without NCCL.
#include "parallel/comm/nccl.h"

namespace longspan::parallel {
namespace {

[[noreturn]] void Refuse() {
  throw Unsupported("NCCL is not built into this binary; ranks can exchange through MPI");
}

}  // namespace

bool NcclBuiltIn() { return false; }
void RepeatNcclSums() {}
std::string MakeNcclId() { Refuse(); }
std::unique_ptr<Communicator> MakeNccl(Communicator&, std::shared_ptr<cuda::Runtime>,
                                       const NcclOptions&) {
  Refuse();
}
std::unique_ptr<Communicator> MakeNccl(const std::string&, int, int, std::shared_ptr<cuda::Runtime>,
                                       const NcclOptions&) {
  Refuse();
}

}  // namespace longspan::parallel
