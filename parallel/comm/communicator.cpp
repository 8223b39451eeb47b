#include "parallel/comm/communicator.h"

#include <cstring>

#include "parallel/comm/arguments.h"

namespace longspan::parallel {
namespace {

template <class T>
T AllReduceScalar(Communicator& comm, T value, ReduceOp op) {
  Tensor t = internal::HostTensor({1}, DTypeOf<T>());
  t.data<T>()[0] = value;
  comm.AllReduce(t, op).Wait();
  return t.data<T>()[0];
}

}  // namespace

int64_t AllReduceValue(Communicator& comm, int64_t value, ReduceOp op) {
  return AllReduceScalar(comm, value, op);
}

double AllReduceValue(Communicator& comm, double value, ReduceOp op) {
  return AllReduceScalar(comm, value, op);
}

std::string BroadcastString(Communicator& comm, const std::string& text, int root) {
  Tensor length = internal::HostTensor({1}, DType::kI64);
  length.data<int64_t>()[0] = static_cast<int64_t>(text.size());
  comm.Broadcast(length, root).Wait();
  Tensor bytes = internal::HostTensor({length.data<int64_t>()[0]}, DType::kU8);
  if (comm.rank() == root && !text.empty()) std::memcpy(bytes.raw(), text.data(), text.size());
  comm.Broadcast(bytes, root).Wait();
  return std::string(reinterpret_cast<const char*>(bytes.raw()), bytes.bytes());
}

std::string FirstError(Communicator& comm, const std::string& error) {
  const int64_t candidate = error.empty() ? comm.size() : comm.rank();
  const int64_t first = AllReduceValue(comm, candidate, ReduceOp::kMin);
  return first == comm.size() ? "" : BroadcastString(comm, error, static_cast<int>(first));
}

}  // namespace longspan::parallel
