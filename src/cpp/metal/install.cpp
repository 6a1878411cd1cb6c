// Discovery, install, verification and undoing of the hooks.
//
// Nothing here is for the crash path: it locks, allocates and sends messages.
// Each function says, or its group does, which threads it is for.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>

#include "metal/hook_table.h"
#include "metal/hooks.h"
#include "metal/selectors.h"

namespace mlx_safe::metal {

using objc::Class;
using objc::Id;
using objc::Imp;
using objc::Method;
using objc::Selector;
using objc::send;

namespace {

// Down to `take_out`: any thread that holds `Installation::mutex` (install's,
// or whichever meets a new class, as a rule one of MLX's that encodes). The
// runtime's own lock is taken, memory is allocated.

// One method of one class that leads to a trampoline.
struct Patch {
  const HookSpec* spec;
  Class owner;
  std::size_t slot;
  bool in_place;
};

struct Installation {
  std::mutex whole;  // held by install and uninstall from end to end
  std::mutex mutex;  // guards what follows; hooks may want it for a new class
  std::vector<Patch> patches;  // never shrinks: a slot stays with its method
  HookStatus status;
};

// A forked child's own; null elsewhere.
constinit std::atomic<Installation*> g_in_child{nullptr};

// Never destroyed: hooked methods look here as long as the process lives.
Installation& installation() {
  if (Installation* own = g_in_child.load()) return *own;
  static auto* found = new Installation;
  return *found;
}

constinit std::atomic<bool> g_active{false};
constinit std::atomic<Mode> g_mode{Mode::kObserve};
constinit std::atomic<Class> g_last_class[kKinds]{};

bool owns(Class owner, Selector selector) {
  const auto& r = objc::runtime();
  unsigned int count = 0;
  Method* methods = r.class_copyMethodList(owner, &count);
  bool found = false;
  for (unsigned int i = 0; i < count && !found; ++i)
    found = r.method_getName(methods[i]) == selector;
  std::free(methods);
  return found;
}

Imp trampoline(const Patch& patch) {
  return patch.spec->slots.functions[patch.slot];
}

bool wanted(const HookSpec& spec, Mode mode) {
  return spec.when == When::kAlways || mode == Mode::kIntercept;
}

// The patch for (spec, owner), made if there is none; null when no slot is
// left.
Patch* find_patch(Installation& in, const HookSpec& spec, Class owner) {
  std::size_t used = 0;
  for (Patch& patch : in.patches) {
    if (patch.spec != &spec) continue;
    if (patch.owner == owner) return &patch;
    ++used;
  }
  if (used == kSlots) return nullptr;
  in.patches.push_back({&spec, owner, used, false});
  return &in.patches.back();
}

void put_in_place(Patch& patch, Selector selector) {
  const auto& r = objc::runtime();
  Method method = r.class_getInstanceMethod(patch.owner, selector);
  auto& original = patch.spec->slots.originals[patch.slot];
  // The trampoline may be called the moment it is in place.
  original.store(r.method_getImplementation(method));
  Imp replaced = r.method_setImplementation(method, trampoline(patch));
  original.store(replaced);
  patch.in_place = true;
}

// Patches every class of the chain that owns the method itself. A root class is
// left alone, as its methods are everybody's, unless the hook is required and
// no class below has the method. Returns how many there are.
std::size_t patch_chain(Installation& in, const HookSpec& spec, Class leaf) {
  const auto& r = objc::runtime();
  Selector selector = r.sel_registerName(spec.selector);
  std::size_t found = 0;
  for (Class c = leaf; c != nullptr; c = r.class_getSuperclass(c)) {
    bool root = r.class_getSuperclass(c) == nullptr;
    if (root && (spec.need == Need::kOptional || found > 0)) continue;
    if (!owns(c, selector)) continue;
    Patch* patch = find_patch(in, spec, c);
    if (patch == nullptr) {
      std::string why_not = std::string("too many classes have a method ") +
                            spec.selector + ": " + r.class_getName(c) +
                            " is not hooked";
      // Once: a class that takes turns with another comes by again.
      auto& reasons = in.status.reasons;
      if (std::find(reasons.begin(), reasons.end(), why_not) == reasons.end())
        reasons.push_back(std::move(why_not));
      continue;
    }
    if (!patch->in_place) put_in_place(*patch, selector);
    ++found;
  }
  return found;
}

// Restores what is still ours. Another library that has replaced the method
// since holds our trampoline as its original, so there it must stay.
void take_out(Installation& in) {
  const auto& r = objc::runtime();
  for (Patch& patch : in.patches) {
    if (!patch.in_place) continue;
    Method method = r.class_getInstanceMethod(
        patch.owner, r.sel_registerName(patch.spec->selector));
    if (r.method_getImplementation(method) != trampoline(patch)) continue;
    r.method_setImplementation(method,
                               patch.spec->slots.originals[patch.slot].load());
    patch.in_place = false;
  }
}

// Down to `stand_aside`: only the thread that installs or uninstalls.

// Live objects of every kind: their classes are what is hooked, under whatever
// name this GPU and this system have them.
struct Probe {
  objc::Owned device, queue, event;
  Id buffer = nullptr;  // autoreleased

