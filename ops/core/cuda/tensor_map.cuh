#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "ops/core/check.h"
#include "ops/core/cuda/runtime.h"

namespace longspan::cuda::sm90 {

// A tensor in global memory and the boxes in which TMA moves it; dims innermost first.
struct TensorBoxes {
  CUtensorMapDataType type;           // BFLOAT16 or FLOAT32
  const void* data;                   // at 16 bytes
  std::span<const uint64_t> dims;     // 2 to 4
  std::span<const uint64_t> strides;  // bytes, of dims 1, 2, ...; multiples of 16
  std::span<const uint32_t> box;      // elements; with the swizzle box[0] fills 128 bytes
  bool swizzle = true;                // 128 bytes, as sm90_layout.h has it
};

// Elements outside the tensor read as 0 and are not written. The driver is asked by name, so
// nothing links libcuda.
//
// Errors: InvalidArgument for a shape that TMA cannot move, with the driver's code.
inline CUtensorMap MakeTensorMap(const TensorBoxes& boxes) {
  const size_t rank = boxes.dims.size();
  LONGSPAN_CHECK(rank >= 2 && rank <= 4 && boxes.strides.size() == rank - 1 &&
                 boxes.box.size() == rank)
      << "MakeTensorMap: " << rank << " dims, " << boxes.strides.size() << " strides, box of "
      << boxes.box.size() << "; 2 to 4 dims are possible, with a stride for all but the first";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  LONGSPAN_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                 cudaEnableDefault, &found));
  LONGSPAN_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr)
      << "MakeTensorMap: this driver has no tensor maps; CUDA 12 or newer is needed";
  constexpr uint32_t kEach[] = {1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, boxes.type, static_cast<uint32_t>(rank), const_cast<void*>(boxes.data),
      boxes.dims.data(), boxes.strides.data(), boxes.box.data(), kEach,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      boxes.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LONGSPAN_CHECK(status == CUDA_SUCCESS)
      << "MakeTensorMap: the driver refuses the shape with code " << static_cast<int>(status);
  return map;
}

}  // namespace longspan::cuda::sm90
