// Checkpoints of tensors on the device of the tests: the files of a GPU are those of the host.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>

#include "ops/elementwise/elementwise.h"
#include "parallel/comm/self.h"
#include "tests/ops/op_test.h"
#include "tests/trainer/checkpoint/support.h"
#include "trainer/checkpoint/reader.h"
#include "trainer/checkpoint/writer.h"

namespace longspan::test {
namespace {

using trainer::NamedTensor;

std::vector<NamedTensor> OnDevice(Context& ctx, const std::vector<NamedTensor>& host) {
  std::vector<NamedTensor> device;
  for (const NamedTensor& named : host) device.push_back({named.name, CopyTo(ctx, named.tensor)});
  return device;
}

std::string Bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class CheckpointDeviceTest : public testing::Test {
 protected:
  // Small records, so that tensors are cut.
  void Save(const std::string& folder, const std::vector<NamedTensor>& tensors) {
    trainer::CheckpointWriterOptions options;
    options.directory = directory_.path() / folder;
    options.max_record_bytes = 512;
    trainer::CheckpointWriter writer(options, world_);
    writer.Save(SampleInfo(3), tensors);
    writer.Wait();
  }
  std::filesystem::path Step(const std::string& folder) const {
    return directory_.path() / folder / "step_00000003";
  }

  TemporaryDirectory directory_;
  parallel::SelfCommunicator world_;
  Context host_{ContextOptions{.threads = 1}};
  Context ctx_ = OpContext();
};

TEST_F(CheckpointDeviceTest, FilesAreThoseOfTheHost) {
  const auto tensors = MixedTensors(host_, 1);
  Save("host", tensors);
  Save("device", OnDevice(ctx_, tensors));
  const std::set<std::string> names = Names(Step("host"));
  EXPECT_EQ(Names(Step("device")), names);
  for (const std::string& name : names) {
    EXPECT_EQ(Bytes(Step("device") / name), Bytes(Step("host") / name)) << name;
  }
}

TEST_F(CheckpointDeviceTest, IsLoadedWhereverTheTensorsAre) {
  const auto tensors = MixedTensors(host_, 2);
  Save("run", OnDevice(ctx_, tensors));
  const auto reader = trainer::CheckpointReader::Open(Step("run"));
  auto blank = BlankTensors(host_), on_device = OnDevice(ctx_, BlankTensors(host_));
  reader.Load(blank);
  EXPECT_EQ(FirstDifference(blank, tensors), "");
  reader.Load(on_device);
  ASSERT_EQ(on_device.size(), tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_TRUE(SameBits(on_device[i].tensor, tensors[i].tensor)) << tensors[i].name;
  }
}

TEST_F(CheckpointDeviceTest, SavesWhatHadBeenIssuedBefore) {
  const Tensor weights = FromVec(ctx_, {1000}, DType::kF32, Vec(1000, 1.0));
  Tensor live = CopyTo(ctx_, weights);
  for (int i = 0; i < 20; ++i) ops::Scale(ctx_, live, 1.5);  // still under way on a GPU
  trainer::CheckpointWriterOptions options;
  options.directory = directory_.path() / "run";
  trainer::CheckpointWriter writer(options, world_);
  writer.Save(SampleInfo(3), {{"weights", live}});
  for (int i = 0; i < 20; ++i) ops::Scale(ctx_, live, 0);  // no part of it
  writer.Wait();
  const Tensor loaded = host_.Empty({1000}, DType::kF32);
  trainer::CheckpointReader::Open(Step("run")).Load({{"weights", loaded}});
  double expected = 1;
  for (int i = 0; i < 20; ++i) expected *= 1.5;
  for (const double value : ToVec(loaded)) EXPECT_NEAR(value / expected, 1, 1e-5);
}

TEST_F(CheckpointDeviceTest, NonFiniteWeightsAreNotCommitted) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL}) {
    Vec values(5000, 1.0);
    values[4711] = bad;
    const Tensor weights = FromVec(ctx_, {5000}, DType::kF32, values);
    const std::string error = ErrorOf<CheckpointError>([&] {
      Save("bad", {{"model.weights", weights}});
    });
    EXPECT_NE(error.find("tensor model.weights holds a NaN or an infinity"), std::string::npos)
        << error;
    EXPECT_TRUE(Names(directory_.path() / "bad").empty());
  }
}

}  // namespace
}  // namespace longspan::test
