#include <gtest/gtest.h>

#include <fstream>

#include "parallel/comm/self.h"
#include "tests/trainer/checkpoint/support.h"
#include "trainer/checkpoint/format.h"
#include "trainer/checkpoint/reader.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::test {
namespace {

using trainer::CheckpointReader;
using trainer::NamedTensor;

class IntegrityTest : public testing::Test {
 protected:
  void SetUp() override {
    SaveMixed(directory_.path(), 2, 9, 1, {.max_record_bytes = 1024});
    path_ = directory_.path() / trainer::StepDirectoryName(9);
    loaded_ = BlankTensors(ctx_);
  }

  static void Overwrite(const std::filesystem::path& file, const std::string& bytes) {
    std::ofstream(file, std::ios::binary | std::ios::trunc) << bytes;
  }
  // In place: truncating and writing again makes some file systems flush each time.
  static void WriteByte(const std::filesystem::path& file, size_t at, char byte) {
    std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
    stream.seekp(static_cast<std::streamoff>(at)).put(byte);
    ASSERT_TRUE(stream.flush());
  }
  void LoadAll() { CheckpointReader::Open(path_).Load(loaded_); }
  void VerifyAll() { CheckpointReader::Open(path_).Verify(); }

  // Rewrites the manifest with a valid checksum after `change`.
  void ChangeManifest(const std::function<void(checkpoint::Manifest&)>& change) {
    checkpoint::Manifest manifest = trainer::ReadManifest(path_);
    change(manifest);
    Overwrite(path_ / trainer::kManifestName, trainer::EncodeManifest(manifest));
  }
  std::string LoadError() {
    return ErrorOf<CheckpointError>([&] { LoadAll(); });
  }

