#include "data/utf8.h"

#include <cstddef>

namespace longspan::data {
namespace {

constexpr ptrdiff_t kBlock = 64;

// True when all kBlock bytes are in 0x01..0x7F. Written without branches so that it vectorises.
bool IsPlainBlock(const uint8_t* p) {
  uint8_t high = 0, zero = 0;
  for (ptrdiff_t i = 0; i < kBlock; ++i) {
    high |= p[i];
    zero |= static_cast<uint8_t>(p[i] == 0);
  }
  return (high & 0x80) == 0 && zero == 0;
}

// Length of the well-formed character at p, or 0. The bounds of the second byte exclude overlong
// forms (E0, F0), surrogates (ED) and values above U+10FFFF (F4).
ptrdiff_t MultiByteLength(const uint8_t* p, const uint8_t* end) {
  const uint8_t lead = p[0];
  ptrdiff_t length;
  uint8_t low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return 0;
  }
  if (end - p < length || p[1] < low || p[1] > high) return 0;
  for (ptrdiff_t i = 2; i < length; ++i) {
    if ((p[i] & 0xC0) != 0x80) return 0;
  }
  return length;
}

}  // namespace

TextKind ClassifyText(std::string_view bytes) {
  const auto* p = reinterpret_cast<const uint8_t*>(bytes.data());
  const uint8_t* const end = p + bytes.size();
  while (p < end) {
    while (end - p >= kBlock && IsPlainBlock(p)) p += kBlock;
    const uint8_t* const stop = end - p < kBlock ? end : p + kBlock;
    while (p < stop) {
      if (*p == 0) return TextKind::kBinary;
      if (*p < 0x80) {
        ++p;
        continue;
      }
      const ptrdiff_t length = MultiByteLength(p, end);
      if (length == 0) return TextKind::kInvalidUtf8;
      p += length;
    }
  }
  return TextKind::kText;
}

}  // namespace longspan::data
