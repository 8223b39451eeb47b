// Memory and copies of the runtime API.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/emulated_cuda/memory.h"
#include "tests/emulated_cuda/runtime_api.h"
#include "tests/emulated_cuda/stream.h"
#include "tests/emulated_cuda/tally.h"

namespace em = longspan::emulated;
using em::Place;
using em::Report;
using em::Resolve;

struct CUmemPoolHandle_st {
  int device = 0;
};

namespace {

// Rows of a copy or fill; one row for those without a pitch.
struct Rows {
  size_t width, height;
  size_t Span(size_t pitch) const { return height == 0 ? 0 : pitch * (height - 1) + width; }
};

void CopyRows(std::byte* to, size_t to_pitch, const std::byte* from, size_t from_pitch, Rows rows) {
  for (size_t i = 0; i < rows.height; ++i) {
    std::memmove(to + i * to_pitch, from + i * from_pitch, rows.width);
  }
}

// Whether the places fit what `kind` says of them.
bool Agrees(cudaMemcpyKind kind, Place to, Place from) {
  const bool to_device = to == Place::kDevice, from_device = from == Place::kDevice;
  switch (kind) {
    case cudaMemcpyHostToHost:
      return !to_device && !from_device;
    case cudaMemcpyHostToDevice:
      return to_device && !from_device;
    case cudaMemcpyDeviceToHost:
      return !to_device && from_device;
    case cudaMemcpyDeviceToDevice:
      return to_device && from_device;
    case cudaMemcpyDefault:
      return true;
  }
  return false;
}

cudaError_t Copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, Rows rows,
                 cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
  if (em::Failed()) return Report(cudaErrorLaunchFailure);
  ++em::TheTally().copies;
  if (!wait && em::TakeFault(em::Fault::kCopy)) return Report(cudaErrorUnknown);
  if (rows.width == 0 || rows.height == 0) return Report(cudaSuccess);
  if (to == nullptr || from == nullptr) return Report(cudaErrorInvalidValue);
  const em::Location target = em::Locate(to, rows.Span(to_pitch));
  const em::Location source = em::Locate(from, rows.Span(from_pitch));
  if (!target.whole || !source.whole) return Report(cudaErrorInvalidValue);
  if (!Agrees(kind, target.place, source.place)) return Report(cudaErrorInvalidMemcpyDirection);
  stream = Resolve(stream);
  auto* out = static_cast<std::byte*>(to);
  const auto* in = static_cast<const std::byte*>(from);
  if (source.place == Place::kHost) {
    // Read now, as the driver does into memory of its own.
    auto held = std::make_shared<std::vector<std::byte>>(rows.width * rows.height);
    CopyRows(held->data(), rows.width, in, from_pitch, rows);
    stream->Add([=] { CopyRows(out, to_pitch, held->data(), rows.width, rows); });
  } else {
    stream->Add([=] { CopyRows(out, to_pitch, in, from_pitch, rows); });
  }
  const bool pageable = target.place == Place::kHost || source.place == Place::kHost;
  if (wait || pageable) ++em::TheTally().blocking_copies;
  if (!wait && target.place != Place::kHost) return cudaSuccess;
  stream->AddMark()->Wait();
  return Report(cudaSuccess);
}

cudaError_t Fill(void* to, size_t pitch, int byte, Rows rows, cudaStream_t stream) {
  if (em::Failed()) return Report(cudaErrorLaunchFailure);
  if (rows.width == 0 || rows.height == 0) return Report(cudaSuccess);
  const em::Location target = em::Locate(to, rows.Span(pitch));
  if (target.place == Place::kHost || !target.whole) return Report(cudaErrorInvalidValue);
  auto* out = static_cast<std::byte*>(to);
  Resolve(stream)->Add([=] {
    for (size_t i = 0; i < rows.height; ++i) std::memset(out + i * pitch, byte, rows.width);
  });
  return cudaSuccess;
}

void Release(void* block) {
  if (!em::ReleaseDeviceBlock(block)) {
    em::FailDevice("memory after the end of a block was written (found when it was freed)");
  }
}

}  // namespace