  TemporaryDirectory directory_;
  std::filesystem::path path_;
  Context ctx_{{.threads = 1}};
  std::vector<NamedTensor> loaded_;
};

TEST_F(IntegrityTest, EveryFlippedBitOfEveryFileIsFound) {
  ASSERT_NO_THROW(LoadAll());
  ASSERT_NO_THROW(VerifyAll());
  int64_t flips = 0;
  ASSERT_EQ(Names(path_).size(), 3u);
  for (const std::string& name : Names(path_)) {
    const std::string original = trainer::ReadFile(path_ / name);
    ASSERT_FALSE(original.empty());
    for (size_t at = 0; at < original.size(); ++at) {
      for (int bit = 0; bit < 8; ++bit) {
        WriteByte(path_ / name, at, static_cast<char>(original[at] ^ (1 << bit)));
        ASSERT_THROW(LoadAll(), CheckpointError) << name << " byte " << at << " bit " << bit;
        ASSERT_THROW(VerifyAll(), CheckpointError) << name << " byte " << at << " bit " << bit;
        ++flips;
      }
      WriteByte(path_ / name, at, original[at]);
    }
  }
  EXPECT_GT(flips, 30000);
  EXPECT_NO_THROW(LoadAll());
}

TEST_F(IntegrityTest, EveryTruncationAndExtensionIsFound) {
  for (const std::string& name : Names(path_)) {
    const std::string original = trainer::ReadFile(path_ / name);
    for (size_t size = 0; size < original.size(); ++size) {
      std::filesystem::resize_file(path_ / name, original.size());
      std::filesystem::resize_file(path_ / name, size);
      ASSERT_NE(trainer::WhyNotCommitted(path_), "") << name << " cut to " << size;
      ASSERT_THROW(LoadAll(), CheckpointError) << name << " cut to " << size;
    }
    for (int byte = 0; byte < 256; ++byte) {
      Overwrite(path_ / name, original + static_cast<char>(byte));
      ASSERT_THROW(LoadAll(), CheckpointError) << name << " with byte " << byte << " appended";
    }
    Overwrite(path_ / name, original);
  }
  EXPECT_NO_THROW(LoadAll());
  // Bytes that a protobuf parser takes for a field of a later version.
  Overwrite(path_ / "manifest.binpb", trainer::ReadFile(path_ / "manifest.binpb") + "\x18\x01");
  EXPECT_THROW(LoadAll(), CheckpointError);
}

TEST_F(IntegrityTest, AFlippedPayloadBitNamesFileAndTensor) {
  const checkpoint::Manifest manifest = trainer::ReadManifest(path_);
  const checkpoint::Shard& shard = manifest.tensors(0).shards(1);
  const auto file = path_ / manifest.files(static_cast<int>(shard.file())).name();
  std::string bytes = trainer::ReadFile(file);
  bytes[shard.offset() + 2] ^= 0x10;
  Overwrite(file, bytes);
  const std::string error = LoadError();
  EXPECT_NE(error.find(file.string()), std::string::npos) << error;
  EXPECT_NE(error.find("tensor model.embedding"), std::string::npos) << error;
}

TEST_F(IntegrityTest, MissingFilesAreNamed) {
  std::filesystem::remove(path_ / "shard_00001.binpb");
  EXPECT_NE(LoadError().find("shard_00001.binpb cannot be read: No such file"), std::string::npos)
      << LoadError();
  std::filesystem::remove(path_ / "manifest.binpb");
  EXPECT_NE(LoadError().find("is not a checkpoint: it has no manifest.binpb"), std::string::npos)
      << LoadError();
}

TEST_F(IntegrityTest, AnotherFormatVersionIsRefused) {
  ChangeManifest([](checkpoint::Manifest& m) { m.set_format_version(2); });
  EXPECT_NE(LoadError().find("the format version is 2 and this program reads version 1"),
            std::string::npos)
      << LoadError();
}

// Manifests with a right checksum that do not cover everything: a writer's mistake must show.
TEST_F(IntegrityTest, UncoveredElementsAndBytesAreRefused) {
  const std::string good = trainer::ReadFile(path_ / "manifest.binpb");
  const std::vector<std::function<void(checkpoint::Manifest&)>> changes = {
      [](auto& m) { m.mutable_tensors(0)->mutable_shards()->RemoveLast(); },
      [](auto& m) { m.mutable_tensors(0)->mutable_shards()->SwapElements(0, 1); },
      [](auto& m) { m.mutable_tensors(0)->mutable_shards(0)->set_begin(1); },
      [](auto& m) { m.mutable_tensors(0)->mutable_shards(0)->set_file(2); },
      [](auto& m) { m.mutable_tensors(0)->set_shape(0, 8); },
      [](auto& m) { m.mutable_tensors(0)->set_shape(0, int64_t{1} << 62); },
      [](auto& m) { m.mutable_tensors(0)->set_dtype(checkpoint::BF16); },
      [](auto& m) { m.mutable_tensors(0)->set_dtype(checkpoint::ELEMENT_TYPE_UNSPECIFIED); },
      [](auto& m) { m.mutable_tensors(0)->set_name(m.tensors(1).name()); },
      [](auto& m) { m.mutable_tensors()->RemoveLast(); },
      [](auto& m) { m.mutable_files(0)->set_bytes(m.files(0).bytes() + 1); },
      [](auto& m) { m.mutable_files(0)->set_name("../elsewhere"); },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    Overwrite(path_ / "manifest.binpb", good);
    ChangeManifest(changes[i]);
    EXPECT_THROW(trainer::ReadManifest(path_), CheckpointError) << "change " << i;
  }
}

TEST_F(IntegrityTest, AnotherModelIsRefusedWithAllDifferences) {
  std::vector<NamedTensor> other = BlankTensors(ctx_);
  other[0].tensor = ctx_.Zeros({7, 32}, DType::kF32);  // shape
  other[1].tensor = ctx_.Zeros({64}, DType::kF64);     // dtype
  other[2].name = "model.added";                       // one missing, one new
  const std::string error =
      ErrorOf<CheckpointError>([&] { CheckpointReader::Open(path_).Load(other); });
  EXPECT_NE(error.find("model.embedding is f32[7, 33] in the checkpoint and f32[7, 32] in the "
                       "model"),
            std::string::npos)
      << error;
  EXPECT_NE(error.find("model.norm is f32[64] in the checkpoint and f64[64] in the model"),
            std::string::npos)
      << error;
  EXPECT_NE(error.find("model.scale is f32[] in the checkpoint and not in the model"),
            std::string::npos)
      << error;
  EXPECT_NE(error.find("model.added is f32[] in the model and not in the checkpoint"),
            std::string::npos)
      << error;
  EXPECT_EQ(error.find("optimizer"), std::string::npos) << error;
  EXPECT_EQ(FirstDifference({other.begin() + 3, other.end()}, {loaded_.begin() + 3, loaded_.end()}),
            "")
      << "nothing may be written before the comparison";
}

TEST_F(IntegrityTest, APrefixLoadsThatPartAlone) {
  const CheckpointReader reader = CheckpointReader::Open(path_);
  std::vector<NamedTensor> model(loaded_.begin(), loaded_.begin() + 4);
  reader.Load(model, "model.");
  const std::vector<NamedTensor> want = MixedTensors(ctx_, 1);
  EXPECT_EQ(FirstDifference(model, {want.begin(), want.begin() + 4}), "");
  const std::vector<NamedTensor> blank = BlankTensors(ctx_);
  EXPECT_EQ(FirstDifference({loaded_.begin() + 4, loaded_.end()}, {blank.begin() + 4, blank.end()}),
            "");
  model.pop_back();
  EXPECT_THROW(reader.Load(model, "model."), CheckpointError) << "model.copy is not asked for";
  EXPECT_THROW(reader.Load(model), CheckpointError) << "without a prefix everything counts";
}

}  // namespace
}  // namespace longspan::test
