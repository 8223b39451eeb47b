// What every communicator promises, in the words of parallel/comm/communicator.h.
#include "tests/parallel/comm/contract.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "ops/core/context.h"
#include "ops/core/cuda/backend.h"
#include "parallel/comm/counting.h"
#include "tests/support/device.h"

namespace longspan::test {

using parallel::Communicator;
using parallel::ReduceOp;
using parallel::Work;

Harness Counted(const Harness& harness) {
  return {harness.name + "_counted", [run = harness.run](const auto& body) {
            run([&](Communicator& comm) {
              parallel::CountingCommunicator counting(comm);
              body(counting);
            });
          }};
}

namespace {

// Element i of rank r: distinct over ranks and elements, exact in every dtype.
template <class T>
T Value(int rank, int64_t i) {
  return static_cast<T>((rank + 1) * 100 + i % 89);
}

template <class T>
Tensor FromHost(Context& ctx, Shape shape, const std::vector<T>& values) {
  Tensor t = ctx.Empty(shape, DTypeOf<T>());
  CopyFromHost(ctx, values.data(), t);
  return t;
}

// The elements as the compute stream of `ctx` sees them: it waits for nothing else.
template <class T>
std::vector<T> ToHost(Context& ctx, const Tensor& t) {
  std::vector<T> values(static_cast<size_t>(t.numel()));
  if (t.bytes() == 0) return values;
  if (OnCuda()) {
    cuda::Download(ctx.cuda(), values.data(), t.data<T>(), t.bytes());
  } else {
    std::memcpy(values.data(), t.raw(), t.bytes());
  }
  return values;
}

template <class T>
T At(Context& ctx, const Tensor& t, int64_t i) {
  return ToHost<T>(ctx, t)[static_cast<size_t>(i)];
}

template <class T>
Tensor Filled(Context& ctx, int64_t n, int rank) {
  std::vector<T> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = Value<T>(rank, i);
  return FromHost(ctx, {n}, values);
}

Tensor Bytes(Context& ctx, int64_t n, int value) {
  return FromHost(ctx, {n},
                  std::vector<uint8_t>(static_cast<size_t>(n), static_cast<uint8_t>(value)));
}

// First index at which `t` differs from expected(i), or -1.
template <class T, class F>
int64_t Mismatch(Context& ctx, const Tensor& t, F&& expected) {
  const std::vector<T> data = ToHost<T>(ctx, t);
  for (int64_t i = 0, n = t.numel(); i < n; ++i) {
    if (data[static_cast<size_t>(i)] != static_cast<T>(expected(i))) return i;
  }
  return -1;
}

// Lengths around the piece sizes of the implementations, and none at all. In bytes, the last is
// several pieces of the MPI communicator under test (256 KiB there) and of the local one.
constexpr int64_t kLengths[] = {0, 1, 7, 1023, 65537, 300001};

class CommContract : public testing::TestWithParam<Harness> {
 protected:
  static void Run(const std::function<void(Communicator&, Context&)>& body) {
    GetParam().run([&](Communicator& comm) {
      ContextOptions options;
      options.device = TestDevice();
      options.threads = 1;
      options.poison_buffers = true;
      Context ctx(options);
      comm.UseDevice(ctx.runtime());
      SCOPED_TRACE(Str("rank ", comm.rank(), " of ", comm.size()));
      body(comm, ctx);
    });
  }
};

TEST_P(CommContract, RankAndSizeAgree) {
  Run([](Communicator& comm, Context& ctx) {
    ASSERT_GE(comm.rank(), 0);
    ASSERT_LT(comm.rank(), comm.size());
    EXPECT_FALSE(comm.name().empty());
    Tensor mine = FromHost<int64_t>(ctx, {1}, {comm.rank()});
    Tensor all = ctx.Empty({comm.size()}, DType::kI64);
    comm.AllGather(mine, all).Wait();
    EXPECT_EQ(Mismatch<int64_t>(ctx, all, [](int64_t i) { return i; }), -1);
  });
}

template <class T>
void CheckAllReduce(Communicator& comm, Context& ctx) {
  const int last = comm.size() - 1;
  for (int64_t n : kLengths) {
    SCOPED_TRACE(Str(ToString(DTypeOf<T>()), "[", n, "]"));
    Tensor sum = Filled<T>(ctx, n, comm.rank());
    Tensor max = Filled<T>(ctx, n, comm.rank()), min = Filled<T>(ctx, n, comm.rank());
    comm.AllReduce(sum, ReduceOp::kSum).Wait();
    comm.AllReduce(max, ReduceOp::kMax).Wait();
    comm.AllReduce(min, ReduceOp::kMin).Wait();
    auto total = [&](int64_t i) {
      T value = 0;
      for (int r = 0; r <= last; ++r) value += Value<T>(r, i);
      return value;
    };
    EXPECT_EQ(Mismatch<T>(ctx, sum, total), -1);
    EXPECT_EQ(Mismatch<T>(ctx, max, [&](int64_t i) { return Value<T>(last, i); }), -1);
    EXPECT_EQ(Mismatch<T>(ctx, min, [&](int64_t i) { return Value<T>(0, i); }), -1);
  }
}

TEST_P(CommContract, AllReduceOfEveryDtypeAndOp) {
  Run([](Communicator& comm, Context& ctx) {
    CheckAllReduce<float>(comm, ctx);
    CheckAllReduce<double>(comm, ctx);
    CheckAllReduce<int32_t>(comm, ctx);
    CheckAllReduce<int64_t>(comm, ctx);
  });
}

TEST_P(CommContract, ReductionsGiveTheSameBitsOnAllRanksAndAgain) {
  Run([](Communicator& comm, Context& ctx) {
    constexpr int64_t kN = 300007;
    auto fill = [&] {  // magnitudes that make f32 sums depend on their order
      std::vector<float> values(kN);
      for (int64_t i = 0; i < kN; ++i) {
        values[static_cast<size_t>(i)] = std::sin(static_cast<float>(i * 7 + comm.rank() * 13)) *
                                         std::pow(10.0f, static_cast<float>((i + comm.rank()) % 7));
      }
      return FromHost(ctx, {kN}, values);
    };
    Tensor first = fill(), second = fill();
    comm.AllReduce(first, ReduceOp::kSum).Wait();
    comm.AllReduce(second, ReduceOp::kSum).Wait();
    const std::vector<float> sums = ToHost<float>(ctx, first);
    EXPECT_EQ(std::memcmp(sums.data(), ToHost<float>(ctx, second).data(), first.bytes()), 0);
    Tensor reference = first.Reshape({1, kN});
    Tensor all = ctx.Empty({comm.size(), kN}, DType::kF32);
    comm.AllGather(reference, all).Wait();
    for (int r = 0; r < comm.size(); ++r) {
      const std::vector<float> theirs = ToHost<float>(ctx, all.Rows(r, r + 1));
      EXPECT_EQ(std::memcmp(theirs.data(), sums.data(), first.bytes()), 0) << r;
    }
    // Every element must still be the sum of all ranks: the same garbage everywhere would pass.
    for (int64_t i = 0; i < kN; i += 997) {
      double sum = 0, scale = 0;
      for (int r = 0; r < comm.size(); ++r) {
        const double x = std::sin(static_cast<float>(i * 7 + r * 13)) *
                         std::pow(10.0f, static_cast<float>((i + r) % 7));
        sum += x;
        scale += std::abs(x);
      }
      EXPECT_NEAR(sums[static_cast<size_t>(i)], sum, 1e-6 * scale) << i;
    }
  });
}

template <class T>
void CheckAllGather(Communicator& comm, Context& ctx) {
  for (int64_t n : {0, 1, 7, 1023, 65537}) {
    SCOPED_TRACE(Str(ToString(DTypeOf<T>()), "[", n, ", 3]"));
    auto fill = [&](Tensor t) {
      std::vector<T> values;
      for (int64_t i = 0; i < n * 3; ++i) values.push_back(T(Value<float>(comm.rank(), i)));
      CopyFromHost(ctx, values.data(), t);
    };
    auto check = [&](const Tensor& out) {
      const std::vector<T> values = ToHost<T>(ctx, out);
      const T* data = values.data();
      int64_t wrong = 0;
      for (int r = 0; r < comm.size(); ++r) {
        for (int64_t i = 0; i < n * 3; ++i, ++data) {
          wrong += static_cast<float>(*data) != static_cast<float>(T(Value<float>(r, i)));
        }
      }
      EXPECT_EQ(wrong, 0);
    };
    Tensor in = ctx.Empty({n, 3}, DTypeOf<T>()),
           out = ctx.Empty({n * comm.size(), 3}, DTypeOf<T>());
    fill(in);
    comm.AllGather(in, out).Wait();
    check(out);
    Tensor again = ctx.Empty({n * comm.size(), 3}, DTypeOf<T>());  // in place
    Tensor mine = again.Rows(comm.rank() * n, (comm.rank() + 1) * n);
    fill(mine);
    comm.AllGather(mine, again).Wait();
    check(again);
  }
}

TEST_P(CommContract, AllGatherStacksRowsInRankOrder) {
  Run([](Communicator& comm, Context& ctx) {
    CheckAllGather<float>(comm, ctx);
    CheckAllGather<BF16>(comm, ctx);
    CheckAllGather<int64_t>(comm, ctx);
  });
}

TEST_P(CommContract, ReduceScatterSumsOwnRows) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size();
    for (int64_t n : kLengths) {
      Tensor in = Filled<double>(ctx, n * p, comm.rank()), out = ctx.Empty({n}, DType::kF64);
      comm.ReduceScatter(in, out).Wait();
      auto expected = [&](int64_t i) {
        double sum = 0;
        for (int r = 0; r < p; ++r) sum += Value<double>(r, comm.rank() * n + i);
        return sum;
      };
      EXPECT_EQ(Mismatch<double>(ctx, out, expected), -1) << n;
      EXPECT_EQ(Mismatch<double>(ctx, in, [&](int64_t i) { return Value<double>(comm.rank(), i); }),
                -1)
          << "the input changed";
    }
  });
}

