#include "parallel/context/block_bits.h"

#include <algorithm>

namespace longspan::parallel {

void BlockBits::Add(int64_t rank, const ops::BlockRun& run) {
  constexpr int32_t kDenseSteps = 32;
  const int64_t first = run.first, last = run.block(run.count - 1), step = run.step;
  if (step > kDenseSteps || last - first < 128) {
    for (int64_t b = first; b <= last; b += step) Add(rank, b);
    return;
  }
  uint64_t comb = 0;  // bits 0, step, 2 step, ...
  for (int64_t bit = 0; bit < 64; bit += step) comb |= uint64_t{1} << bit;
  uint64_t* row = Row(rank);
  int64_t phase = first % 64;  // of the run's first block in the word
  for (int64_t word = first / 64; word <= last / 64; ++word) {
    uint64_t bits = comb << phase;
    if (word == last / 64) bits &= ~uint64_t{0} >> (63 - last % 64);
    row[word] |= bits;
    phase = (phase - 64) % step;
    if (phase < 0) phase += step;
  }
}

}  // namespace longspan::parallel
