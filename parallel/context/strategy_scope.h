#pragma once
#include "ops/core/context.h"
#include "parallel/comm/communicator.h"

namespace longspan::parallel {

// Counts what a pass of attention sends under `traffic`, and what it waits for its transfers under
// the Trace's `category`, while this lives. On a GPU the host does not wait, and nothing adds up.
class StrategyScope {
 public:
  StrategyScope(Context& ctx, Communicator& comm, Traffic traffic, const char* category)
      : ctx_(ctx),
        category_(category),
        timed_(comm.size() > 1 && ctx.device().kind == DeviceKind::kCpu),
        traffic_(comm, traffic),
        before_(Waited()) {}
  ~StrategyScope() {
    if (timed_) ctx_.trace().Add(category_, Waited() - before_);
  }
  StrategyScope(const StrategyScope&) = delete;
  StrategyScope& operator=(const StrategyScope&) = delete;

 private:
  double Waited() const { return timed_ ? ctx_.trace().Totals()["communication wait"] : 0; }

  Context& ctx_;
  const char* const category_;
  const bool timed_;
  const TrafficScope traffic_;
  const double before_;
};

}  // namespace longspan::parallel