TEST_P(CommContract, BroadcastFromEveryRoot) {
  Run([](Communicator& comm, Context& ctx) {
    for (int root = 0; root < comm.size(); ++root) {
      for (int64_t n : kLengths) {
        Tensor t = Filled<int32_t>(ctx, n, comm.rank());
        comm.Broadcast(t, root).Wait();
        EXPECT_EQ(Mismatch<int32_t>(ctx, t, [&](int64_t i) { return Value<int32_t>(root, i); }),
                  -1);
      }
    }
  });
}

// Every rank sends rank d a message of (rank, d)-dependent length, some of zero bytes, itself
// included; nothing else distinguishes the ranks.
TEST_P(CommContract, UnevenExchangeWithEveryPeer) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size(), me = comm.rank();
    auto length = [&](int from, int to) -> int64_t {
      return (from + 2 * to) % 3 == 1 ? 0 : 1 + 400000ll * from + 1000ll * to;
    };
    for (int round = 0; round < 3; ++round) {
      std::vector<Tensor> outgoing, incoming;
      std::vector<parallel::Send> sends;
      std::vector<parallel::Recv> recvs;
      for (int peer = 0; peer < p; ++peer) {
        outgoing.push_back(Bytes(ctx, length(me, peer), 16 * me + 4 * peer + round));
        incoming.push_back(ctx.Empty({length(peer, me)}, DType::kU8));
        sends.push_back(parallel::SendOf(peer, outgoing.back()));
        recvs.push_back(parallel::RecvInto(peer, incoming.back()));
      }
      comm.Exchange(sends, recvs).Wait();
      for (int peer = 0; peer < p; ++peer) {
        const auto expected = static_cast<uint8_t>(16 * peer + 4 * me + round);
        EXPECT_EQ(Mismatch<uint8_t>(ctx, incoming[static_cast<size_t>(peer)],
                                    [&](int64_t) { return expected; }),
                  -1)
            << "from " << peer;
      }
    }
  });
}

