#pragma once
#include <vector>

#include "parallel/comm/communicator.h"

// Argument checks that all communicators share. Each throws InvalidArgument naming the operation
// before anything is issued.
namespace longspan::parallel::internal {

void CheckAllReduce(const Tensor& t, ReduceOp op);
void CheckAllGather(const Tensor& in, const Tensor& out, int rank, int size);
void CheckReduceScatter(const Tensor& in, const Tensor& out, int size);
void CheckBroadcast(const Tensor& t, int root, int size);
void CheckExchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs, int size);

// Carries out the messages of one Exchange that `rank` sends to itself and removes them from the
// lists. Throws CommError when its sends and receives differ in number or size.
void ExchangeWithSelf(std::vector<Send>& sends, std::vector<Recv>& recvs, int rank);

// A host tensor outside of any Context, for the small values that ranks agree on.
Tensor HostTensor(Shape shape, DType dtype);

}  // namespace longspan::parallel::internal
