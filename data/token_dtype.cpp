#include "data/token_dtype.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "ops/core/error.h"

namespace longspan::data {
namespace {

static_assert(std::endian::native == std::endian::little, "the file formats are little-endian");

// Calls f with a value of the element type.
template <class F>
decltype(auto) Dispatch(TokenDType dtype, F&& f) {
  switch (dtype) {
    case TokenDType::kU8:
      return f(uint8_t{});
    case TokenDType::kI8:
      return f(int8_t{});
    case TokenDType::kI16:
      return f(int16_t{});
    case TokenDType::kI32:
      return f(int32_t{});
    case TokenDType::kI64:
      return f(int64_t{});
    case TokenDType::kU16:
      return f(uint16_t{});
  }
  throw InvalidArgument(Str("token dtype code ", static_cast<int>(dtype), " does not exist"));
}

}  // namespace

int64_t PackTokens(std::span<const int32_t> ids, TokenDType dtype, std::vector<uint8_t>& out) {
  if (ids.empty()) return -1;
  int32_t low = ids[0], high = ids[0];
  for (const int32_t id : ids) {
    low = std::min(low, id);
    high = std::max(high, id);
  }
  Dispatch(dtype, [&]<class T>(T) {
    if (low < int64_t{std::numeric_limits<T>::min()} ||
        high > int64_t{std::numeric_limits<T>::max()}) {
      throw InvalidArgument(Str("token ids ", low, "..", high, " do not fit ", ToString(dtype)));
    }
    const size_t base = out.size();
    out.resize(base + ids.size() * sizeof(T));
    uint8_t* to = out.data() + base;
    for (size_t i = 0; i < ids.size(); ++i) {
      const T value = static_cast<T>(ids[i]);
      std::memcpy(to + i * sizeof(T), &value, sizeof(T));
    }
  });
  return high;
}

bool UnpackTokens(const uint8_t* bytes, TokenDType dtype, std::span<int32_t> out) {
  return Dispatch(dtype, [&]<class T>(T) {
    bool fits = true;
    for (size_t i = 0; i < out.size(); ++i) {
      T value;
      std::memcpy(&value, bytes + i * sizeof(T), sizeof(T));
      out[i] = static_cast<int32_t>(value);
      if constexpr (sizeof(T) > sizeof(int32_t)) fits &= out[i] == value;
    }
    return fits;
  });
}

}  // namespace longspan::data
