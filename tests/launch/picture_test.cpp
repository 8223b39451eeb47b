#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "launch/picture/mask_facts.h"
#include "launch/picture/pattern_picture.h"
#include "launch/picture/png_file.h"
#include "ops/core/error.h"

namespace longspan::launch {
namespace {

using ops::AttentionPattern;

// Facts by asking for every pair, with the row's own definition of "everything".
struct Counted {
  double visible, blocks;
};
Counted Count(const AttentionPattern& pattern, int64_t kv_heads, const ops::Documents& documents) {
  const ops::VisibleRule rule = ops::MakeVisibleRule(pattern, kv_heads, documents);
  const bool both_ways = pattern.LooksAhead();
  int64_t visible = 0, whole = 0;
  std::set<std::array<int64_t, 3>> blocks, whole_blocks;
  for (int64_t h = 0; h < kv_heads; ++h) {
    for (int64_t q = 0; q < documents.tokens(); ++q) {
      const int64_t row = q / documents.row_length * documents.row_length;
      for (int64_t k = row; k < row + documents.row_length; ++k) {
        const std::array<int64_t, 3> block{h, row + (q - row) / 64, row + (k - row) / 64};
        if (both_ways || k <= q) {
          ++whole;
          whole_blocks.insert(block);
        }
        if (Visible(rule, h, q, k)) {
          ++visible;
          blocks.insert(block);
        }
      }
    }
  }
  return {static_cast<double>(visible) / static_cast<double>(whole),
          static_cast<double>(blocks.size()) / static_cast<double>(whole_blocks.size())};
}

TEST(MaskFactsTest, MatchCountingEveryPair) {
  const AttentionPattern patterns[] = {
      AttentionPattern::Full(),
      AttentionPattern::Causal(),
      AttentionPattern::Window(70, 5),
      AttentionPattern::S2({.block_size = 16, .local_blocks = 2, .stride_blocks = 3}),
      AttentionPattern::S2(
          {.block_size = 64, .local_blocks = 1, .stride_blocks = 5, .dense_heads = 1}),
      AttentionPattern::Window(70, 5, true),
      AttentionPattern::Prefix(90),
      AttentionPattern::BlockCausal(128),
      AttentionPattern::Power({16, 2, 1}),
      AttentionPattern::Spans({{}, {30, 2}, {70, 0}}),
      AttentionPattern::RandomBlocks({.block_size = 32, .density = 0.3, .per_head = true})};
  const ops::Documents documents = ops::Documents::FromEnds(401, {{401}, {100, 110, 401}});
  const auto shared = std::make_shared<const ops::Documents>(documents);
  const ops::BlockList all = ops::BlockList::All(documents);
  for (const AttentionPattern& pattern : patterns) {
    const auto mask = ops::BlockMask::Build(pattern, 3, shared, all, all);
    const MaskFacts facts = FactsOf(*mask);
    const Counted counted = Count(pattern, 3, documents);
    EXPECT_NEAR(facts.visible_fraction, counted.visible, 1e-12) << pattern.ToString();
    EXPECT_NEAR(facts.block_fraction, counted.blocks, 1e-12) << pattern.ToString();
    EXPECT_EQ(facts.visible_pairs, mask->TotalVisiblePairs()) << pattern.ToString();
    double sum = 0;
    for (int64_t h = 0; h < 3; ++h) sum += FactsOfHead(*mask, h).visible_fraction;
    EXPECT_NEAR(sum / 3, counted.visible, 1e-12) << pattern.ToString();
  }
}

TEST(MaskFactsTest, HeadsAreGroupedByPattern) {
  const auto mask = WholeRowMask(
      AttentionPattern::S2({.block_size = 64, .local_blocks = 1, .stride_blocks = 2}), 4, 512);
  // Heads 0 and 2 have residue 0, heads 1 and 3 residue 1.
  const auto heads = HeadsByPattern(*mask);
  ASSERT_EQ(heads.size(), static_cast<size_t>(mask->patterns()));
  size_t listed = 0;
  for (size_t p = 0; p < heads.size(); ++p) {
    for (int64_t h : heads[p]) EXPECT_EQ(mask->pattern_of(h), static_cast<int32_t>(p));
    listed += heads[p].size();
  }
  EXPECT_EQ(listed, 4u);
}

TEST(MaskFactsTest, LongS2RowsAreShownUpToOneBlockPerCell) {
  const auto s2 = [](int64_t block, int64_t local) {
    return AttentionPattern::S2({.block_size = block, .local_blocks = local, .stride_blocks = 4});
  };
  EXPECT_EQ(PictureLength(s2(64, 4), 2048, 48), 2048);
  EXPECT_EQ(PictureLength(s2(64, 4), 8192, 48), 48 * 64);
  EXPECT_EQ(PictureLength(s2(256, 4), 65536, 48), 48 * 256);
  EXPECT_EQ(PictureLength(s2(16, 4), 8192, 48), 48 * 64);
  EXPECT_EQ(PictureLength(s2(64, 64), 8192, 48), 8192);  // 48 blocks would show the local part only
  EXPECT_EQ(PictureLength(AttentionPattern::Causal(), 1 << 20, 48), 1 << 20);
  EXPECT_EQ(PictureLength(AttentionPattern::Power({128, 3, 1}), 1 << 20, 48), 48 * 128);
  EXPECT_EQ(PictureLength(AttentionPattern::Dilated({32, 3, 2}), 1 << 20, 48), 48 * 64);
  EXPECT_EQ(PictureLength(AttentionPattern::Dilated({32, 3, 1}), 1 << 20, 48), 1 << 20);
  EXPECT_EQ(PictureLength(AttentionPattern::RandomBlocks({.mean_blocks = 4}), 1 << 20, 48),
            48 * 256);
  EXPECT_EQ(PictureLength(AttentionPattern::SharedQuestion({100}), 4096, 48), 4096);
  EXPECT_EQ(PictureLength(AttentionPattern::Window(4096), 32768, 48), 32768);
  // The reason: at its full length the stride is invisible.
  const std::string far = WholeRowMask(s2(64, 4), 4, 1 << 15)->Ascii(0, 48);
  EXPECT_EQ(far.substr(47 * 49).find('.'), std::string::npos) << far;
  const std::string near = WholeRowMask(s2(64, 4), 4, 48 * 64)->Ascii(0, 48);
  EXPECT_NE(near.substr(47 * 49).find("#...#...#"), std::string::npos) << near;
}

Color Pixel(const Image& image, int x, int y) {
  const size_t i =
      3 * (static_cast<size_t>(y) * static_cast<size_t>(image.width) + static_cast<size_t>(x));
  return {image.rgb[i], image.rgb[i + 1], image.rgb[i + 2]};
}

// Two panels above one: cells of 4 pixels, frames of 1, margins of 12.
TEST(PictureTest, PaintsCellsWhereTheyBelong) {
  const Image image = DrawPanels({{"+.\n#+\n", "++\n##\n"}, {".\n"}}, /*panel_pixels=*/8);
  EXPECT_EQ(image.width, 12 + 10 + 12 + 10 + 12);
  EXPECT_EQ(image.height, 12 + 10 + 12 + 10 + 12);
  ASSERT_EQ(image.rgb.size(), static_cast<size_t>(3 * image.width * image.height));
  EXPECT_EQ(Pixel(image, 0, 0), kMarginColor);
  EXPECT_EQ(Pixel(image, 12, 12), kFrameColor);
  EXPECT_EQ(Pixel(image, 21, 21), kFrameColor);
  EXPECT_EQ(Pixel(image, 22, 22), kMarginColor);
  EXPECT_EQ(Pixel(image, 13, 13), kPartialColor);  // first query, first key
  EXPECT_EQ(Pixel(image, 16, 16), kPartialColor);  // its last pixel
  EXPECT_EQ(Pixel(image, 17, 13), kNoneColor);     // first query, second key
  EXPECT_EQ(Pixel(image, 13, 17), kFullColor);     // second query, first key
  EXPECT_EQ(Pixel(image, 20, 20), kPartialColor);
  EXPECT_EQ(Pixel(image, 22 + 12 + 5, 13), kPartialColor);  // second panel
  EXPECT_EQ(Pixel(image, 22 + 12 + 5, 17), kFullColor);
  EXPECT_EQ(Pixel(image, 13, 22 + 12 + 1), kNoneColor);  // second line
  EXPECT_EQ(Pixel(image, 40, 40), kMarginColor);
}

TEST(PictureTest, RefusesPanelsThatAreNotGrids) {
  EXPECT_THROW(DrawPanels({}), InvalidArgument);
  EXPECT_THROW(DrawPanels({{""}}), InvalidArgument);
  EXPECT_THROW(DrawPanels({{"##\n#\n"}}), InvalidArgument);
  EXPECT_THROW(DrawPanels({{"#x\n##\n"}}), InvalidArgument);
}

TEST(PictureTest, FailedWriteKeepsTheOldPicture) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::temp_directory_path() / Str("picture_test.", getpid());
  fs::create_directories(folder);
  const Image image = DrawPanels({{"#"}});
  const std::string good = (folder / "a.png").string();
  WritePng(image, good);
  std::ifstream file(good, std::ios::binary);
  std::string head(8, '\0');
  file.read(head.data(), 8);
  EXPECT_EQ(head, "\x89PNG\r\n\x1a\n");
  const std::string bad = (folder / "missing" / "a.png").string();
  try {
    WritePng(image, bad);
    ADD_FAILURE() << "wrote " << bad;
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find(bad), std::string::npos) << error.what();
  }
  // A folder cannot be replaced by a file; no partial file may stay beside it.
  fs::create_directories(folder / "busy.png" / "x");
  EXPECT_THROW(WritePng(image, (folder / "busy.png").string()), InvalidArgument);
  EXPECT_FALSE(fs::exists(folder / "busy.png.tmp"));
  fs::remove_all(folder);
}

}  // namespace
}  // namespace longspan::launch