TEST_P(CommContract, MessagesOfAPairArriveInOrder) {
  Run([](Communicator& comm, Context& ctx) {
    // Neighbours in a ring (oneself in a group of one), messages of equal and of unequal sizes.
    const int next = (comm.rank() + 1) % comm.size();
    const int previous = (comm.rank() + comm.size() - 1) % comm.size();
    constexpr int64_t kSizes[] = {1, 3 << 20, 5, 5, 0, 2 << 20, 5};
    std::vector<Tensor> outgoing, incoming;
    std::vector<parallel::Send> sends;
    std::vector<parallel::Recv> recvs;
    for (int64_t size : kSizes) {
      outgoing.push_back(Bytes(ctx, size, static_cast<int>(outgoing.size()) + 1));
      incoming.push_back(ctx.Empty({size}, DType::kU8));
      sends.push_back(parallel::SendOf(next, outgoing.back()));
      recvs.push_back(parallel::RecvInto(previous, incoming.back()));
    }
    comm.Exchange(sends, recvs).Wait();
    for (size_t i = 0; i < incoming.size(); ++i) {
      EXPECT_EQ(Mismatch<uint8_t>(ctx, incoming[i], [&](int64_t) { return i + 1; }), -1) << i;
    }
  });
}

TEST_P(CommContract, AMessageToOneselfMayStayWhereItIs) {
  Run([](Communicator& comm, Context& ctx) {
    const Tensor t = Filled<float>(ctx, 1000, comm.rank());
    comm.Exchange({parallel::SendOf(comm.rank(), t)}, {parallel::RecvInto(comm.rank(), t)}).Wait();
    EXPECT_EQ(Mismatch<float>(ctx, t, [&](int64_t i) { return Value<float>(comm.rank(), i); }), -1);
  });
}

