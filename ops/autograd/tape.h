#pragma once
#include <functional>
#include <vector>

#include "ops/autograd/var.h"
#include "ops/core/context.h"

namespace longspan::autograd {

class KeptResults;

// The record of one forward pass: one entry per coarse op, replayed strictly in reverse. There is
// no graph search, so all ranks that record the same ops issue their collectives in the same order
// in both directions. An entry is destroyed right after it ran, which frees what it saved.
//
// A tape that does not record runs the same code for evaluation and for the first pass of a
// recomputed segment.
class Tape {
 public:
  // `kept`: of a recomputed segment (recompute.h), whose first run does not record and whose second
  // does.
  explicit Tape(Context& ctx, bool recording = true, KeptResults* kept = nullptr)
      : ctx_(ctx), recording_(recording), kept_(kept) {}
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  Context& context() { return ctx_; }
  bool recording() const { return recording_; }
  KeptResults* kept() const { return kept_; }  // for MakeOnce (kept.h); null elsewhere
  size_t size() const { return entries_.size(); }

  // `backward` reads the gradients of its outputs and adds those of its inputs. An entry none of
  // whose outputs received a gradient must do nothing, except for collectives, which it must still
  // issue. No-op when not recording.
  void Record(std::function<void()> backward) {
    if (recording_) entries_.push_back(std::move(backward));
  }

  // Runs all entries, last first; the caller has seeded the root's gradient.
  void Backward() {
    while (!entries_.empty()) {
      std::function<void()> entry = std::move(entries_.back());
      entries_.pop_back();
      entry();
    }
  }

 private:
  Context& ctx_;
  const bool recording_;
  KeptResults* const kept_;
  std::vector<std::function<void()>> entries_;
};

}  // namespace longspan::autograd
