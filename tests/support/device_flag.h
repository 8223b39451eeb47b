#pragma once
#include "ops/core/device.h"

namespace longspan::test::internal {
void SetTestDevice(Device device);  // main.cpp, from --device
}
