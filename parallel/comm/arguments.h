#pragma once
#include <functional>
#include <optional>
#include <vector>

#include "parallel/comm/communicator.h"

// Argument checks that all communicators share. Each throws InvalidArgument naming the operation
// before anything is issued. `gpu` is the GPU of UseDevice, if any; operands lie on the host or on
// that GPU, all of them on one of the two.
namespace longspan::parallel::internal {

using Gpu = std::optional<Device>;

inline bool OnGpu(const Tensor& t) { return t.defined() && t.device().kind == DeviceKind::kCuda; }

void CheckAllReduce(const Tensor& t, ReduceOp op, const Gpu& gpu);
void CheckAllGather(const Tensor& in, const Tensor& out, int rank, int size, const Gpu& gpu);
void CheckReduceScatter(const Tensor& in, const Tensor& out, int size, const Gpu& gpu);
void CheckBroadcast(const Tensor& t, int root, int size, const Gpu& gpu);
// For rank `rank` of `size`. Returns whether the messages lie in GPU memory; messages of zero bytes
// lie nowhere.
bool CheckExchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs, int rank,
                   int size, const Gpu& gpu);

// Carries out the messages of one Exchange that `rank` sends to itself and removes them from the
// lists. Throws CommError when its sends and receives differ in number or size. `copy` moves bytes
// between memory that may overlap; std::memmove for host memory.
using CopyBytes = std::function<void(void* to, const void* from, size_t bytes)>;
void ExchangeWithSelf(std::vector<Send>& sends, std::vector<Recv>& recvs, int rank,
                      const CopyBytes& copy);
void MoveOnHost(void* to, const void* from, size_t bytes);

// A host tensor outside of any Context, for the small values that ranks agree on.
Tensor HostTensor(Shape shape, DType dtype);

}  // namespace longspan::parallel::internal
