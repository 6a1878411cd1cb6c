// Small pieces that the native test programs share: the hooks as a library, and
// one command buffer driven as MLX drives it.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "check.h"
#include "hosts/host_common.h"
#include "metal/hooks.h"

namespace drive {

struct Hooks {
  int (*install)(const char*) = nullptr;
  void (*uninstall)() = nullptr;
  std::uint64_t (*epoch)() = nullptr;
  void (*mark_thread)(int) = nullptr;
  void (*set_gate_limit)(std::uint32_t ms) = nullptr;
  void (*counters)(mlx_safe::metal::HookCounters*) = nullptr;

  mlx_safe::metal::HookCounters count() const {
    mlx_safe::metal::HookCounters found;
    counters(&found);
    return found;
  }

  static Hooks open(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(2);
    }
    Hooks h;
    auto find = [&](const char* name, auto*& into) {
      into = reinterpret_cast<std::remove_reference_t<decltype(into)>>(
          dlsym(library, name));
    };
    find("mlx_safe_sim_install", h.install);
    find("mlx_safe_sim_take_out", h.uninstall);
    find("mlx_safe_sim_epoch", h.epoch);
    find("mlx_safe_sim_mark_thread", h.mark_thread);
    find("mlx_safe_sim_set_gate_limit", h.set_gate_limit);
    find("mlx_safe_sim_counters", h.counters);
    h.mark_thread(1);
    return h;
  }
};

inline host::id device() {
  static auto* one = new host::Ref(host::default_device());
  return one->get();
}

inline host::id queue() {
  static auto* one = new host::Ref(host::Ref::take(
      host::send<host::id>(device(), host::selector("newCommandQueue"))));
  return one->get();
}

// In what must come about, at any speed: only a hang takes longer.
constexpr std::uint64_t kLongMs = 600'000;

// What the MLX that is driven does with a failed buffer. 0.31.2 throws in the
// completion handler. 0.32 stores the error there, signals the event itself and
// throws where it is waited for.
enum class Regime { kIntercept, kObserve };

inline const char* name_of(Regime regime) {
  return regime == Regime::kIntercept ? "intercept" : "observe";
}

// The regimes that a case of a program's table runs in. With --list it prints a
// line for each.
enum In { kIntercept, kObserve, kBoth };

inline void list_case(const std::string& name, In in) {
  if (in != kObserve) std::printf("%s intercept\n", name.c_str());
  if (in != kIntercept) std::printf("%s observe\n", name.c_str());
}

// The error of one buffer, on its way from its handler to who waits for it.
class Stored {
 public:
  void put(std::string error) {
    std::lock_guard lock(mutex_);
    error_ = std::move(error);
  }
  std::string get() {
    std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  std::mutex mutex_;
  std::string error_;
};

// One buffer that signals an event, which is waited for. Throws what MLX of the
// regime does.
inline void run_buffer(Regime regime) {
  host::ScopedPool pool;
  host::Ref event = host::Ref::take(
      host::send<host::id>(device(), host::selector("newSharedEvent")));
  auto buffer = host::send<host::id>(
      queue(), host::selector("commandBufferWithUnretainedReferences"));
  host::send(buffer, host::selector("encodeSignalEvent:value:"), event.get(),
             std::uint64_t{1});
  auto stored = std::make_shared<Stored>();
  // The handler keeps the event alive, as MLX's do: buffers with unretained
  // references do not.
  host::Block check([event, stored, regime](host::id completed) {
    if (!host::has_failed(completed)) return;
    std::string error = "check_error: " + host::message_of(completed);
    if (regime == Regime::kIntercept) throw std::runtime_error(error);
    stored->put(std::move(error));
    host::send(event.get(), host::selector("setSignaledValue:"),
               std::uint64_t{1});
  });
  host::send(buffer, host::selector("addCompletedHandler:"), check.get());
  host::send(buffer, host::selector("commit"));
  if (!host::send<bool>(event.get(),
                        host::selector("waitUntilSignaledValue:timeoutMS:"),
                        std::uint64_t{1}, kLongMs))
    throw std::runtime_error("timed out");
  if (std::string error = stored->get(); !error.empty())
    throw std::runtime_error(error);
}

// "" when the buffer ran, else what the wait said.
inline std::string try_buffer(Regime regime) {
  try {
    run_buffer(regime);
    return {};
  } catch (const std::exception& e) {
    return e.what();
  }
}

}  // namespace drive
