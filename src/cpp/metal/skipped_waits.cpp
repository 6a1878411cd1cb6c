#include "metal/skipped_waits.h"

#include <memory>
#include <new>
#include <utility>

// What is let go of is destroyed without the lock: releasing an object may run
// code that comes back here.

namespace mlx_safe::metal {

void SkippedWaits::add(Id event, std::uint64_t value) {
  auto wait =
      std::make_shared<const Wait>(Wait{objc::Owned::retaining(event), value});
  std::lock_guard lock(mutex_);
  waits_.push_back(std::move(wait));
  any_ = true;
}

std::vector<WaitRef> SkippedWaits::all() {
  if (!any_.load()) return {};
  std::lock_guard lock(mutex_);
  return waits_;
}

// The caller's own reference outlives the lock.
void SkippedWaits::forget(const WaitRef& wait) {
  std::lock_guard lock(mutex_);
  std::erase(waits_, wait);
  any_ = !waits_.empty();
}

void SkippedWaits::forget_all() {
  std::vector<WaitRef> old;
  std::lock_guard lock(mutex_);
  old.swap(waits_);
  any_ = false;
}

// As SharedLedger's.
void SkippedWaits::reset_after_fork() noexcept { new (this) SkippedWaits; }

}  // namespace mlx_safe::metal
