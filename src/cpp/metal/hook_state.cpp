#include "metal/hook_state.h"

#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <utility>

#include "crash/async_io.h"
#include "crash/fault_log.h"
#include "metal/hook_table.h"
#include "metal/hooks.h"
#include "metal/selectors.h"
#include "metal/thread_state.h"
#include "metal/waiting.h"

// Nothing in this file is for the crash path. hook_state.h, hook_table.h and
// hooks.h say which threads each function is for.

namespace mlx_safe::metal {

constinit Counters g_counters;

namespace {

constinit std::atomic<std::chrono::milliseconds> g_gate_limit{
    std::chrono::milliseconds(10'000)};

// Null in a native host. Not linked: the stable ABI has the first only from
// 3.10 on.
struct Python {
  int (*initialized)();
  void* (*thread_state)();
};

// Looked up once, by the first install: a thread that is still inside a hook
// reads them while the hooks are installed again.
const Python& python() {
  static const Python found{
      reinterpret_cast<int (*)()>(::dlsym(RTLD_DEFAULT, "Py_IsInitialized")),
      reinterpret_cast<void* (*)()>(
          ::dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState"))};
  return found;
}

}  // namespace

std::chrono::milliseconds gate_limit() noexcept { return g_gate_limit.load(); }

SharedLedger& ledger() {
  static auto* found = new SharedLedger;
  return *found;
}

SkippedWaits& skipped_waits() {
  static auto* found = new SkippedWaits;
  return *found;
}

bool any_failed() noexcept {
  return g_counters.failed.load(std::memory_order_relaxed) > 0;
}

std::uint64_t value_of(Id event) {
  return objc::send<std::uint64_t>(event, selectors().signaledValue);
}

// R18.
bool may_throw() {
  if (t_state.in_handler > 0) return false;
  auto [initialized, thread_state] = python();
  if (initialized == nullptr || thread_state == nullptr)
    return t_state.may_throw;
  return initialized() != 0 && thread_state() != nullptr;
}

void raise(const FailureRef& failure) {
  ledger().raised(failure);
  g_counters.thrown.fetch_add(1, std::memory_order_relaxed);
  throw std::runtime_error(failure->message);
}

// R19.
void give_up_waiting() {
  g_counters.gate_limit.fetch_add(1);
  FaultRecord fault{};
  fault.code = -1;
  copy_text(
      fault.message, sizeof fault.message,
      "[METAL] Command buffer execution failed: not known, its completion "
      "handlers did not run in 10 s");
  fault_log().record(fault);
  if (hook_mode() != Mode::kIntercept) return;
  auto failure = std::make_shared<Failure>(fault.message, objc::Owned());
  if (may_throw()) raise(failure);
  consume(std::move(failure));
}

// ---- for install.cpp and the bindings --------------------------------------

void hooks_prepare(Mode mode) {
  python();
  ledger().track_failures(mode == Mode::kIntercept);
}

void hooks_forget_failures() {
  ledger().forget_failures();
  skipped_waits().forget_all();
}

// Takes no lock and allocates nothing.
void hooks_after_fork_in_child() noexcept {
  ledger().reset_after_fork();
  skipped_waits().reset_after_fork();
}

HookCounters counters() {
  auto [buffers, events] = ledger().sizes();
  return {g_counters.buffers.load(),
          g_counters.completed.load(),
          g_counters.failed.load(),
          g_counters.swallowed.load(),
          g_counters.thrown.load(),
          g_counters.gate_limit.load(),
          buffers,
          events};
}

void wait_for_skipped() {
  PassThrough pass;
  await_skipped(gate_limit());
}

void this_thread_may_throw(bool may) { t_state.may_throw = may; }

void set_gate_limit(std::chrono::milliseconds limit) {
  g_gate_limit.store(limit);
}

}  // namespace mlx_safe::metal
