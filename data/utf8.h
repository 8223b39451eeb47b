#pragma once
#include <cstdint>
#include <string_view>

namespace longspan::data {

enum class TextKind : uint8_t {
  kText,    // well-formed UTF-8 without a NUL byte
  kBinary,  // a NUL byte comes first
  // A malformed sequence comes first: overlong, a surrogate, above U+10FFFF or cut short.
  kInvalidUtf8,
};

// Judges a whole text by its first defect. An empty text is kText.
TextKind ClassifyText(std::string_view bytes);

// Bytes 10xxxxxx continue a character; a cut in front of any other byte is between characters.
constexpr bool IsUtf8Continuation(char byte) { return (static_cast<uint8_t>(byte) & 0xC0) == 0x80; }

}  // namespace longspan::data
