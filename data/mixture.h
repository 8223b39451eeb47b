#pragma once
#include <cstdint>
#include <vector>

namespace longspan::data {

// Which source the i-th sample of a weighted mixture comes from, and the how-many-eth sample of
// that source it is: a pure function of i, found in O(sources) without looking at earlier samples.
//
// The first source is split off with probability p = w_0 / sum(w): of the first n samples it gets
// floor(n p + 1/2). The samples left over are numbered again from 0 and split in the same way among
// the other sources. So the mixture is spread evenly, with no random part, and after any n samples
// a source is off its exact share n w / sum(w) by at most 1/2 with two sources, and never by more
// than (number of sources) / 2. p is rounded to a multiple of 2^-32.
class Mixture {
 public:
  // Weights must be finite and positive; otherwise InvalidArgument naming the source's number.
  explicit Mixture(const std::vector<double>& weights);

  struct Place {
    int64_t source = 0;
    int64_t index = 0;  // 0, 1, 2, ... within the source
  };
  Place Find(int64_t sample) const;

 private:
  std::vector<uint64_t> shares_;  // p of all sources but the last, in units of 2^-32
};

}  // namespace longspan::data