// A rank that has nothing to send still takes part; the others must not wait for it.
TEST_P(CommContract, ExchangeBetweenSomeRanksOnly) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size(), me = comm.rank();
    Tensor out = Filled<float>(ctx, 1000, me), in = ctx.Zeros({1000}, DType::kF32);
    std::vector<parallel::Send> sends;
    std::vector<parallel::Recv> recvs;
    if (me == 0) sends.push_back(parallel::SendOf(p - 1, out));
    if (me == p - 1) recvs.push_back(parallel::RecvInto(0, in));
    comm.Exchange(sends, recvs).Wait();
    if (me == p - 1) {
      EXPECT_EQ(Mismatch<float>(ctx, in, [](int64_t i) { return Value<float>(0, i); }), -1);
    }
    comm.Exchange({}, {}).Wait();
  });
}

TEST_P(CommContract, PendingOperationsOverlapAndFinishInAnyOrder) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size(), me = comm.rank();
    const int next = (me + 1) % p, previous = (me + p - 1) % p;
    constexpr int kRounds = 6;
    constexpr int64_t kN = 100003;
    std::vector<Tensor> sums, outs, ins, gathered;
    std::vector<Work> works;
    for (int k = 0; k < kRounds; ++k) {
      sums.push_back(Filled<double>(ctx, kN, me + k));
      outs.push_back(Filled<double>(ctx, kN, me + 10 * k));
      ins.push_back(ctx.Empty({kN}, DType::kF64));
      gathered.push_back(ctx.Empty({kN * p}, DType::kF64));
      works.push_back(comm.AllReduce(sums.back(), ReduceOp::kSum));
      works.push_back(comm.Exchange({parallel::SendOf(next, outs.back())},
                                    {parallel::RecvInto(previous, ins.back())}));
      works.push_back(comm.AllGather(outs.back(), gathered.back()));
    }
    comm.Progress();
    for (size_t i = 0; i < works.size(); ++i) {  // backwards on odd ranks
      Work& work = works[me % 2 == 0 ? i : works.size() - 1 - i];
      if (i % 3 == 0) {
        while (!work.Done()) comm.Progress();
        EXPECT_EQ(work.CompletedFraction(), 1.0);
      }
      work.Wait();
      work.Wait();  // a second Wait is harmless
      EXPECT_TRUE(work.Done());
    }
    for (int k = 0; k < kRounds; ++k) {
      auto sum = [&](int64_t i) {
        double s = 0;
        for (int r = 0; r < p; ++r) s += Value<double>(r + k, i);
        return s;
      };
      const auto at = static_cast<size_t>(k);
      EXPECT_EQ(Mismatch<double>(ctx, sums[at], sum), -1);
      EXPECT_EQ(Mismatch<double>(ctx, ins[at],
                                 [&](int64_t i) { return Value<double>(previous + 10 * k, i); }),
                -1);
      EXPECT_EQ(Mismatch<double>(ctx, gathered[at],
                                 [&](int64_t i) {
                                   return Value<double>(static_cast<int>(i / kN) + 10 * k, i % kN);
                                 }),
                -1);
    }
  });
}

