#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace longspan::ops {

// Block ids {first, first + step, ..., first + (count - 1) * step}.
struct IdRun {
  int64_t first = 0, count = 0, step = 1;
  int64_t last() const { return first + (count - 1) * step; }
};

// The common elements of two runs: again one run (count 0: none).
IdRun Intersect(const IdRun& a, const IdRun& b);

// A set of ids as ascending runs whose ranges do not overlap: one or two for contiguous, zigzag
// and striped shards.
class IdSet {
 public:
  explicit IdSet(std::vector<int32_t> ids);
  // Calls emit(IdRun) for the common elements with `run`, ascending.
  template <class Emit>
  void ForEachCommon(const IdRun& run, Emit&& emit) const {
    for (size_t i = FirstReaching(run.first); i < runs_.size() && runs_[i].first <= run.last();
         ++i) {
      const IdRun common = Intersect(run, runs_[i]);
      if (common.count > 0) emit(common);
    }
  }

 private:
  size_t FirstReaching(int64_t id) const;  // first run that ends at or after id
  std::vector<IdRun> runs_;
};

}  // namespace longspan::ops
