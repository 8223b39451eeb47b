#include "ops/elementwise/cpu/row_kernels.h"

namespace longspan::ops::internal {
namespace {

RowKernelChoices Choices() {
  RowKernelChoices c{};
#ifdef LONGSPAN_HAVE_ROW_SETS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) c.sets[c.count++] = &avx512_bf16::kRowKernels;
    c.sets[c.count++] = &avx512::kRowKernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    c.sets[c.count++] = &avx2::kRowKernels;
  }
#endif
  c.sets[c.count++] = &portable::kRowKernels;
  return c;
}

}  // namespace

const RowKernelChoices& AvailableRowKernels() {
  static const RowKernelChoices choices = Choices();
  return choices;
}

template <>
const RowKernels<float>& Rows<float>(size_t output_bytes) {
  const RowKernelSet& set = *AvailableRowKernels().sets[0];
  return output_bytes > kStreamingBytes ? set.f32_streaming : set.f32;
}
template <>
const RowKernels<BF16>& Rows<BF16>(size_t output_bytes) {
  const RowKernelSet& set = *AvailableRowKernels().sets[0];
  return output_bytes > kStreamingBytes ? set.bf16_streaming : set.bf16;
}
template <>
const RowKernels<double>& Rows<double>(size_t) {
  return portable::kRowKernelsF64;
}

}  // namespace longspan::ops::internal
