#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "ops/core/device_code.h"
#include "ops/core/error.h"

namespace longspan {

enum class DType : uint8_t { kF32, kBF16, kF64, kI32, kI64, kU8 };

// bfloat16 as stored: the upper half of an IEEE binary32. Arithmetic happens in float.
struct BF16 {
  uint16_t bits = 0;
  BF16() = default;
  // Round to nearest even; a NaN stays a (quiet) NaN.
  LONGSPAN_HD explicit BF16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<uint16_t>((u >> 16) | 0x40u);
    } else {
      bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
  }
  LONGSPAN_HD explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  LONGSPAN_HD explicit operator double() const { return static_cast<float>(*this); }
};
static_assert(sizeof(BF16) == 2);

constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
      return 2;
    case DType::kF64:
      return 8;
    case DType::kI32:
      return 4;
    case DType::kI64:
      return 8;
    case DType::kU8:
      return 1;
  }
  return 0;
}

constexpr const char* ToString(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF64:
      return "f64";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kU8:
      return "u8";
  }
  return "?";
}

constexpr bool IsFloat(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF64;
}

template <class T>
constexpr DType DTypeOf();
template <>
constexpr DType DTypeOf<float>() {
  return DType::kF32;
}
template <>
constexpr DType DTypeOf<BF16>() {
  return DType::kBF16;
}
template <>
constexpr DType DTypeOf<double>() {
  return DType::kF64;
}
template <>
constexpr DType DTypeOf<int32_t>() {
  return DType::kI32;
}
template <>
constexpr DType DTypeOf<int64_t>() {
  return DType::kI64;
}
template <>
constexpr DType DTypeOf<uint8_t>() {
  return DType::kU8;
}

// The dtype in which sums, statistics, gradients of parameters and `lse` of a float dtype live:
// f64 for f64, f32 for f32 and bf16.
constexpr DType AccumulatorOf(DType dtype) {
  return dtype == DType::kF64 ? DType::kF64 : DType::kF32;
}
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f.template operator()<T>() with T = float, BF16 or double:
//   DispatchFloat(x.dtype(), "RmsNorm", [&]<class T>() { ... });
template <class F>
decltype(auto) DispatchFloat(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kBF16:
      return f.template operator()<BF16>();
    case DType::kF64:
      return f.template operator()<double>();
    default:
      throw InvalidArgument(Str(op, ": dtype ", ToString(dtype), " is not f32, bf16 or f64"));
  }
}

}  // namespace longspan
