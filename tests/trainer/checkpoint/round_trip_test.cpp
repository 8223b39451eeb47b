#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/util/delimited_message_util.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <thread>

#include "ops/core/rng.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/trainer/checkpoint/support.h"
#include "trainer/checkpoint/format.h"
#include "trainer/checkpoint/reader.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::RunLocal;
using trainer::CheckpointInfo;
using trainer::CheckpointReader;
using trainer::CheckpointWriter;
using trainer::CheckpointWriterOptions;
using trainer::NamedTensor;

std::filesystem::path StepPath(const TemporaryDirectory& directory, int64_t step) {
  return directory.path() / trainer::StepDirectoryName(step);
}

struct RankCounts {
  int write, read;
};
class RoundTripTest : public testing::TestWithParam<RankCounts> {};

TEST_P(RoundTripTest, GivesTheSameBytesAndInfo) {
  TemporaryDirectory directory;
  SaveMixed(directory.path(), GetParam().write, 1000, 1);
  EXPECT_EQ(Names(directory.path()), std::set<std::string>{"step_00001000"});
  RunLocal(GetParam().read, [&](Communicator&) {
    Context ctx({.threads = 1});
    const CheckpointReader reader = CheckpointReader::Open(StepPath(directory, 1000));
    EXPECT_EQ(reader.info(), SampleInfo(1000));
    std::vector<NamedTensor> loaded = BlankTensors(ctx);
    reader.Load(loaded);
    EXPECT_EQ(FirstDifference(loaded, MixedTensors(ctx, 1)), "");
    reader.Verify();
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, RoundTripTest,
                         testing::Values(RankCounts{1, 1}, RankCounts{2, 1}, RankCounts{1, 3},
                                         RankCounts{3, 2}, RankCounts{5, 1}),
                         [](const auto& info) {
                           return Str(info.param.write, "To", info.param.read);
                         });

TEST(CheckpointWriterTest, RanksWriteEvenSharesOnce) {
  TemporaryDirectory directory;
  constexpr int kRanks = 4;
  constexpr int64_t kElements = 64 * 1000 + 17;
  RunLocal(kRanks, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path()}, world);
    writer.Save(SampleInfo(1), {{"w", ctx.Zeros({kElements}, DType::kF32)}});
    EXPECT_TRUE(writer.Wait());
  });
  uintmax_t total = 0;
  for (int r = 0; r < kRanks; ++r) {
    const auto bytes =
        std::filesystem::file_size(StepPath(directory, 1) / trainer::ShardFileName(r));
    EXPECT_NEAR(static_cast<double>(bytes), kElements * 4.0 / kRanks, 600);
    total += bytes;
  }
  EXPECT_LT(total, kElements * 4 + kRanks * 40);
}

// Reads shard files with protobuf alone, as another program would.
TEST(CheckpointWriterTest, ShardFilesAreDelimitedRecordsOfLimitedSize) {
  TemporaryDirectory directory;
  constexpr size_t kLimit = 1000;  // not a multiple of 64 elements: records take 768 bytes
  SaveMixed(directory.path(), 2, 5, 3, {.max_record_bytes = kLimit});
  Context ctx({.threads = 1});
  std::map<std::string, std::string> payloads;
  int split = 0;
  for (int rank = 0; rank < 2; ++rank) {
    const std::string bytes =
        trainer::ReadFile(StepPath(directory, 5) / trainer::ShardFileName(rank));
    google::protobuf::io::ArrayInputStream stream(bytes.data(), static_cast<int>(bytes.size()));
    checkpoint::ShardRecord record;
    bool clean_eof = false;
    while (google::protobuf::util::ParseDelimitedFromZeroCopyStream(&record, &stream, &clean_eof)) {
      EXPECT_LE(record.payload().size(), kLimit);
      EXPECT_GT(record.end(), record.begin());
      EXPECT_EQ(record.begin() % 64, 0);
      split += record.begin() > 0;
      std::string& payload = payloads[record.tensor()];
      const size_t element =
          record.payload().size() / static_cast<size_t>(record.end() - record.begin());
      EXPECT_EQ(payload.size(), element * static_cast<size_t>(record.begin())) << record.tensor();
      payload += record.payload();
      record.Clear();
    }
    EXPECT_TRUE(clean_eof);
  }
  EXPECT_GT(split, 4);
  for (const NamedTensor& named : MixedTensors(ctx, 3)) {
    const std::string want(reinterpret_cast<const char*>(named.tensor.raw()), named.tensor.bytes());
    EXPECT_EQ(payloads[named.name], want) << named.name;
  }
  std::vector<NamedTensor> loaded = BlankTensors(ctx);
  CheckpointReader::Open(StepPath(directory, 5)).Load(loaded);
  EXPECT_EQ(FirstDifference(loaded, MixedTensors(ctx, 3)), "");
}

