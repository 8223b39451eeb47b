#include "launch/picture/pattern_picture.h"

#include <algorithm>
#include <string_view>

#include "ops/core/error.h"

namespace longspan::launch {
namespace {

constexpr int kMargin = 12, kFrame = 1, kLargestCell = 24;

struct Grid {
  std::vector<std::string_view> lines;
  int cell = 1;  // pixels
  int columns() const { return static_cast<int>(lines.front().size()); }
  int width() const { return columns() * cell + 2 * kFrame; }
  int height() const { return static_cast<int>(lines.size()) * cell + 2 * kFrame; }
};

Grid ParseGrid(std::string_view panel, int panel_pixels) {
  Grid grid;
  while (!panel.empty()) {
    const size_t end = std::min(panel.find('\n'), panel.size());
    grid.lines.push_back(panel.substr(0, end));
    panel.remove_prefix(std::min(end + 1, panel.size()));
  }
  if (grid.lines.empty() || grid.lines.front().empty()) {
    throw InvalidArgument("DrawPanels: a panel has no cells; give at least one line");
  }
  for (std::string_view line : grid.lines) {
    if (line.size() != grid.lines.front().size() ||
        line.find_first_not_of("#+.") != std::string_view::npos) {
      throw InvalidArgument(Str("DrawPanels: the line \"", line,
                                "\" must be as long as the others and hold only #, + and ."));
    }
  }
  grid.cell = std::clamp(panel_pixels / grid.columns(), 1, kLargestCell);
  return grid;
}

void FillRectangle(Image& image, int left, int top, int width, int height, Color color) {
  for (int y = top; y < top + height; ++y) {
    for (int x = left; x < left + width; ++x) {
      uint8_t* pixel = &image.rgb[3 * (static_cast<size_t>(y) * static_cast<size_t>(image.width) +
                                       static_cast<size_t>(x))];
      pixel[0] = color.red;
      pixel[1] = color.green;
      pixel[2] = color.blue;
    }
  }
}

Color ColorOf(char mark) {
  return mark == '#' ? kFullColor : mark == '+' ? kPartialColor : kNoneColor;
}

void DrawGrid(Image& image, const Grid& grid, int left, int top) {
  FillRectangle(image, left, top, grid.width(), grid.height(), kFrameColor);
  for (size_t i = 0; i < grid.lines.size(); ++i) {
    for (size_t j = 0; j < grid.lines[i].size(); ++j) {
      FillRectangle(image, left + kFrame + static_cast<int>(j) * grid.cell,
                    top + kFrame + static_cast<int>(i) * grid.cell, grid.cell, grid.cell,
                    ColorOf(grid.lines[i][j]));
    }
  }
}

}  // namespace

Image DrawPanels(const std::vector<std::vector<Panel>>& rows, int panel_pixels) {
  std::vector<std::vector<Grid>> grids;
  std::vector<int> heights;
  Image image{.width = 0, .height = kMargin, .rgb = {}};
  for (const auto& row : rows) {
    grids.emplace_back();
    int width = kMargin, height = 0;
    for (const Panel& panel : row) {
      const Grid& grid = grids.back().emplace_back(ParseGrid(panel, panel_pixels));
      width += grid.width() + kMargin;
      height = std::max(height, grid.height());
    }
    heights.push_back(height);
    image.width = std::max(image.width, width);
    image.height += height + kMargin;
  }
  if (image.width <= kMargin) throw InvalidArgument("DrawPanels: there is no panel to draw");
  image.rgb.resize(3 * static_cast<size_t>(image.width) * static_cast<size_t>(image.height));
  FillRectangle(image, 0, 0, image.width, image.height, kMarginColor);
  int top = kMargin;
  for (size_t r = 0; r < grids.size(); ++r) {
    int left = kMargin;
    for (const Grid& grid : grids[r]) {
      DrawGrid(image, grid, left, top);
      left += grid.width() + kMargin;
    }
    top += heights[r] + kMargin;
  }
  return image;
}

}  // namespace longspan::launch
