// Options, hooks and the one line of JSON that a host program prints.
#pragma once

#include <unistd.h>

#include <csignal>
#include <cstring>
#include <string>

#include "host_encoder.h"

namespace host {

// ---- the hook library ------------------------------------------------------

struct Hooks {
  int (*install)(const char*) = nullptr;
  void (*uninstall)() = nullptr;
  uint64_t (*epoch)() = nullptr;
  void (*mark_thread)(int client) = nullptr;  // may be missing

  explicit operator bool() const { return install != nullptr; }
};

inline Hooks& hooks() {
  static Hooks one;
  return one;
}

inline uint64_t epoch() { return hooks().epoch ? hooks().epoch() : 0; }

// A client thread is one that may be given exceptions, as Python's are.
inline void mark_thread(bool client) {
  if (hooks().mark_thread) hooks().mark_thread(client ? 1 : 0);
}

template <class Function>
void load(void* library, const char* name, Function*& into) {
  into = reinterpret_cast<Function*>(dlsym(library, name));
}

inline bool load_hooks(const char* mode) {
  if (options().hooks.empty()) return true;
  void* library = dlopen(options().hooks.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return false;
  }
  Hooks& h = hooks();
  load(library, "mlx_safe_sim_install", h.install);
  load(library, "mlx_safe_sim_uninstall", h.uninstall);
  load(library, "mlx_safe_sim_epoch", h.epoch);
  load(library, "mlx_safe_sim_mark_thread", h.mark_thread);
  if (!h.install || !h.uninstall || !h.epoch) {
    std::fprintf(stderr, "%s lacks a mlx_safe_sim_ function\n",
                 options().hooks.c_str());
    return false;
  }
  mark_thread(true);
  int result = h.install(mode);
  if (result != 0) std::fprintf(stderr, "install failed: %d\n", result);
  return result == 0;
}

// ---- the report ------------------------------------------------------------

struct Report {
  std::atomic<uint64_t> rounds{0}, told{0}, told_by_epoch{0};
  std::atomic<uint64_t> told_in_encode{0}, told_in_wait{0}, told_in_sync{0};
  std::atomic<uint64_t> other_exceptions{0}, silent_garbage{0}, good{0};
  std::string independent = "null";  // true, false, or not asked for
  bool idle = true;
  uint32_t modified_methods = 0;
  metalsim_totals before{}, after{};
};

inline Report& report() {
  static auto* one = new Report;
  return *one;
}

inline unsigned long long number(uint64_t value) { return value; }

inline void print_report(const char* name) {
  Report& r = report();
  HandlerCounts& h = handler_counts();
  std::printf(
      "{\"host\": \"%s\", \"workload\": \"%s\", \"hooks\": %s, "
      "\"buffers_committed\": %llu, \"buffers_failed\": %llu, "
      "\"rounds\": %llu, \"good\": %llu, \"told\": %llu, "
      "\"told_by_epoch\": %llu, \"told_where\": {\"encode\": %llu, "
      "\"wait\": %llu, \"synchronize\": %llu}, \"other_exceptions\": %llu, "
      "\"silent_garbage\": %llu, ",
      name, options().workload.c_str(), hooks() ? "true" : "false",
      number(r.after.buffers_committed - r.before.buffers_committed),
      number(r.after.buffers_failed - r.before.buffers_failed),
      number(r.rounds), number(r.good), number(r.told), number(r.told_by_epoch),
      number(r.told_in_encode), number(r.told_in_wait), number(r.told_in_sync),
      number(r.other_exceptions), number(r.silent_garbage));
  std::printf(
      "\"handlers_registered\": %llu, \"handlers_called\": %llu, "
      "\"handlers_released\": %llu, \"handlers_out_of_order\": %llu, "
      "\"handlers_called_twice\": %llu, \"epoch\": %llu, \"idle\": %s, "
      "\"modified_methods\": %u, \"independent_ok\": %s, \"hang\": false}\n",
      number(h.registered), number(h.called), number(h.released),
      number(h.out_of_order), number(h.called_twice), number(epoch()),
      r.idle ? "true" : "false", r.modified_methods, r.independent.c_str());
  std::fflush(stdout);
}

inline char hang_line[256];

inline void on_alarm(int) {
  ssize_t ignored = write(1, hang_line, std::strlen(hang_line));
  static_cast<void>(ignored);
  _exit(3);
}

inline void limit_time(const char* name) {
  std::snprintf(hang_line, sizeof hang_line,
                "{\"host\": \"%s\", \"workload\": \"%.40s\", \"hang\": true}\n",
                name, options().workload.c_str());
  std::signal(SIGALRM, &on_alarm);
  alarm(options().time_limit);
}

// ---- options ---------------------------------------------------------------

inline bool take(const std::string& argument, const char* name,
                 std::string& into) {
  std::string start = std::string("--") + name + "=";
  if (argument.rfind(start, 0) != 0) return false;
  into = argument.substr(start.size());
  return true;
}

template <class Number>
bool take(const std::string& argument, const char* name, Number& into) {
  std::string text;
  if (!take(argument, name, text)) return false;
  into = static_cast<Number>(std::strtoull(text.c_str(), nullptr, 0));
  return true;
}

inline bool read_option(const std::string& argument) {
  Options& o = options();
  if (argument == "--persistent") return o.persistent = true;
  if (argument == "--hold-first") return o.hold_first = true;
  return take(argument, "workload", o.workload) ||
         take(argument, "hooks", o.hooks) ||
         take(argument, "expect", o.expect) || take(argument, "mlx", o.mlx) ||
         take(argument, "trace", o.trace) ||
         take(argument, "fail-nth", o.fail_nth) ||
         take(argument, "code", o.code) ||
         take(argument, "after-commands", o.after_commands) ||
         take(argument, "late-us", o.late_us) ||
         take(argument, "seed", o.seed) || take(argument, "rounds", o.rounds) ||
         take(argument, "debug-layer", o.debug_layer) ||
         take(argument, "family", o.family) ||
         take(argument, "ops-per-buffer", o.ops_per_buffer) ||
         take(argument, "time-limit", o.time_limit);
}

inline bool read_options(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (read_option(argv[i])) continue;
    std::fprintf(stderr, "unknown option %s\n", argv[i]);
    return false;
  }
  return true;
}

}  // namespace host
