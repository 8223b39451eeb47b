#include "parallel/comm/arguments.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "ops/core/allocator.h"

namespace longspan::parallel::internal {
namespace {

void CheckHostTensor(const char* op, const char* name, const Tensor& t) {
  LONGSPAN_CHECK(t.defined()) << op << ": " << name << " is undefined";
  LONGSPAN_CHECK(t.device().kind == DeviceKind::kCpu)
      << op << ": " << name << " is on " << ToString(t.device()) << "; only host tensors travel";
}

void CheckReducible(const char* op, const Tensor& t) {
  const DType d = t.dtype();
  LONGSPAN_CHECK(d == DType::kF32 || d == DType::kF64 || d == DType::kI32 || d == DType::kI64)
      << op << " of " << t.Describe() << ": reduce in f32, f64, i32 or i64";
}

// The larger tensor must be `size` times the smaller one, stacked along dim 0.
void CheckStacked(const char* op, const char* small_name, const Tensor& small,
                  const char* large_name, const Tensor& large, int size) {
  CheckHostTensor(op, small_name, small);
  CheckHostTensor(op, large_name, large);
  bool fits = small.dtype() == large.dtype() && small.rank() >= 1 && small.rank() == large.rank() &&
              large.dim(0) == small.dim(0) * size;
  for (int i = 1; fits && i < small.rank(); ++i) fits = small.dim(i) == large.dim(i);
  LONGSPAN_CHECK(fits) << op << ": " << large_name << " " << large.Describe() << " is not " << size
                       << " times " << small_name << " " << small.Describe() << " along dim 0";
}

bool Overlap(const Tensor& a, const Tensor& b) {
  return a.bytes() > 0 && b.bytes() > 0 && a.raw() < b.raw() + b.bytes() &&
         b.raw() < a.raw() + a.bytes();
}

}  // namespace

void CheckAllReduce(const Tensor& t, ReduceOp op) {
  CheckHostTensor("AllReduce", "t", t);
  CheckReducible("AllReduce", t);
  LONGSPAN_CHECK(op == ReduceOp::kSum || op == ReduceOp::kMax || op == ReduceOp::kMin)
      << "AllReduce: unknown reduction " << static_cast<int>(op);
}

void CheckAllGather(const Tensor& in, const Tensor& out, int rank, int size) {
  CheckStacked("AllGather", "in", in, "out", out, size);
  const bool in_place = in.raw() == out.raw() + static_cast<size_t>(rank) * in.bytes();
  LONGSPAN_CHECK(in_place || !Overlap(in, out))
      << "AllGather: in overlaps out outside of the rows of rank " << rank;
}

void CheckReduceScatter(const Tensor& in, const Tensor& out, int size) {
  CheckStacked("ReduceScatter", "out", out, "in", in, size);
  CheckReducible("ReduceScatter", in);
  LONGSPAN_CHECK(!Overlap(in, out)) << "ReduceScatter: in and out overlap";
}

void CheckBroadcast(const Tensor& t, int root, int size) {
  CheckHostTensor("Broadcast", "t", t);
  LONGSPAN_CHECK(root >= 0 && root < size)
      << "Broadcast: root " << root << " of " << size << " ranks";
}

void CheckExchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs, int size) {
  auto check = [size](const char* what, int peer, const void* data, int64_t bytes) {
    LONGSPAN_CHECK(peer >= 0 && peer < size)
        << "Exchange: " << what << " with peer " << peer << " of " << size << " ranks";
    LONGSPAN_CHECK(bytes >= 0) << "Exchange: " << what << " of " << bytes << " bytes";
    LONGSPAN_CHECK(data != nullptr || bytes == 0)
        << "Exchange: " << what << " of " << bytes << " bytes at a null pointer";
  };
  for (const Send& s : sends) check("send", s.peer, s.data, s.bytes);
  for (const Recv& r : recvs) check("receive", r.peer, r.data, r.bytes);
}

void ExchangeWithSelf(std::vector<Send>& sends, std::vector<Recv>& recvs, int rank) {
  auto to_self = [rank](const auto& message) { return message.peer == rank && message.bytes > 0; };
  std::vector<Send> own_sends;
  std::vector<Recv> own_recvs;
  std::ranges::copy_if(sends, std::back_inserter(own_sends), to_self);
  std::ranges::copy_if(recvs, std::back_inserter(own_recvs), to_self);
  if (own_sends.size() != own_recvs.size()) {
    throw CommError(Str("Exchange: rank ", rank, " sends itself ", own_sends.size(),
                        " messages but receives ", own_recvs.size()));
  }
  for (size_t i = 0; i < own_sends.size(); ++i) {
    if (own_sends[i].bytes != own_recvs[i].bytes) {
      throw CommError(Str("Exchange: message ", i, " from rank ", rank, " to itself has ",
                          own_sends[i].bytes, " bytes but ", own_recvs[i].bytes, " are expected"));
    }
  }
  for (size_t i = 0; i < own_sends.size(); ++i) {
    std::memmove(own_recvs[i].data, own_sends[i].data, static_cast<size_t>(own_sends[i].bytes));
  }
  std::erase_if(sends, to_self);
  std::erase_if(recvs, to_self);
}

Tensor HostTensor(Shape shape, DType dtype) {
  const auto allocator = std::make_shared<Allocator>();
  const size_t bytes = static_cast<size_t>(shape.numel()) * SizeOf(dtype);
  return Tensor(std::make_shared<Storage>(allocator, bytes), 0, shape, dtype, Device{});
}

}  // namespace longspan::parallel::internal