TEST(CheckpointWriterTest, PayloadsOver64MiBAreSplit) {
  TemporaryDirectory directory;
  parallel::SelfCommunicator world;
  Context ctx({.threads = 1});
  constexpr int64_t kElements = (int64_t{70} << 20) / 4 + 3;
  Tensor tensor = ctx.Empty({kElements}, DType::kI32);
  for (int64_t i = 0; i < kElements; ++i) tensor.data<int32_t>()[i] = static_cast<int32_t>(i * 7);
  CheckpointWriter writer({.directory = directory.path()}, world);
  writer.Save(SampleInfo(1), {{"w", tensor}});
  EXPECT_TRUE(writer.Wait());
  const checkpoint::Manifest manifest = trainer::ReadManifest(StepPath(directory, 1));
  ASSERT_EQ(manifest.tensors(0).shards_size(), 2);
  EXPECT_EQ(manifest.tensors(0).shards(0).end(), int64_t{16} << 20);
  Tensor loaded = ctx.Zeros({kElements}, DType::kI32);
  CheckpointReader::Open(StepPath(directory, 1)).Load({{"w", loaded}});
  EXPECT_EQ(std::memcmp(loaded.raw(), tensor.raw(), tensor.bytes()), 0);
}

TEST(CheckpointWriterTest, SavesTheStateAtTheCallWhileTrainingGoesOn) {
  TemporaryDirectory directory;
  RunLocal(2, [&](Communicator& world) {
    Context ctx({.threads = 1});
    // About 2.8 kB a rank at 10 kB/s: the write is still going on when the weights change.
    CheckpointWriter writer({.directory = directory.path(), .write_bytes_per_second = 10000},
                            world);
    std::vector<NamedTensor> tensors = MixedTensors(ctx, 1);
    writer.Save(SampleInfo(1), tensors);
    const std::vector<NamedTensor> next = MixedTensors(ctx, 2);
    for (size_t i = 0; i < tensors.size(); ++i) {
      std::memcpy(tensors[i].tensor.raw(), next[i].tensor.raw(), next[i].tensor.bytes());
    }
    EXPECT_TRUE(writer.pending());
    EXPECT_FALSE(writer.Poll());
    int polls = 0;
    while (!writer.Poll()) {
      ++polls;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_GT(polls, 5);
    EXPECT_FALSE(writer.pending());
    EXPECT_FALSE(writer.Poll());
    std::vector<NamedTensor> loaded = BlankTensors(ctx);
    CheckpointReader::Open(StepPath(directory, 1)).Load(loaded);
    EXPECT_EQ(FirstDifference(loaded, MixedTensors(ctx, 1)), "");
  });
}

TEST(CheckpointWriterTest, StagingIsBounded) {
  TemporaryDirectory directory;
  // Shares of 2.8 kB pass through 600 bytes of copies, so Save itself has to wait for the disk.
  const auto start = std::chrono::steady_clock::now();
  double saving_s = 0;
  RunLocal(2, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path(),
                             .staging_bytes = 600,
                             .max_record_bytes = 512,
                             .write_bytes_per_second = 10000},
                            world);
    writer.Save(SampleInfo(1), MixedTensors(ctx, 1));
    if (world.rank() == 0) {
      saving_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    EXPECT_TRUE(writer.Wait());
  });
  EXPECT_GT(saving_s, 0.1);
  Context ctx({.threads = 1});
  std::vector<NamedTensor> loaded = BlankTensors(ctx);
  CheckpointReader::Open(StepPath(directory, 1)).Load(loaded);
  EXPECT_EQ(FirstDifference(loaded, MixedTensors(ctx, 1)), "");
}

TEST(CheckpointWriterTest, SaveFinishesAnEarlierSave) {
  TemporaryDirectory directory;
  RunLocal(2, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path(), .write_bytes_per_second = 50000},
                            world);
    writer.Save(SampleInfo(1), MixedTensors(ctx, 1));
    writer.Save(SampleInfo(2), MixedTensors(ctx, 2));
    EXPECT_EQ(trainer::WhyNotCommitted(StepPath(directory, 1)), "");
    EXPECT_TRUE(writer.Wait());
  });
  EXPECT_EQ(Names(directory.path()), (std::set<std::string>{"step_00000001", "step_00000002"}));
}

