// The hooks as a plain shared library, for hosts without Python.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "crash/fault_log.h"
#include "metal/hooks.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace mlx_safe;

// 0: hooked and verified.
EXPORT int mlx_safe_sim_install(const char* mode) {
  auto status = metal::install(std::strcmp(mode, "intercept") == 0
                                   ? metal::Mode::kIntercept
                                   : metal::Mode::kObserve);
  for (const auto& reason : status.reasons)
    std::fprintf(stderr, "%s\n", reason.c_str());
  return status.verified ? 0 : 1;
}

// Whether waits of the calling thread may raise, as those of Python's may.
EXPORT void mlx_safe_sim_mark_thread(int client) {
  metal::this_thread_may_throw(client != 0);
}

EXPORT void mlx_safe_sim_set_gate_limit(std::uint32_t ms) {
  metal::set_gate_limit(std::chrono::milliseconds(ms));
}

// While work goes on, too.
EXPORT void mlx_safe_sim_take_out() { metal::uninstall(); }

static std::uint64_t live_events() {
  void* sim = dlopen(metal::status().runtime.c_str(), RTLD_NOW | RTLD_NOLOAD);
  auto live = reinterpret_cast<std::int64_t (*)(const char*)>(
      dlsym(sim, "metalsim_live_objects"));
  return static_cast<std::uint64_t>(live("_MTLSharedEvent"));
}

static void check_records(const char* when, std::uint64_t buffers,
                          std::uint64_t events, std::uint64_t events_allowed) {
  if (buffers == 0 && events <= events_allowed) return;
  std::fprintf(stderr,
               "records left %s the hooks were taken out: %llu buffers, %llu "
               "events of %llu\n",
               when, static_cast<unsigned long long>(buffers),
               static_cast<unsigned long long>(events),
               static_cast<unsigned long long>(events_allowed));
  std::abort();
}

// Hosts call it when nothing is in flight: a record that is left is a leak, but
// for those of failed events that live. These are forgotten here.
EXPORT void mlx_safe_sim_uninstall() {
  std::uint64_t live = live_events();  // first: other threads may let some go
  auto last = metal::counters();
  metal::uninstall();
  auto left = metal::counters();
  if (left.buffers != left.completed) return;  // the host reports that
  check_records("before", last.buffer_records, last.event_records, live);
  check_records("after", left.buffer_records, left.event_records, 0);
}

EXPORT std::uint64_t mlx_safe_sim_epoch() { return fault_log().epoch(); }

EXPORT void mlx_safe_sim_counters(metal::HookCounters* out) {
  *out = metal::counters();
}
