// The hooks as a plain shared library, for hosts without Python.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fault_log.h"
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

// Hosts call it when nothing is in flight: a record that is left is a leak.
EXPORT void mlx_safe_sim_uninstall() {
  metal::uninstall();
  auto left = metal::counters();
  if (left.buffer_records != 0 && left.buffers == left.completed) {
    std::fprintf(stderr, "records left: %llu buffers\n",
                 static_cast<unsigned long long>(left.buffer_records));
    std::abort();
  }
}

EXPORT std::uint64_t mlx_safe_sim_epoch() { return fault_log().epoch(); }

EXPORT void mlx_safe_sim_counters(metal::HookCounters* out) {
  *out = metal::counters();
}
