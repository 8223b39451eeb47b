// Communicators and the streams of a GPU: nobody stops the host, and nothing runs before what it
// depends on. On the emulated device, whose streams lag behind at random.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "ops/core/context.h"
#include "ops/core/cuda/backend.h"
#include "parallel/comm/local.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/self.h"
#include "tests/emulated_cuda/emulator.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::RecvInto;
using parallel::ReduceOp;
using parallel::RunLocal;
using parallel::SendOf;
using parallel::Work;

Context GpuContext(int index = 0) {
  return Context(
      ContextOptions{.device = {DeviceKind::kCuda, index}, .threads = 1, .poison_buffers = true});
}

Tensor Constant(Context& ctx, int64_t n, float value) {
  const std::vector<float> values(static_cast<size_t>(n), value);
  Tensor t = ctx.Empty({n}, DType::kF32);
  cuda::Upload(ctx.cuda(), t.raw(), values.data(), t.bytes());
  return t;
}

// Elements that differ from `value`, in the order of the compute stream.
int64_t Wrong(Context& ctx, const Tensor& t, float value) {
  std::vector<float> values(static_cast<size_t>(t.numel()));
  cuda::Download(ctx.cuda(), values.data(), t.raw(), t.bytes());
  return std::ranges::count_if(values, [&](float x) { return x != value; });
}

class Lag {
 public:
  explicit Lag(int microseconds) { emulated::SetLag(microseconds); }
  ~Lag() { emulated::SetLag(0); }
};

// Each kind of communicator among threads.
enum class Kind { kLocal, kNccl };
class DeviceOrder : public testing::TestWithParam<Kind> {
 protected:
  static void Run(int ranks, const std::function<void(Communicator&, Context&)>& body) {
    RunLocal(ranks, [&](Communicator& local) {
      Context ctx = GpuContext();
      local.UseDevice(ctx.runtime());
      if (GetParam() == Kind::kLocal) return body(local, ctx);
      parallel::NcclOptions options;
      options.exit_after_s = 0;
      const auto nccl = parallel::MakeNccl(local, ctx.runtime(), options);
      body(*nccl, ctx);
    });
  }
};

TEST_P(DeviceOrder, AStepOfOperationsNeverStopsTheHost) {
  Run(2, [](Communicator& comm, Context& ctx) {
    constexpr int64_t kN = 10000;
    const int other = 1 - comm.rank();
    Tensor sum = Constant(ctx, kN, 1), in = ctx.Empty({kN}, DType::kF32);
    Tensor out = Constant(ctx, kN, 2), all = ctx.Empty({2 * kN}, DType::kF32);
    Tensor part = ctx.Empty({kN}, DType::kF32);
    comm.Barrier();
    const auto step = [&] {
      Work reduce = comm.AllReduce(sum, ReduceOp::kSum);
      Work hop = comm.Exchange({SendOf(other, out)}, {RecvInto(other, in)});
      Work gather = comm.AllGather(out, all);
      reduce.Wait(), hop.Wait(), gather.Wait();
      comm.ReduceScatter(all, part).Wait();
      comm.Broadcast(part, 0).Wait();
    };
    step();
    comm.Barrier();
    // Both ranks count in one process: neither may wait between these looks.
    const auto before = emulated::Count();
    for (int i = 0; i < 3; ++i) step();
    const auto after = emulated::Count();
    EXPECT_EQ(after.host_waits, before.host_waits);
    EXPECT_EQ(after.blocking_copies, before.blocking_copies);
    EXPECT_EQ(after.allocations, before.allocations);
    comm.Barrier();
    EXPECT_EQ(Wrong(ctx, part, 4), 0);
  });
}

// The transfer waits for what the compute stream has been given, and what it is given later does
// not wait for the transfer.
TEST_P(DeviceOrder, WorkBesideATransferDoesNotWaitForIt) {
  constexpr int64_t kN = 1000;
  Run(2, [](Communicator& comm, Context& ctx) {
    const Lag lag(3000);
    for (int round = 0; round < 10; ++round) {
      const float mine = static_cast<float>(10 * round + comm.rank());
      const Tensor out = Constant(ctx, kN, mine);
      Tensor in = ctx.Empty({kN}, DType::kF32);
      Work hop = comm.Exchange({SendOf(1 - comm.rank(), out)}, {RecvInto(1 - comm.rank(), in)});
      const Tensor beside = Constant(ctx, kN, -mine);
      EXPECT_EQ(Wrong(ctx, beside, -mine), 0);
      hop.Wait();
      EXPECT_EQ(Wrong(ctx, in, static_cast<float>(10 * round + 1 - comm.rank())), 0);
    }
  });
}

