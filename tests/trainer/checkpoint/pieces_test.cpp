// Tensors that are split over ranks: what is written is the whole, and any other split reads it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "parallel/comm/local.h"
#include "tests/trainer/checkpoint/support.h"
#include "trainer/checkpoint/format.h"
#include "trainer/checkpoint/reader.h"
#include "trainer/checkpoint/writer.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::RunLocal;
using trainer::CheckpointReader;
using trainer::CheckpointWriter;
using trainer::NamedTensor;
using trainer::TensorPiece;

// A split of every tensor into `parts` pieces at borders that fit nothing, each held by `copies`
// ranks; part p of copy c is rank c * parts + p.
struct Split {
  int parts, copies;
  int ranks() const { return parts * copies; }
  int64_t Border(int64_t elements, int part) const {
    if (part == parts) return elements;
    return std::min(elements, elements * part * part / (parts * parts) + 3 * part);
  }
};

// What one rank holds of `whole`.
std::vector<NamedTensor> PiecesOf(const std::vector<NamedTensor>& whole, const Split& split,
                                  int rank) {
  std::vector<NamedTensor> pieces;
  for (const NamedTensor& named : whole) {
    const int64_t n = named.tensor.numel();
    const int part = rank % split.parts;
    const int64_t begin = split.Border(n, part), end = split.Border(n, part + 1);
    pieces.push_back({named.name, named.tensor.Reshape({n}).Rows(begin, std::max(begin, end)),
                      TensorPiece{named.tensor.shape(), begin, rank / split.parts, split.copies}});
  }
  return pieces;
}

std::filesystem::path Save(const TemporaryDirectory& directory, const Split& split) {
  RunLocal(split.ranks(), [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path(), .max_record_bytes = 512}, world);
    const std::vector<NamedTensor> whole = MixedTensors(ctx, 5);
    writer.Save(SampleInfo(1), PiecesOf(whole, split, world.rank()));
    EXPECT_TRUE(writer.Wait());
  });
  return directory.path() / trainer::StepDirectoryName(1);
}

TEST(PiecesTest, AnySplitReadsWhatAnyOtherWrote) {
  const std::vector<Split> splits = {{1, 1}, {2, 1}, {3, 1}, {2, 2}, {3, 2}, {1, 3}, {5, 1}};
  for (const Split& written : splits) {
    TemporaryDirectory directory;
    const CheckpointReader reader = CheckpointReader::Open(Save(directory, written));
    Context ctx({.threads = 1});
    const std::vector<NamedTensor> expected = MixedTensors(ctx, 5);
    // No tensor says how it was split.
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(reader.tensors()[i].Describe(), expected[i].Entry().Describe());
    }
    std::vector<NamedTensor> whole = BlankTensors(ctx);
    reader.Load(whole);
    EXPECT_EQ(FirstDifference(whole, expected), "");
    reader.Verify();
    for (const Split& read : splits) {
      SCOPED_TRACE(Str(written.parts, "x", written.copies, " read as ", read.parts));
      std::vector<NamedTensor> blank = BlankTensors(ctx);
      for (int part = 0; part < read.parts; ++part) reader.Load(PiecesOf(blank, read, part));
      EXPECT_EQ(FirstDifference(blank, expected), "");
      // A rank writes into its own piece only.
      blank = BlankTensors(ctx);
      reader.Load(PiecesOf(blank, read, 0));
      const std::vector<NamedTensor> untouched = BlankTensors(ctx);
      for (size_t i = 0; i < blank.size(); ++i) {
        const Tensor& t = blank[i].tensor;
        const size_t end = static_cast<size_t>(read.Border(t.numel(), 1)) * SizeOf(t.dtype());
        EXPECT_EQ(std::memcmp(t.raw(), expected[i].tensor.raw(), end), 0) << blank[i].name;
        EXPECT_EQ(std::memcmp(t.raw() + end, untouched[i].tensor.raw() + end, t.bytes() - end), 0)
            << blank[i].name;
      }
    }
  }
}

// Each value is stored once, also where several ranks hold it, and they share the work.
TEST(PiecesTest, CopiesShareTheWriting) {
  TemporaryDirectory directory;
  RunLocal(4, [&](Communicator& world) {
    Context ctx({.threads = 1});
    const Tensor whole = ctx.Zeros({1 << 14}, DType::kF32);
    CheckpointWriter writer({.directory = directory.path()}, world);
    writer.Save(SampleInfo(1), PiecesOf({{"w", whole}}, {1, 4}, world.rank()));
    EXPECT_TRUE(writer.Wait());
  });
  const auto manifest = trainer::ReadManifest(directory.path() / trainer::StepDirectoryName(1));
  ASSERT_EQ(manifest.tensors(0).shards_size(), 4);
  for (const auto& shard : manifest.tensors(0).shards()) {
    EXPECT_EQ(shard.end() - shard.begin(), 1 << 12);
  }
}

TEST(PiecesTest, PiecesThatDoNotFitTogetherAreNoCheckpoint) {
  TemporaryDirectory directory;
  const auto error = [&](int64_t begin_of_second) {
    std::string text;
    RunLocal(2, [&](Communicator& world) {
      Context ctx({.threads = 1});
      const Tensor half = ctx.Zeros({50}, DType::kF32);
      CheckpointWriter writer({.directory = directory.path()}, world);
      const TensorPiece piece{Shape({10, 10}), world.rank() == 0 ? 0 : begin_of_second};
      const std::string mine = ErrorOf<Error>([&] {
        writer.Save(SampleInfo(1), {{"w", half, piece}});
        writer.Wait();
      });
      if (world.rank() == 0) text = mine;
    });
    return text;
  };
  EXPECT_NE(error(49).find("tensor w is not covered at element 50"), std::string::npos);
  EXPECT_NE(error(0).find("tensor w is not covered at element 50"), std::string::npos);
  EXPECT_TRUE(Names(directory.path()).empty());
  EXPECT_EQ(error(50), "(nothing was thrown)");
}

TEST(PiecesTest, APieceOutsideOfItsTensorIsRefused) {
  TemporaryDirectory directory;
  RunLocal(1, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path()}, world);
    const Tensor half = ctx.Zeros({50}, DType::kF32);
    for (const TensorPiece& piece :
         {TensorPiece{Shape({10, 10}), 51}, TensorPiece{Shape({10, 10}), -1},
          TensorPiece{Shape({10, 10}), 0, 1, 1}}) {
      EXPECT_NE(ErrorOf<InvalidArgument>([&] {
                  writer.Save(SampleInfo(1), {{"w", half, piece}});
                }).find("is no piece of f32[10, 10]"),
                std::string::npos);
    }
  });
}

}  // namespace
}  // namespace longspan::test
