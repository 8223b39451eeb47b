#include "parallel/comm/self.h"

#include <cstring>

#include "ops/core/cuda/backend.h"
#include "parallel/comm/arguments.h"
#include "parallel/comm/device_queue.h"

namespace longspan::parallel {

void SelfCommunicator::UseDevice(std::shared_ptr<cuda::Runtime> runtime) {
  if (runtime == nullptr) return;
  gpu_ = internal::DeviceOf(*runtime);
  runtime_ = std::move(runtime);
}

void SelfCommunicator::Copy(const Tensor& from, const Tensor& to) {
  if (from.raw() == to.raw() || from.bytes() == 0) return;
  if (internal::OnGpu(to)) {
    cuda::CopyOnDevice(*runtime_, to.raw(), from.raw(), from.bytes());
  } else {
    std::memcpy(to.raw(), from.raw(), from.bytes());
  }
}

Work SelfCommunicator::AllReduce(Tensor t, ReduceOp op) {
  internal::CheckAllReduce(t, op, gpu_);
  return Work();
}

Work SelfCommunicator::AllGather(Tensor in, Tensor out) {
  internal::CheckAllGather(in, out, 0, 1, gpu_);
  Copy(in, out);
  return Work();
}

Work SelfCommunicator::ReduceScatter(Tensor in, Tensor out) {
  internal::CheckReduceScatter(in, out, 1, gpu_);
  Copy(in, out);
  return Work();
}

Work SelfCommunicator::Broadcast(Tensor t, int root) {
  internal::CheckBroadcast(t, root, 1, gpu_);
  return Work();
}

Work SelfCommunicator::Exchange(std::vector<Send> sends, std::vector<Recv> recvs) {
  if (internal::CheckExchange(sends, recvs, 0, 1, gpu_)) {
    internal::ExchangeWithSelf(sends, recvs, 0, [this](void* to, const void* from, size_t bytes) {
      cuda::CopyOnDevice(*runtime_, to, from, bytes);
    });
  } else {
    internal::ExchangeWithSelf(sends, recvs, 0, internal::MoveOnHost);
  }
  return Work();
}

std::unique_ptr<Communicator> SelfCommunicator::Split(int color, int) {
  if (color < 0) return nullptr;
  auto part = std::make_unique<SelfCommunicator>();
  part->UseDevice(runtime_);
  return part;
}

void SelfCommunicator::Abort(const std::string& reason) { throw CommError(reason); }

}  // namespace longspan::parallel
