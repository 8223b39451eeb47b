// main() of the unit tests: GoogleTest's, and --device=cpu|cuda for tests that run on either.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "ops/core/cuda/backend.h"
#include "tests/support/device_flag.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--device=cuda") {
      std::string why;
      if (longspan::cuda::DeviceCount(&why) == 0) {
        std::fprintf(stderr, "--device=cuda: %s\n", why.c_str());
        return 2;
      }
      longspan::test::internal::SetTestDevice({longspan::DeviceKind::kCuda, 0});
    } else if (flag != "--device=cpu") {
      std::fprintf(stderr,
                   "unknown option %s: use --device=cpu, --device=cuda or those of "
                   "GoogleTest\n",
                   flag.c_str());
      return 2;
    }
  }
  return RUN_ALL_TESTS();
}