TEST_P(CommContract, BarrierWaitsForAll) {
  Run([](Communicator& comm, Context& ctx) {
    for (int i = 0; i < 20; ++i) comm.Barrier();
    const auto now = [] { return std::chrono::steady_clock::now().time_since_epoch().count(); };
    for (const int late : {0, comm.size() - 1}) {
      if (comm.rank() == late) std::this_thread::sleep_for(std::chrono::milliseconds(50));
      // One clock for all ranks: they share a machine in these tests.
      const int64_t before = now();
      comm.Barrier();
      const int64_t after = now();
      Tensor all = ctx.Empty({2 * comm.size()}, DType::kI64);
      comm.AllGather(FromHost<int64_t>(ctx, {2}, {before, after}), all).Wait();
      const std::vector<int64_t> gathered = ToHost<int64_t>(ctx, all);
      const int64_t* times = gathered.data();
      for (int r = 0; r < comm.size(); ++r) {
        EXPECT_GE(times[2 * r + 1], times[2 * late]) << "rank " << r << " left before " << late;
      }
    }
  });
}

// Rows and columns of a grid as the mesh makes them, with an operation of the parent pending.
TEST_P(CommContract, SplitMakesGridAxes) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size(), me = comm.rank();
    const int cp = p % 2 == 0 ? 2 : 1;
    Tensor pending = Filled<float>(ctx, 50000, me);
    Work work = comm.AllReduce(pending, ReduceOp::kMin);
    const auto row = comm.Split(me / cp, me % cp), column = comm.Split(me % cp, me / cp);
    ASSERT_NE(row, nullptr);
    ASSERT_NE(column, nullptr);
    EXPECT_EQ(row->size(), cp);
    EXPECT_EQ(row->rank(), me % cp);
    EXPECT_EQ(column->size(), p / cp);
    EXPECT_EQ(column->rank(), me / cp);
    const int64_t row_sum = AllReduceValue(*row, int64_t{me}, ReduceOp::kSum);
    const int64_t column_sum = AllReduceValue(*column, int64_t{me}, ReduceOp::kSum);
    int64_t expected_row = 0, expected_column = 0;
    for (int r = 0; r < p; ++r) {
      if (r / cp == me / cp) expected_row += r;
      if (r % cp == me % cp) expected_column += r;
    }
    EXPECT_EQ(row_sum, expected_row);
    EXPECT_EQ(column_sum, expected_column);
    work.Wait();
    EXPECT_EQ(At<float>(ctx, pending, 49999), Value<float>(0, 49999));
  });
}

TEST_P(CommContract, SplitOrdersByKeyThenRankAndExcludes) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size(), me = comm.rank();
    const auto reversed = comm.Split(7, -me);
    ASSERT_NE(reversed, nullptr);
    EXPECT_EQ(reversed->rank(), p - 1 - me);
    const auto same_key = comm.Split(0, 5);
    EXPECT_EQ(same_key->rank(), me);
    // The parts know nothing of each other: traffic in one must not reach the other.
    Tensor t = Filled<float>(ctx, 3, me);
    reversed->Broadcast(t, 0).Wait();
    EXPECT_EQ(At<float>(ctx, t, 0), Value<float>(p - 1, 0));

    const auto without_first = comm.Split(me == 0 ? -1 : 0, 0);
    EXPECT_EQ(without_first == nullptr, me == 0);
    if (without_first != nullptr) {
      EXPECT_EQ(without_first->size(), p - 1);
      EXPECT_EQ(without_first->rank(), me - 1);
      without_first->Barrier();
    }
    comm.Barrier();
  });
}

