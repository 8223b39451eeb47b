#pragma once
#include "ops/core/context.h"

namespace longspan::test {

// The device that tests of device-independent code run on: cpu:0, or cuda:0 when the executable was
// started with --device=cuda.
Device TestDevice();
inline bool OnCuda() { return TestDevice().kind == DeviceKind::kCuda; }

// Host copies of elements; waits for the device. From a tensor on any device.
void CopyToHost(const Tensor& from, void* to);
// Fills a tensor on the device of `ctx` from host memory.
void CopyFromHost(Context& ctx, const void* from, const Tensor& to);
// The same elements in a tensor of another Context.
Tensor CopyTo(Context& ctx, const Tensor& from);

}  // namespace longspan::test
