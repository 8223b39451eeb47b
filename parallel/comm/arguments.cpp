#include "parallel/comm/arguments.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "ops/core/allocator.h"

namespace longspan::parallel::internal {
namespace {

void CheckPlace(const char* op, const char* name, const Tensor& t, const Gpu& gpu) {
  LONGSPAN_CHECK(t.defined()) << op << ": " << name << " is undefined";
  if (!OnGpu(t)) return;
  LONGSPAN_CHECK(gpu.has_value()) << op << ": " << name << " is on " << ToString(t.device())
                                  << ", and UseDevice has not been called";
  LONGSPAN_CHECK(t.device() == *gpu) << op << ": " << name << " is on " << ToString(t.device())
                                     << ", and this rank uses " << ToString(*gpu);
}

void CheckReducible(const char* op, const Tensor& t) {
  const DType d = t.dtype();
  LONGSPAN_CHECK(d == DType::kF32 || d == DType::kF64 || d == DType::kI32 || d == DType::kI64)
      << op << " of " << t.Describe() << ": reduce in f32, f64, i32 or i64";
}

// The larger tensor must be `size` times the smaller one, stacked along dim 0.
void CheckStacked(const char* op, const char* small_name, const Tensor& small,
                  const char* large_name, const Tensor& large, int size, const Gpu& gpu) {
  CheckPlace(op, small_name, small, gpu);
  CheckPlace(op, large_name, large, gpu);
  LONGSPAN_CHECK(small.device() == large.device())
      << op << ": " << small_name << " is on " << ToString(small.device()) << " and " << large_name
      << " on " << ToString(large.device());
  bool fits = small.dtype() == large.dtype() && small.rank() >= 1 && small.rank() == large.rank() &&
              large.dim(0) == small.dim(0) * size;
  for (int i = 1; fits && i < small.rank(); ++i) fits = small.dim(i) == large.dim(i);
  LONGSPAN_CHECK(fits) << op << ": " << large_name << " " << large.Describe() << " is not " << size
                       << " times " << small_name << " " << small.Describe() << " along dim 0";
}

bool Overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  const auto *p = static_cast<const std::byte*>(a), *q = static_cast<const std::byte*>(b);
  return a_bytes > 0 && b_bytes > 0 && p < q + b_bytes && q < p + a_bytes;
}
bool Overlap(const Tensor& a, const Tensor& b) {
  return Overlap(a.raw(), static_cast<int64_t>(a.bytes()), b.raw(),
                 static_cast<int64_t>(b.bytes()));
}

// No two messages of an Exchange write the same bytes.
void CheckApart(const std::vector<Recv>& recvs) {
  for (size_t i = 0; i < recvs.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      LONGSPAN_CHECK(!Overlap(recvs[i].data, recvs[i].bytes, recvs[j].data, recvs[j].bytes))
          << "Exchange: receives " << j << " and " << i << " overlap";
    }
  }
}

// Nor does one write what another reads: a device moves all messages at the same time. Only a
// message of rank `rank` to itself may stay where it is.
void CheckApart(const std::vector<Send>& sends, const std::vector<Recv>& recvs, int rank) {
  int64_t from_self = 0;
  for (const Recv& r : recvs) {
    const int64_t number = r.peer == rank && r.bytes > 0 ? from_self++ : -1;
    int64_t to_self = 0;
    for (const Send& s : sends) {
      const bool same = s.peer == rank && s.bytes > 0 && to_self++ == number;
      const bool stays = same && s.data == r.data && s.bytes == r.bytes;
      LONGSPAN_CHECK(stays || !Overlap(s.data, s.bytes, r.data, r.bytes))
          << "Exchange: a send of " << s.bytes << " bytes to rank " << s.peer
          << " and a receive of " << r.bytes << " bytes from rank " << r.peer
          << " overlap in GPU memory";
    }
  }
}

}  // namespace

void CheckAllReduce(const Tensor& t, ReduceOp op, const Gpu& gpu) {
  CheckPlace("AllReduce", "t", t, gpu);
  CheckReducible("AllReduce", t);
  LONGSPAN_CHECK(op == ReduceOp::kSum || op == ReduceOp::kMax || op == ReduceOp::kMin)
      << "AllReduce: unknown reduction " << static_cast<int>(op);
}

void CheckAllGather(const Tensor& in, const Tensor& out, int rank, int size, const Gpu& gpu) {
  CheckStacked("AllGather", "in", in, "out", out, size, gpu);
  const bool in_place = in.raw() == out.raw() + static_cast<size_t>(rank) * in.bytes();
  LONGSPAN_CHECK(in_place || !Overlap(in, out))
      << "AllGather: in overlaps out outside of the rows of rank " << rank;
}

void CheckReduceScatter(const Tensor& in, const Tensor& out, int size, const Gpu& gpu) {
  CheckStacked("ReduceScatter", "out", out, "in", in, size, gpu);
  CheckReducible("ReduceScatter", in);
  LONGSPAN_CHECK(!Overlap(in, out)) << "ReduceScatter: in and out overlap";
}

void CheckBroadcast(const Tensor& t, int root, int size, const Gpu& gpu) {
  CheckPlace("Broadcast", "t", t, gpu);
  LONGSPAN_CHECK(root >= 0 && root < size)
      << "Broadcast: root " << root << " of " << size << " ranks";
}

bool CheckExchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs, int rank,
                   int size, const Gpu& gpu) {
  bool on_gpu = false, on_host = false;
  auto check = [&](const char* what, const auto& m) {
    LONGSPAN_CHECK(m.peer >= 0 && m.peer < size)
        << "Exchange: " << what << " with peer " << m.peer << " of " << size << " ranks";
    LONGSPAN_CHECK(m.bytes >= 0) << "Exchange: " << what << " of " << m.bytes << " bytes";
    LONGSPAN_CHECK(m.data != nullptr || m.bytes == 0)
        << "Exchange: " << what << " of " << m.bytes << " bytes at a null pointer";
    if (m.bytes == 0) return;
    if (m.owner.defined()) {
      CheckPlace("Exchange", what, m.owner, gpu);
      const auto* data = static_cast<const std::byte*>(m.data);
      LONGSPAN_CHECK(data >= m.owner.raw() && data + m.bytes <= m.owner.raw() + m.owner.bytes())
          << "Exchange: " << what << " of " << m.bytes << " bytes outside of its tensor "
          << m.owner.Describe();
    }
    (OnGpu(m.owner) ? on_gpu : on_host) = true;
  };
  for (const Send& s : sends) check("send", s);
  for (const Recv& r : recvs) check("receive", r);
  LONGSPAN_CHECK(!(on_gpu && on_host)) << "Exchange: messages in host memory and in GPU memory";
  CheckApart(recvs);
  if (on_gpu) CheckApart(sends, recvs, rank);
  return on_gpu;
}

void ExchangeWithSelf(std::vector<Send>& sends, std::vector<Recv>& recvs, int rank,
                      const CopyBytes& copy) {
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
    copy(own_recvs[i].data, own_sends[i].data, static_cast<size_t>(own_sends[i].bytes));
  }
  std::erase_if(sends, to_self);
  std::erase_if(recvs, to_self);
}

void MoveOnHost(void* to, const void* from, size_t bytes) { std::memmove(to, from, bytes); }

Tensor HostTensor(Shape shape, DType dtype) {
  const auto allocator = std::make_shared<Allocator>();
  const size_t bytes = static_cast<size_t>(shape.numel()) * SizeOf(dtype);
  return Tensor(std::make_shared<Storage>(allocator, bytes), 0, shape, dtype, Device{});
}

}  // namespace longspan::parallel::internal
