#pragma once
#include <algorithm>
#include <cstdint>

namespace longspan::parallel {

// How `elements` values that lie one after another are dealt to `parts` ranks: part r is
// [begin(r), end(r)), in a buffer of slot() elements, which is the same for all parts. What fills
// up the last buffers belongs to nobody. A border may lie anywhere, inside a matrix too.
struct FlatShard {
  // Elements that slots are multiples of: shards of bf16 begin at 16 bytes then.
  static constexpr int64_t kUnit = 8;

  int64_t elements = 0;
  int64_t parts = 1;

  int64_t slot() const {
    if (parts == 1) return elements;
    const int64_t units = (elements + kUnit - 1) / kUnit;
    return (units + parts - 1) / parts * kUnit;
  }
  int64_t padded() const { return slot() * parts; }
  int64_t begin(int64_t part) const { return std::min(elements, part * slot()); }
  int64_t end(int64_t part) const { return begin(part + 1); }
};

}  // namespace longspan::parallel
