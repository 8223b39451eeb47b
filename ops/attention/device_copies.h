#pragma once
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ops/core/context.h"

namespace longspan::ops {

// What an immutable host object looks like on the GPUs that use it: a member of the object, holding
// one value for each Context that asked, made at the first call and freed with the object. Layers,
// and the forward and backward pass, so share one upload. A Context counts by its runtime, which
// the memory in a value keeps alive, so that no later one is taken for it.
//
// Threads may call Get at the same time for Contexts of their own. A copy of the object starts
// without values, because it may be changed before it is used.
class DeviceCopies {
 public:
  DeviceCopies() = default;
  DeviceCopies(const DeviceCopies&) {}
  DeviceCopies& operator=(const DeviceCopies&) {
    const std::lock_guard lock(mutex_);
    copies_.clear();
    return *this;
  }
  bool operator==(const DeviceCopies&) const { return true; }  // no part of the object's meaning

  // The value of this Context: `make()` the first time. Valid as long as the object. `make` runs
  // without the lock: it may wait for the Context's stream, and that for another rank's thread.
  template <class T, class Make>
  const T& Get(const Context& ctx, const Make& make) const {
    const cuda::Runtime* runtime = &ctx.cuda();
    std::shared_ptr<const void> copy = Find(runtime);
    if (copy == nullptr) {
      copy = std::make_shared<const T>(make());
      const std::lock_guard lock(mutex_);
      copies_.emplace_back(runtime, copy);
    }
    return *static_cast<const T*>(copy.get());
  }

 private:
  std::shared_ptr<const void> Find(const cuda::Runtime* runtime) const {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, copy] : copies_) {
      if (key == runtime) return copy;
    }
    return nullptr;
  }

  mutable std::mutex mutex_;
  mutable std::vector<std::pair<const cuda::Runtime*, std::shared_ptr<const void>>> copies_;
};

}  // namespace longspan::ops
