// Between the hooks (hook_list.cpp) and their installation (install.cpp).
// Nothing here is for the crash path.
#pragma once

#include <cstdint>
#include <vector>

#include "metal/hooks.h"
#include "metal/trampolines.h"
#include "objc/runtime.h"

namespace mlx_safe::metal {

enum class Kind { kDevice, kQueue, kBuffer, kEvent };
inline constexpr std::size_t kKinds = 4;

// MTLCommandBufferStatus.
inline constexpr std::uint64_t kStatusCompleted = 4;
inline constexpr std::uint64_t kStatusError = 5;

enum class When { kAlways, kIntercept };
enum class Need { kRequired, kOptional };

struct HookSpec {
  Kind kind;  // of the live object in whose class chain the method is looked up
  const char* selector;
  Slots slots;
  When when;
  Need need;
};

// hook_list.cpp: the one list of hooks. Any thread.
const std::vector<HookSpec>& hook_list();
// hook_state.cpp: what they share. The thread that installs or uninstalls, and
// the one thread of a forked child.
void hooks_prepare(Mode mode);
void hooks_forget_failures();
void hooks_after_fork_in_child() noexcept;

// install.cpp: asked by every hook, on any thread; no locks.
bool hooks_active() noexcept;
Mode hook_mode() noexcept;
// Patches the class of `object` if it was never seen. Quick when it was.
void see_class(Kind kind, objc::Id object);

}  // namespace mlx_safe::metal
