#include "parallel/comm/self.h"

#include <cstring>

#include "parallel/comm/arguments.h"

namespace longspan::parallel {
namespace {

void Copy(const Tensor& from, const Tensor& to) {
  if (from.raw() != to.raw() && from.bytes() > 0) std::memcpy(to.raw(), from.raw(), from.bytes());
}

}  // namespace

Work SelfCommunicator::AllReduce(Tensor t, ReduceOp op) {
  internal::CheckAllReduce(t, op);
  return Work();
}

Work SelfCommunicator::AllGather(Tensor in, Tensor out) {
  internal::CheckAllGather(in, out, 0, 1);
  Copy(in, out);
  return Work();
}

Work SelfCommunicator::ReduceScatter(Tensor in, Tensor out) {
  internal::CheckReduceScatter(in, out, 1);
  Copy(in, out);
  return Work();
}

Work SelfCommunicator::Broadcast(Tensor t, int root) {
  internal::CheckBroadcast(t, root, 1);
  return Work();
}

Work SelfCommunicator::Exchange(std::vector<Send> sends, std::vector<Recv> recvs) {
  internal::CheckExchange(sends, recvs, 1);
  internal::ExchangeWithSelf(sends, recvs, 0);
  return Work();
}

std::unique_ptr<Communicator> SelfCommunicator::Split(int color, int) {
  if (color < 0) return nullptr;
  return std::make_unique<SelfCommunicator>();
}

void SelfCommunicator::Abort(const std::string& reason) { throw CommError(reason); }

}  // namespace longspan::parallel
