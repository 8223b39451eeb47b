#include "trainer/metrics/metrics.h"

#include <sys/resource.h>

namespace longspan::trainer {

int64_t PeakRssBytes() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;  // Linux counts in KiB
}

}  // namespace longspan::trainer
