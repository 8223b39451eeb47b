#pragma once
#include <any>
#include <deque>
#include <type_traits>
#include <utility>

#include "ops/autograd/tape.h"
#include "ops/core/check.h"

namespace longspan::autograd {

// What an op of a recomputed segment can leave to the second run.
enum class KeptKind {
  kRows,       // the result of RecomputeRows, which is that of a decoder layer
  kAttention,  // output, statistics and choice of attention
};

// Results of ops that the first run of a recomputed segment (recompute.h) leaves to its second, in
// their order. Ops name them with MakeOnce.
class KeptResults {
 public:
  explicit KeptResults(bool attention) : attention_(attention) {}

  bool Keeps(KeptKind kind) const { return kind == KeptKind::kRows || attention_; }
  bool empty() const { return results_.empty(); }

  template <class T>
  void Put(const T& result) {
    results_.emplace_back(result);
  }
  template <class T>
  T Take() {
    T* first = results_.empty() ? nullptr : std::any_cast<T>(&results_.front());
    LONGSPAN_CHECK(first != nullptr)
        << "the second run of a recomputed segment differs from the first";
    T result = std::move(*first);
    results_.pop_front();
    return result;
  }

 private:
  const bool attention_;
  std::deque<std::any> results_;
};

// make(); in the second run of a segment that keeps results of this kind, what it returned in the
// first one instead. Collectives of make() are then not issued again, on no rank.
template <class Make>
std::invoke_result_t<Make> MakeOnce(Tape& tape, KeptKind kind, Make&& make) {
  KeptResults* kept = tape.kept();
  if (kept == nullptr || !kept->Keeps(kind)) return make();
  if (tape.recording()) return kept->Take<std::invoke_result_t<Make>>();  // the second run
  auto result = make();
  kept->Put(result);
  return result;
}

}  // namespace longspan::autograd
