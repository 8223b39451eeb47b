#pragma once
#include <string>

namespace longspan {

enum class DeviceKind { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;  // ordinal among the devices of this kind that the process sees
  bool operator==(const Device&) const = default;
};

inline std::string ToString(Device device) {
  return (device.kind == DeviceKind::kCpu ? "cpu:" : "cuda:") + std::to_string(device.index);
}

}  // namespace longspan