// Done is about the device, Wait about the order.
TEST_P(DeviceOrder, DoneFollowsTheDevice) {
  Run(2, [](Communicator& comm, Context& ctx) {
    Tensor t = Constant(ctx, 1000, 1);
    comm.Barrier();
    const Lag lag(50000);
    Work work = comm.AllReduce(t, ReduceOp::kSum);
    EXPECT_FALSE(work.Done());
    while (!work.Done()) {
    }
    EXPECT_EQ(work.CompletedFraction(), 1.0);
    comm.Barrier();
    EXPECT_EQ(Wrong(ctx, t, 2), 0);
  });
}

// Reuse of what was sent, received and summed, with streams that are far apart. A wait that is
// missing on either side shows as a wrong element.
TEST_P(DeviceOrder, BuffersAreReusedAtOnceWhileStreamsLag) {
  constexpr int64_t kN = 5000;
  for (int ranks : {2, 3}) {
    Run(ranks, [](Communicator& comm, Context& ctx) {
      const Lag lag(1000);
      const int p = comm.size(), next = (comm.rank() + 1) % p, last = (comm.rank() + p - 1) % p;
      Tensor out = ctx.Empty({kN}, DType::kF32), in = ctx.Empty({kN}, DType::kF32);
      Tensor sum = ctx.Empty({kN}, DType::kF32);
      std::vector<float> values(kN);
      const auto fill = [&](const Tensor& t, float value) {
        std::fill(values.begin(), values.end(), value);
        cuda::Upload(ctx.cuda(), t.raw(), values.data(), t.bytes());
      };
      for (int round = 0; round < 12; ++round) {
        const auto value = [&](int rank) { return static_cast<float>(100 * round + rank); };
        fill(out, value(comm.rank()));
        fill(sum, value(comm.rank()));
        Work hop = comm.Exchange({SendOf(next, out)}, {RecvInto(last, in)});
        Work total = comm.AllReduce(sum, ReduceOp::kSum);
        hop.Wait();
        fill(out, -1);  // the peer must have its copy
        total.Wait();
        EXPECT_EQ(Wrong(ctx, in, value(last)), 0);
        EXPECT_EQ(Wrong(ctx, sum, static_cast<float>(100 * round * p + p * (p - 1) / 2)), 0);
        fill(in, -2), fill(sum, -3);
      }
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Comm, DeviceOrder, testing::Values(Kind::kLocal, Kind::kNccl),
                         [](const auto& info) {
                           return info.param == Kind::kLocal ? "local" : "nccl";
                         });

TEST(DeviceCommTest, SelfCopiesInTheOrderOfTheComputeStream) {
  const Lag lag(2000);
  Context ctx = GpuContext();
  parallel::SelfCommunicator self;
  self.UseDevice(ctx.runtime());
  Tensor in = Constant(ctx, 100, 3), out = ctx.Empty({100}, DType::kF32);
  Tensor back = ctx.Empty({100}, DType::kF32);
  self.AllGather(in, out).Wait();
  self.Split(0, 0)->Exchange({SendOf(0, out)}, {RecvInto(0, back)}).Wait();
  EXPECT_EQ(Wrong(ctx, back, 3), 0);
}

TEST(DeviceCommTest, TensorsOfAnUnknownGpuAreRefused) {
  emulated::SetDeviceCount(2);
  {
    Context first = GpuContext(0), second = GpuContext(1);
    Tensor here = Constant(first, 4, 1), there = Constant(second, 4, 1);
    std::vector<float> host(4);
    RunLocal(1, [&](Communicator& comm) {
      EXPECT_THROW(comm.AllReduce(here, ReduceOp::kSum), InvalidArgument) << "before UseDevice";
      EXPECT_THROW(comm.Exchange({SendOf(0, here)}, {RecvInto(0, here)}), InvalidArgument);
      comm.UseDevice(nullptr);  // of a Context on the CPU
      comm.UseDevice(first.runtime());
      EXPECT_THROW(comm.AllReduce(there, ReduceOp::kSum), InvalidArgument) << "another GPU";
      EXPECT_THROW(comm.AllGather(here, there), InvalidArgument);
      EXPECT_THROW(comm.UseDevice(second.runtime()), InvalidArgument);
      EXPECT_THROW(comm.Exchange({SendOf(0, here)}, {{0, host.data(), 16}}), InvalidArgument)
          << "host and GPU in one call";
      EXPECT_THROW(comm.Exchange({{0, here.raw(), 20, here}}, {}), InvalidArgument)
          << "beyond its tensor";
      EXPECT_THROW(comm.Exchange({SendOf(0, here.Rows(0, 3))}, {RecvInto(0, here.Rows(1, 4))}),
                   InvalidArgument)
          << "overlap";
    });
  }
  emulated::SetDeviceCount(1);
}

std::string ErrorOf(const std::function<void(Communicator&)>& body) {
  try {
    RunLocal(2, body);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(DeviceCommTest, RanksThatMeanDifferentMemoryAreNamed) {
  std::string error = ErrorOf([](Communicator& comm) {
    Context gpu = GpuContext(), cpu(ContextOptions{.threads = 1});
    comm.UseDevice(gpu.runtime());
    Context& ctx = comm.rank() == 0 ? gpu : cpu;
    comm.AllReduce(ctx.Zeros({4}, DType::kF32), ReduceOp::kSum).Wait();
  });
  EXPECT_NE(error.find("on the host"), std::string::npos) << error;
  EXPECT_NE(error.find("on its GPU"), std::string::npos) << error;
  emulated::SetDeviceCount(2);
  error = ErrorOf([](Communicator& comm) {
    Context ctx = GpuContext(comm.rank());
    comm.UseDevice(ctx.runtime());
    comm.AllReduce(ctx.Zeros({4}, DType::kF32), ReduceOp::kSum).Wait();
  });
  emulated::SetDeviceCount(1);
  EXPECT_NE(error.find("ranks as threads share one GPU"), std::string::npos) << error;
}

// Sums on the GPU add ranks in order, as on the host: the same bits for any length and alignment.
TEST(DeviceCommTest, LocalSumsHaveTheBitsOfTheHost) {
  for (const DType dtype : {DType::kF32, DType::kF64, DType::kI32, DType::kI64}) {
    for (const int64_t skip : {0, 1}) {
      for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
        RunLocal(3, [&](Communicator& comm) {
          constexpr int64_t kN = 1037;
          Context cpu(ContextOptions{.threads = 1});
          Context gpu = GpuContext();
          comm.UseDevice(gpu.runtime());
          Tensor host = cpu.Empty({kN}, dtype), device = gpu.Empty({kN}, dtype);
          for (int64_t i = 0; i < kN; ++i) {
            const double x = std::sin(static_cast<double>(i * 3 + comm.rank())) * 1e3;
            if (dtype == DType::kF32) host.data<float>()[i] = static_cast<float>(x);
            if (dtype == DType::kF64) host.data<double>()[i] = x;
            if (dtype == DType::kI32) host.data<int32_t>()[i] = static_cast<int32_t>(x);
            if (dtype == DType::kI64) host.data<int64_t>()[i] = static_cast<int64_t>(x * 1e12);
          }
          cuda::Upload(gpu.cuda(), device.raw(), host.raw(), host.bytes());
          comm.AllReduce(host.Rows(skip, kN), op).Wait();
          comm.AllReduce(device.Rows(skip, kN), op).Wait();
          std::vector<std::byte> got(device.bytes());
          cuda::Download(gpu.cuda(), got.data(), device.raw(), got.size());
          EXPECT_EQ(std::memcmp(got.data(), host.raw(), got.size()), 0)
              << ToString(dtype) << " skip " << skip << " op " << static_cast<int>(op);
        });
      }
    }
  }
}

// A device that fails while ranks meet ends in an error on all of them, not in a hang.
TEST(DeviceCommTest, AFailedLaunchReachesAllRanks) {
  const std::string error = ErrorOf([](Communicator& comm) {
    Context ctx = GpuContext();
    comm.UseDevice(ctx.runtime());
    Tensor t = Constant(ctx, 64, 1);
    comm.Barrier();
    if (comm.rank() == 0) emulated::FailNext(emulated::Fault::kLaunch);
    comm.Barrier();
    EXPECT_THROW(comm.AllReduce(t, ReduceOp::kSum).Wait(), CommError);
    throw CommError("as expected");
  });
  EXPECT_EQ(error, "as expected");
  emulated::Recover();
}

}  // namespace
}  // namespace longspan::test