TEST(CheckpointWriterTest, ASecondSaveOfAStepReplacesItUnlessNothingChanged) {
  TemporaryDirectory directory;
  RunLocal(2, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path()}, world);
    writer.Save(SampleInfo(7, 1), MixedTensors(ctx, 1));
    EXPECT_TRUE(writer.Wait());
    writer.Save(SampleInfo(7, 1), MixedTensors(ctx, 1));
    EXPECT_FALSE(writer.pending()) << "equal information: nothing to write";
    // Another identity at the same step: this is another run's checkpoint.
    writer.Save(SampleInfo(7, 2), MixedTensors(ctx, 2));
    EXPECT_TRUE(writer.Wait());
    const CheckpointReader reader = CheckpointReader::Open(StepPath(directory, 7));
    std::vector<NamedTensor> loaded = BlankTensors(ctx);
    reader.Load(loaded);
    EXPECT_EQ(reader.info(), SampleInfo(7, 2));
    EXPECT_EQ(FirstDifference(loaded, MixedTensors(ctx, 2)), "");
  });
  EXPECT_EQ(Names(directory.path()), std::set<std::string>{"step_00000007"});
}

TEST(CheckpointWriterTest, RanksMustAgree) {
  TemporaryDirectory directory;
  RunLocal(2, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path()}, world);
    const Tensor w = ctx.Zeros({world.rank() + 3}, DType::kF32);
    EXPECT_THROW(writer.Save(SampleInfo(1), {{"w", w}}), InvalidArgument);
    EXPECT_THROW(writer.Save(SampleInfo(world.rank()), {}), InvalidArgument);
    EXPECT_THROW(writer.Save(SampleInfo(1), {{"w", w}, {"w", w}}), InvalidArgument);
  });
  EXPECT_TRUE(Names(directory.path()).empty());
}

struct NonFiniteCase {
  const char* name;
  DType dtype;
  double value;
};
class NonFiniteTest : public testing::TestWithParam<NonFiniteCase> {};

// The value sits in the share of rank 1; both ranks must refuse.
TEST_P(NonFiniteTest, IsNeverCommitted) {
  TemporaryDirectory directory;
  SaveMixed(directory.path(), 2, 1, 1);
  RunLocal(2, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path()}, world);
    constexpr int64_t kElements = 301;
    Tensor w = ctx.Zeros({kElements}, GetParam().dtype);
    DispatchFloat(w.dtype(), "test", [&]<class T>() {
      w.data<T>()[kElements - 1] = static_cast<T>(static_cast<Accumulator<T>>(GetParam().value));
    });
    const std::string error = ErrorOf<CheckpointError>([&] {
      writer.Save(SampleInfo(2), {{"fine", ctx.Zeros({9}, DType::kF32)}, {"model.bad", w}});
    });
    EXPECT_NE(error.find("tensor model.bad holds a NaN or an infinity"), std::string::npos)
        << error;
    EXPECT_NE(error.find("step_00000001"), std::string::npos) << error;
    EXPECT_FALSE(writer.pending());
    world.Barrier();
    EXPECT_EQ(Names(directory.path()), std::set<std::string>{"step_00000001"});
    world.Barrier();
    // The writer still works.
    writer.Save(SampleInfo(3), MixedTensors(ctx, 3));
    EXPECT_TRUE(writer.Wait());
  });
  EXPECT_EQ(Names(directory.path()), (std::set<std::string>{"step_00000001", "step_00000003"}));
}

constexpr double kInf = std::numeric_limits<double>::infinity();
INSTANTIATE_TEST_SUITE_P(Values, NonFiniteTest,
                         testing::Values(NonFiniteCase{"NanF32", DType::kF32, NAN},
                                         NonFiniteCase{"InfF32", DType::kF32, kInf},
                                         NonFiniteCase{"MinusInfF64", DType::kF64, -kInf},
                                         NonFiniteCase{"NanF64", DType::kF64, NAN},
                                         NonFiniteCase{"InfBF16", DType::kBF16, kInf},
                                         NonFiniteCase{"NanBF16", DType::kBF16, NAN}),
                         [](const auto& info) { return info.param.name; });

TEST(CheckpointWriterTest, LargeFiniteValuesAndIntegersAreFine) {
  TemporaryDirectory directory;
  parallel::SelfCommunicator world;
  Context ctx({.threads = 1});
  Tensor f = ctx.Zeros({2}, DType::kF32), d = ctx.Zeros({1}, DType::kF64),
         i = ctx.Zeros({1}, DType::kI64);
  f.data<float>()[0] = std::numeric_limits<float>::max();
  f.data<float>()[1] = std::numeric_limits<float>::denorm_min();
  d.data<double>()[0] = std::numeric_limits<double>::lowest();
  i.data<int64_t>()[0] = -1;  // all bits set
  CheckpointWriter writer({.directory = directory.path()}, world);
  writer.Save(SampleInfo(0), {{"f", f}, {"d", d}, {"i", i}});
  EXPECT_TRUE(writer.Wait());
}

}  // namespace
}  // namespace longspan::test