// Progress of one communicator moves what was issued on a related one.
TEST_P(CommContract, ProgressOfTheParentMovesItsParts) {
  Run([](Communicator& comm, Context& ctx) {
    const auto part = comm.Split(0, -comm.rank());
    Tensor t = Filled<double>(ctx, 200000, comm.rank());
    Work work = part->AllReduce(t, ReduceOp::kSum);
    while (work.CompletedFraction() < 1.0) comm.Progress();
    work.Wait();
    double sum = 0;
    for (int r = 0; r < comm.size(); ++r) sum += Value<double>(r, 199999);
    EXPECT_EQ(At<double>(ctx, t, 199999), sum);
    comm.Barrier();
  });
}

TEST_P(CommContract, ValueHelpers) {
  Run([](Communicator& comm, Context&) {
    const int p = comm.size(), me = comm.rank();
    EXPECT_EQ(AllReduceValue(comm, int64_t{1} << 40, ReduceOp::kSum), (int64_t{1} << 40) * p);
    EXPECT_EQ(AllReduceValue(comm, me + 0.25, ReduceOp::kMax), p - 1 + 0.25);
    for (int root = 0; root < p; ++root) {
      const std::string text = Str("from ", root, std::string(static_cast<size_t>(root) * 3, 'x'));
      EXPECT_EQ(BroadcastString(comm, me == root ? text : "other", root), text);
    }
    EXPECT_EQ(BroadcastString(comm, "", 0), "");
    EXPECT_EQ(FirstError(comm, ""), "");
    EXPECT_EQ(FirstError(comm, me >= p / 2 ? Str("bad ", me) : ""), Str("bad ", p / 2));
  });
}

TEST_P(CommContract, BadArgumentsAreRefusedBeforeAnythingIsIssued) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size();
    Tensor undefined, f32 = ctx.Zeros({4}, DType::kF32), f64 = ctx.Zeros({4 * p}, DType::kF64);
    Tensor out = ctx.Zeros({4 * p}, DType::kF32), odd = ctx.Zeros({4 * p + 1}, DType::kF32);
    Tensor bf16 = ctx.Zeros({4}, DType::kBF16), bytes = ctx.Zeros({4}, DType::kU8);
    Tensor table = ctx.Zeros({2, 2}, DType::kF32);
    EXPECT_THROW(comm.AllReduce(undefined, ReduceOp::kSum), InvalidArgument);
    EXPECT_THROW(comm.AllReduce(bf16, ReduceOp::kSum), InvalidArgument);
    EXPECT_THROW(comm.AllReduce(bytes, ReduceOp::kMax), InvalidArgument);
    EXPECT_THROW(comm.AllReduce(f32, static_cast<ReduceOp>(9)), InvalidArgument);
    EXPECT_THROW(comm.AllGather(undefined, out), InvalidArgument);
    EXPECT_THROW(comm.AllGather(f32, undefined), InvalidArgument);
    EXPECT_THROW(comm.AllGather(f32, odd), InvalidArgument);
    EXPECT_THROW(comm.AllGather(f32, f64), InvalidArgument);
    EXPECT_THROW(comm.AllGather(table, out), InvalidArgument);
    EXPECT_THROW(comm.ReduceScatter(odd, f32), InvalidArgument);
    EXPECT_THROW(comm.ReduceScatter(f64, f32), InvalidArgument);
    EXPECT_THROW(comm.ReduceScatter(out, undefined), InvalidArgument);
    EXPECT_THROW(comm.ReduceScatter(out, out.Rows(0, 4)), InvalidArgument) << "overlap";
    Tensor big = ctx.Zeros({4 * p + 4}, DType::kF32);
    EXPECT_THROW(
        comm.AllGather(big.Rows(comm.rank() * 4 + 1, comm.rank() * 4 + 5), big.Rows(0, 4 * p)),
        InvalidArgument)
        << "overlap outside of the own rows";
    EXPECT_THROW(comm.Broadcast(undefined, 0), InvalidArgument);
    EXPECT_THROW(comm.Broadcast(f32, p), InvalidArgument);
    EXPECT_THROW(comm.Broadcast(f32, -1), InvalidArgument);
    EXPECT_THROW(comm.Exchange({{p, f32.raw(), 4}}, {}), InvalidArgument);
    EXPECT_THROW(comm.Exchange({{-1, f32.raw(), 4}}, {}), InvalidArgument);
    EXPECT_THROW(comm.Exchange({}, {{p, f32.raw(), 4}}), InvalidArgument);
    EXPECT_THROW(comm.Exchange({{0, f32.raw(), -4}}, {}), InvalidArgument);
    EXPECT_THROW(comm.Exchange({{0, nullptr, 4}}, {}), InvalidArgument);
    EXPECT_THROW(comm.Exchange({}, {{0, nullptr, 4}}), InvalidArgument);
    EXPECT_THROW(
        comm.Exchange({}, {parallel::RecvInto(0, f32), parallel::RecvInto(p - 1, f32.Rows(3, 4))}),
        InvalidArgument)
        << "receives overlap";
    if (OnCuda()) {
      const int next = (comm.rank() + 1) % p, previous = (comm.rank() + p - 1) % p;
      const Tensor a = big.Rows(0, 4), b = big.Rows(4, 8), between = big.Rows(2, 6);
      EXPECT_THROW(
          comm.Exchange({parallel::SendOf(next, a)}, {parallel::RecvInto(previous, between)}),
          InvalidArgument);
      if (p > 1) {
        EXPECT_THROW(comm.Exchange({parallel::SendOf(next, a)}, {parallel::RecvInto(previous, a)}),
                     InvalidArgument)
            << "a peer may write before this rank has read";
      }
      const int me = comm.rank();
      EXPECT_THROW(comm.Exchange({parallel::SendOf(me, a), parallel::SendOf(me, b)},
                                 {parallel::RecvInto(me, b), parallel::RecvInto(me, a)}),
                   InvalidArgument)
          << "two messages to oneself that change places";
    }
    // The refused calls left nothing behind: ranks still agree on what comes next.
    EXPECT_EQ(AllReduceValue(comm, int64_t{1}, ReduceOp::kSum), p);
  });
}

