#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace longspan::data {

// Element types of a Megatron .bin file, with the codes that its .idx stores (6 f64 and 7 f32 exist
// in the format and are refused: token ids are integers).
enum class TokenDType : uint8_t { kU8 = 1, kI8 = 2, kI16 = 3, kI32 = 4, kI64 = 5, kU16 = 8 };

constexpr bool IsTokenDType(uint8_t code) { return (code >= 1 && code <= 5) || code == 8; }

constexpr int64_t SizeOf(TokenDType dtype) {
  switch (dtype) {
    case TokenDType::kU8:
    case TokenDType::kI8:
      return 1;
    case TokenDType::kU16:
    case TokenDType::kI16:
      return 2;
    case TokenDType::kI32:
      return 4;
    case TokenDType::kI64:
      return 8;
  }
  return 0;
}

constexpr const char* ToString(TokenDType dtype) {
  switch (dtype) {
    case TokenDType::kU8:
      return "u8";
    case TokenDType::kI8:
      return "i8";
    case TokenDType::kI16:
      return "i16";
    case TokenDType::kI32:
      return "i32";
    case TokenDType::kI64:
      return "i64";
    case TokenDType::kU16:
      return "u16";
  }
  return "?";
}

// What Megatron's own tools choose on writing.
constexpr TokenDType TokenDTypeForVocabulary(int64_t vocab_size) {
  return vocab_size < 65500 ? TokenDType::kU16 : TokenDType::kI32;
}

// Appends `ids` to `out` in the given type (little-endian) and returns the largest id (-1 if none).
// InvalidArgument if an id does not fit the type.
int64_t PackTokens(std::span<const int32_t> ids, TokenDType dtype, std::vector<uint8_t>& out);

// Reads out.size() tokens from `bytes`, which need not be aligned. Returns false if a value does
// not fit an i32 (i64 files only); `out` is then unspecified.
bool UnpackTokens(const uint8_t* bytes, TokenDType dtype, std::span<int32_t> out);

}  // namespace longspan::data