  Id of(Kind kind) const {
    switch (kind) {
      case Kind::kDevice:
        return device.get();
      case Kind::kQueue:
        return queue.get();
      case Kind::kBuffer:
        return buffer;
      case Kind::kEvent:
        return event.get();
    }
    return nullptr;
  }
};

bool make_probe(Probe* probe, std::string* why_not) {
  const Selectors& s = selectors();
  probe->device = objc::Owned(objc::runtime().MTLCreateSystemDefaultDevice());
  if (!probe->device) {
    *why_not =
        "Metal is not hooked: there is no Metal device (in a virtual "
        "machine there may be none)";
    return false;
  }
  Id device = probe->device.get();
  if (objc::responds(device, s.newCommandQueue))
    probe->queue = objc::Owned(send<Id>(device, s.newCommandQueue));
  if (objc::responds(device, s.newSharedEvent))
    probe->event = objc::Owned(send<Id>(device, s.newSharedEvent));
  Id queue = probe->queue.get();
  if (objc::responds(queue, s.commandBufferWithUnretainedReferences))
    probe->buffer = send<Id>(queue, s.commandBufferWithUnretainedReferences);
  if (probe->buffer != nullptr && probe->event) return true;
  *why_not =
      "Metal is not hooked: the device gives no command buffer or no "
      "shared event";
  return false;
}

// What the hooks send to a buffer besides what they replace.
bool can_be_asked(Id buffer, std::string* why_not) {
  if (objc::responds(buffer, selectors().commandQueue)) return true;
  *why_not = "Metal is not hooked: a command buffer has no method commandQueue";
  return false;
}

bool patch_all(Installation& in, const Probe& probe, Mode mode,
               std::string* why_not) {
  for (const HookSpec& spec : hook_list()) {
    if (!wanted(spec, mode)) continue;
    Class leaf = objc::runtime().object_getClass(probe.of(spec.kind));
    if (patch_chain(in, spec, leaf) == 0 && spec.need == Need::kRequired) {
      *why_not = std::string("Metal is not hooked: ") +
                 objc::runtime().class_getName(leaf) + " has no method " +
                 spec.selector;
      return false;
    }
  }
  return true;
}

// In pieces, so that a process that was stopped meanwhile has the rest of them.
constexpr std::uint64_t kVerifyPieceMs = 100;
constexpr int kVerifyPieces = 50;

// Whether `event` was signalled; `failed`: the hooks raised a failure.
bool wait_for_signal(Id event, bool* failed) {
  try {
    for (int i = 0; i < kVerifyPieces; ++i)
      if (send<bool>(event, selectors().waitUntilSignaledValue,
                     std::uint64_t{1}, kVerifyPieceMs))
        return true;
  } catch (const std::exception&) {
    *failed = true;
  }
  return false;
}

// One trivial command buffer, signalling an event: the hooks must have seen it
// committed and completed.
bool verify(const Probe& probe, std::string* why_not) {
  const Selectors& s = selectors();
  HookCounters before = counters();
  Id buffer =
      send<Id>(probe.queue.get(), s.commandBufferWithUnretainedReferences);
  Id event = probe.event.get();
  send<void>(buffer, s.encodeSignalEvent, event, std::uint64_t{1});
  send<void>(buffer, s.commit);
  bool failed = false;
  bool signalled = wait_for_signal(event, &failed);
  // Its own: the buffers of other threads may fail meanwhile.
  if (send<std::uint64_t>(buffer, s.status) == kStatusError) failed = true;
  HookCounters after = counters();
  if (failed) {
    *why_not = "the hooks were taken out: a trivial command buffer failed";
  } else if (!signalled) {
    *why_not =
        "the hooks were taken out: a trivial command buffer did not "
        "complete in 5 s";
  } else if (after.buffers == before.buffers ||
             after.completed == before.completed) {
    *why_not =
        "the hooks were taken out: they did not see a trivial command "
        "buffer";
  } else {
    return true;
  }
  return false;
}

std::vector<std::string> names_of(const Installation& in) {
  std::vector<std::string> names;
  for (const Patch& patch : in.patches)
    if (patch.in_place)
      names.push_back(std::string("-[") +
                      objc::runtime().class_getName(patch.owner) + " " +
                      patch.spec->selector + "]");
  return names;
}

void stand_aside(Installation& in, std::string why_not) {
  g_active.store(false);
  // Buffers in flight keep their last handler, which lets their waiters go.
  take_out(in);
  hooks_forget_failures();
  in.status.active = in.status.verified = false;
  in.status.hooked = names_of(in);
  in.status.reasons = {std::move(why_not)};
}

}  // namespace

// Any thread, Metal's included; no lock.
bool hooks_active() noexcept {
  return g_active.load(std::memory_order_relaxed);
}

Mode hook_mode() noexcept { return g_mode.load(std::memory_order_relaxed); }

// Any thread. A look without a lock when the class is the last one seen.
void see_class(Kind kind, Id object) {
  Class leaf = objc::runtime().object_getClass(object);
  auto& last = g_last_class[static_cast<std::size_t>(kind)];
  if (last.load(std::memory_order_relaxed) == leaf) return;
  Installation& in = installation();
  std::lock_guard lock(in.mutex);
  if (!g_active.load()) return;
  for (const HookSpec& spec : hook_list())
    if (spec.kind == kind && wanted(spec, g_mode.load()))
      patch_chain(in, spec, leaf);
  last.store(leaf);
}

// This, `uninstall` and `status`: any thread but Metal's.
HookStatus install(Mode mode) {
  Installation& in = installation();
  std::lock_guard one_at_a_time(in.whole);
  if (g_in_child.load() != nullptr) return in.status;
  std::string why_not;
  if (!objc::load_runtime(&why_not)) {
    std::lock_guard lock(in.mutex);
    in.status.reasons = {why_not};
    return in.status;
  }
  objc::AutoreleasePool pool;
  Probe probe;
  bool good = make_probe(&probe, &why_not);
  {
    std::lock_guard lock(in.mutex);
    in.status.runtime = objc::runtime().path;
    if (in.status.verified && g_mode.load() == mode) return in.status;
    take_out(in);  // the other mode has other hooks
    hooks_forget_failures();
    hooks_prepare(mode);
    g_mode.store(mode);
    good = good && can_be_asked(probe.buffer, &why_not) &&
           patch_all(in, probe, mode, &why_not);
    if (good) g_active.store(true);
  }
  // Without the lock: the hooks themselves may want it for a new class.
  good = good && verify(probe, &why_not);
  std::lock_guard lock(in.mutex);
  if (!good) {
    stand_aside(in, std::move(why_not));
    return in.status;
  }
  for (std::size_t kind = 0; kind < kKinds; ++kind)
    g_last_class[kind].store(
        objc::runtime().object_getClass(probe.of(static_cast<Kind>(kind))));
  in.status.active = in.status.verified = true;
  in.status.hooked = names_of(in);
  in.status.reasons.clear();
  return in.status;
}

void uninstall() {
  Installation& in = installation();
  std::lock_guard one_at_a_time(in.whole);
  std::lock_guard lock(in.mutex);
  if (!in.status.active) return;
  stand_aside(in, "not installed");
  in.status.reasons.clear();
  if (!in.status.hooked.empty())
    in.status.reasons.push_back(
        "another library has replaced hooked methods since; the hooks there "
        "only pass on");
}

HookStatus status() {
  Installation& in = installation();
  std::lock_guard lock(in.mutex);
  HookStatus found = in.status;
  found.hooked = names_of(in);  // with the classes that were seen since
  return found;
}

// The one thread of a forked child; takes no lock, but allocates.
void after_fork_in_child() noexcept {
  g_active.store(false);
  hooks_after_fork_in_child();
  if (objc::runtime().path.empty()) return;
  // The parent's other threads may have held any lock: left where it is, as are
  // the methods, which only pass on from now.
  auto* own = new Installation;
  own->status.runtime = objc::runtime().path;
  own->status.reasons = {
      "Metal is not hooked: this is a forked child, in which Metal does not "
      "work"};
  g_in_child.store(own);
}

}  // namespace mlx_safe::metal
