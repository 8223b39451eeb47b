#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longspan::launch {

// 8-bit RGB, row by row from the top left.
struct Image {
  int width = 0, height = 0;
  std::vector<uint8_t> rgb;
};

struct Color {
  uint8_t red, green, blue;
  bool operator==(const Color&) const = default;
};
inline constexpr Color kFullColor{24, 78, 140};      // every pair of the cell is visible
inline constexpr Color kPartialColor{242, 158, 41};  // some pairs are
inline constexpr Color kNoneColor{232, 234, 237};
inline constexpr Color kFrameColor{90, 94, 100};
inline constexpr Color kMarginColor{255, 255, 255};

// One head pattern as BlockMask::Ascii prints it: lines of '#' (full), '+' (partial), '.' (none),
// queries from top to bottom and keys from left to right.
using Panel = std::string;

// Heat maps side by side: one line of panels per element of `rows` (a mixer), one panel per head
// pattern. Cells are squares of equal size within a panel, enlarged until the panel is about
// `panel_pixels` wide (a cell is at least one pixel). Each panel has a frame and a blank margin.
//
// Errors    InvalidArgument: a panel without cells, with lines of unequal length or other
// characters
Image DrawPanels(const std::vector<std::vector<Panel>>& rows, int panel_pixels = 384);

}  // namespace longspan::launch