cudaError_t cudaMalloc(void** block, size_t bytes) {
  if (em::Failed()) return Report(cudaErrorLaunchFailure);
  *block = nullptr;
  ++em::TheTally().allocations;
  if (bytes == 0) return Report(cudaSuccess);
  if (em::TakeFault(em::Fault::kDeviceMemory)) return Report(cudaErrorMemoryAllocation);
  *block = em::NewDeviceBlock(em::CurrentDevice(), bytes);
  return Report(*block != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocAsync(void** block, size_t bytes, cudaStream_t) {
  return cudaMalloc(block, bytes);
}
cudaError_t cudaFreeAsync(void* block, cudaStream_t stream) {
  if (block == nullptr) return Report(cudaSuccess);
  if (!em::RetireDeviceBlock(block)) return Report(cudaErrorInvalidValue);
  const bool failed = em::Failed();
  Resolve(stream)->AddAlways([block] { Release(block); });
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaFree(void* block) {
  if (block == nullptr) return Report(cudaSuccess);
  if (!em::RetireDeviceBlock(block)) return Report(cudaErrorInvalidValue);
  ++em::TheTally().host_waits;
  em::WaitForStreams(em::CurrentDevice());
  Release(block);
  return Report(cudaSuccess);
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  const em::MemoryUse use = em::UseOf(em::CurrentDevice());
  *free_bytes = use.limit - std::min(use.limit, use.used);
  *total_bytes = use.limit;
  return Report(cudaSuccess);
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  constexpr int kMost = 64;
  static auto pools = [] {
    std::array<CUmemPoolHandle_st, kMost> all{};
    for (int i = 0; i < kMost; ++i) all[static_cast<size_t>(i)].device = i;
    return all;
  }();
  if (device < 0 || device >= std::min(em::DeviceCount(), kMost)) {
    return Report(cudaErrorInvalidDevice);
  }
  *pool = &pools[static_cast<size_t>(device)];
  return Report(cudaSuccess);
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  const bool known =
      pool != nullptr && value != nullptr &&
      (attribute == cudaMemPoolAttrReleaseThreshold ||
       attribute == cudaMemPoolAttrReservedMemHigh || attribute == cudaMemPoolAttrUsedMemHigh);
  return Report(known ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  if (pool == nullptr || value == nullptr) return Report(cudaErrorInvalidValue);
  const em::MemoryUse use = em::UseOf(pool->device);
  auto& out = *static_cast<uint64_t*>(value);
  switch (attribute) {
    case cudaMemPoolAttrReservedMemCurrent:
    case cudaMemPoolAttrUsedMemCurrent:
      out = use.used;
      break;
    case cudaMemPoolAttrReservedMemHigh:
    case cudaMemPoolAttrUsedMemHigh:
      out = use.high;
      break;
    default:
      return Report(cudaErrorInvalidValue);
  }
  return Report(cudaSuccess);
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t) {
  return Report(pool != nullptr ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** block, size_t bytes, unsigned flags) {
  if (em::Failed()) return Report(cudaErrorLaunchFailure);
  *block = nullptr;
  ++em::TheTally().host_allocations;
  if ((flags & ~(cudaHostAllocPortable | cudaHostAllocMapped)) != 0) {
    return Report(cudaErrorInvalidValue);
  }
  if (bytes == 0) return Report(cudaSuccess);
  if (em::TakeFault(em::Fault::kHostMemory)) return Report(cudaErrorMemoryAllocation);
  *block = em::NewPinnedBlock(bytes);
  return Report(*block != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocHost(void** block, size_t bytes) {
  return cudaHostAlloc(block, bytes, cudaHostAllocDefault);
}
cudaError_t cudaFreeHost(void* block) {
  if (block == nullptr) return Report(cudaSuccess);
  return Report(em::ReleasePinnedBlock(block) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaHostRegister(void* block, size_t bytes, unsigned flags) {
  if (block == nullptr || bytes == 0 || flags > cudaHostRegisterPortable) {
    return Report(cudaErrorInvalidValue);
  }
  return Report(em::Register(block, bytes) ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered);
}
cudaError_t cudaHostUnregister(void* block) {
  return Report(em::Unregister(block) ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const em::Location location = em::Locate(pointer, 1);
  auto* p = const_cast<void*>(pointer);
  switch (location.place) {
    case Place::kHost:
      *attributes = {cudaMemoryTypeUnregistered, -1, nullptr, p};
      break;
    case Place::kPinned:
      *attributes = {cudaMemoryTypeHost, em::CurrentDevice(), p, p};
      break;
    case Place::kDevice:
      *attributes = {cudaMemoryTypeDevice, location.device, p, nullptr};
      break;
  }
  return Report(cudaSuccess);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return Copy(to, bytes, from, bytes, {bytes, 1}, kind, stream, false);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return Copy(to, bytes, from, bytes, {bytes, 1}, kind, nullptr, true);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                                size_t bytes, cudaStream_t stream) {
  if (bytes > 0 && (em::Locate(to, bytes).device != to_device ||
                    em::Locate(from, bytes).device != from_device)) {
    return Report(cudaErrorInvalidValue);
  }
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width_bytes, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  if (to_pitch < width_bytes || from_pitch < width_bytes) return Report(cudaErrorInvalidPitchValue);
  return Copy(to, to_pitch, from, from_pitch, {width_bytes, height}, kind, stream, false);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width_bytes, size_t height, cudaMemcpyKind kind) {
  if (to_pitch < width_bytes || from_pitch < width_bytes) return Report(cudaErrorInvalidPitchValue);
  return Copy(to, to_pitch, from, from_pitch, {width_bytes, height}, kind, nullptr, true);
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream) {
  return Fill(to, bytes, byte, {bytes, 1}, stream);
}
cudaError_t cudaMemset(void* to, int byte, size_t bytes) {
  return Fill(to, bytes, byte, {bytes, 1}, nullptr);
}
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int byte, size_t width_bytes, size_t height,
                              cudaStream_t stream) {
  if (pitch < width_bytes) return Report(cudaErrorInvalidPitchValue);
  return Fill(to, pitch, byte, {width_bytes, height}, stream);
}