TEST_P(CommContract, ACompleteWorkCanBeDroppedAndDefaultWorkIsComplete) {
  Run([](Communicator& comm, Context& ctx) {
    Work none;
    EXPECT_TRUE(none.Done());
    none.Wait();
    EXPECT_EQ(none.CompletedFraction(), 1.0);
    Tensor t = Filled<float>(ctx, 5, comm.rank());
    {
      Work work = comm.AllReduce(t, ReduceOp::kSum);
      while (!work.Done()) {
      }
    }
    comm.Barrier();
  });
}

// What a rank has waited for is settled: it may write over what it sent, and peers still get what
// was there before. Nothing else keeps the tensors alive.
TEST_P(CommContract, BuffersMayBeReusedAfterWaitAndDroppedBeforeIt) {
  Run([](Communicator& comm, Context& ctx) {
    const int p = comm.size(), me = comm.rank();
    const int next = (me + 1) % p, previous = (me + p - 1) % p;
    constexpr int64_t kN = 100003;
    for (int round = 0; round < 4; ++round) {
      Tensor in = ctx.Empty({kN}, DType::kF32), kept = Filled<float>(ctx, kN, me + round);
      Tensor all = ctx.Empty({kN * p}, DType::kF64);
      Work gather = comm.AllGather(Filled<double>(ctx, kN, me), all);
      Work hop = comm.Exchange({parallel::SendOf(next, kept)}, {parallel::RecvInto(previous, in)});
      const Tensor other =
          Filled<double>(ctx, kN, -5);  // may not take the place of the gathered one
      hop.Wait();
      CopyFromHost(ctx, std::vector<float>(kN, -1.0f).data(), kept);
      EXPECT_EQ(
          Mismatch<float>(ctx, in, [&](int64_t i) { return Value<float>(previous + round, i); }),
          -1);
      gather.Wait();
      EXPECT_EQ(
          Mismatch<double>(
              ctx, all, [&](int64_t i) { return Value<double>(static_cast<int>(i / kN), i % kN); }),
          -1);
      EXPECT_EQ(Mismatch<double>(ctx, other, [&](int64_t i) { return Value<double>(-5, i); }), -1);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Comm, CommContract, testing::ValuesIn(Harnesses()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace longspan::test
