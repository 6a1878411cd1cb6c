#include "crash/terminate.h"

#include <cxxabi.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <typeinfo>

#include "crash/async_io.h"
#include "crash/async_system.h"
#include "crash/fault_log.h"
#include "crash/recrash.h"
#include "crash/report.h"

namespace mlx_safe {
namespace {

// Written under no lock by install (serialised by the caller) and read by the
// handler; a change while another thread terminates may be seen or not.
struct State {
  std::atomic<bool> active{false};
  std::atomic<bool> in_chain{false};
  std::atomic<std::terminate_handler> previous{nullptr};
  std::atomic<TerminatePolicy> policy{TerminatePolicy::kReport};
  std::atomic<double> drain_seconds{10.0};
  std::atomic<int> drainers{0};
  std::atomic<int (*)()> holds_gil{nullptr};
  std::atomic<void* (*)()> release_gil{nullptr};
  std::atomic<bool> reached{false};
  std::atomic<bool> drained{false};
};

constinit State g_state;

// What was thrown, in storage that the crash path may use.
struct Thrown {
  char type[256] = {};
  char message[512] = {};
};
constinit Thrown g_thrown;

// Async-signal-safe but for the rethrow, which allocates nothing: `throw;`
// raises the exception object that is already there.
void describe_current_exception() noexcept {
  const std::type_info* type = abi::__cxa_current_exception_type();
  if (type == nullptr) {
    // std::terminate() called without an exception, or a noexcept violation
    // that the runtime no longer knows of.
    copy_text(g_thrown.message, sizeof g_thrown.message, "no exception");
    return;
  }
  // The mangled name: demangling allocates.
  copy_text(g_thrown.type, sizeof g_thrown.type, type->name());
  try {
    throw;
  } catch (const std::exception& e) {
    copy_text(g_thrown.message, sizeof g_thrown.message, e.what());
  } catch (const char* text) {
    copy_text(g_thrown.message, sizeof g_thrown.message, text);
  } catch (...) {
  }
}

// What the handler does first; `run_guarded`'s argument.
struct Death {
  bool drain;
  bool recorded;
  FaultRecord fault;
  Event event;
};

// Async-signal-safe.
void record_fault(Death& death) noexcept {
  FaultRecord& fault = death.fault;
  fault.code = code_in_message(g_thrown.message);
  fault.source = static_cast<std::int32_t>(FaultSource::kTerminate);
  copy_text(fault.message, sizeof fault.message, g_thrown.message);
  if (death.drain) g_state.reached.store(true);
  fault.number = fault_log().record(fault);
  death.recorded = true;
}

void describe(void*) { describe_current_exception(); }

// `what()` is the program's own code, and may be what is broken.
void describe_no_further(int, const void*, void*) {
  copy_text(g_thrown.message, sizeof g_thrown.message,
            "not known: its what() crashed");
}

void tell(void* argument) {
  Death& death = *static_cast<Death*>(argument);
  record_fault(death);
  death.event.exception_type = g_thrown.type;
  death.event.exception_message = g_thrown.message;
  death.event.has_code = true;
  death.event.code = death.fault.code;
  write_report(death.event, nullptr, 0);
}

void tell_of_crash(int number, const void* address, void* argument) {
  write_second_report(static_cast<Death*>(argument)->event, number, address);
}

// Async-signal-safe.
void say(const char* text) noexcept {
  write_all(STDERR_FILENO, text, std::strlen(text));
}

// Or the threads that are to answer the clients would wait for this one.
void give_up_gil() noexcept {
  auto holds = g_state.holds_gil.load();
  auto release = g_state.release_gil.load();
  if (holds != nullptr && release != nullptr && holds() != 0) release();
}

// Async-signal-safe but for the release of the GIL.
[[noreturn]] void park() noexcept {
  give_up_gil();
  auto left_ms = static_cast<long>(g_state.drain_seconds.load() * 1000);
  if (g_state.drainers.load() == 0) left_ms = 0;
  for (; left_ms > 0 && !g_state.drained.load(); left_ms -= 10) sleep_ms(10);
  // Where somebody answers, `_faults` has logged it, in the form of the
  // program's log.
  if (!g_state.drained.load()) {
    say("mlx-safe: an exception reached std::terminate: ");
    say(g_thrown.message);
    say("\nmlx-safe: nobody answered the clients; leaving with status 75\n");
  }
  ::_exit(kDrainedExitStatus);
}

[[noreturn]] void pass_on() noexcept {
  auto previous = g_state.previous.load();
  if (previous != nullptr) previous();
  std::abort();  // a terminate handler must not return
}

[[noreturn]] void on_terminate() noexcept {
  if (!g_state.active.load()) pass_on();
  switch (claim_terminal()) {
    case Claim::kSameThread:
      std::abort();  // we failed inside ourselves
    case Claim::kOtherThread:
      // The first thread writes the report and decides how the process ends.
      give_up_gil();
      for (int i = 0; i < 6000; ++i) sleep_ms(10);
      std::abort();
    case Claim::kFirst:
      break;
  }

  bool drain = g_state.policy.load() == TerminatePolicy::kDrain;
  Death death{drain, false, {}, {}};
  death.event.why = "terminate";
  death.event.policy = drain ? "drain" : "report";
  death.event.time_ns = now_ns();
  death.event.terminal = true;
  run_guarded(&describe, &describe_no_further, nullptr);
  run_guarded(&tell, &tell_of_crash, &death);
  // The thread that answers the clients must be woken whatever happened.
  if (!death.recorded) record_fault(death);
  terminal_written();
  if (!drain) pass_on();

  park();
}

}  // namespace

void terminate_install(const TerminateOptions& options) noexcept {
  g_state.active.store(false);
  g_state.policy.store(options.policy);
  g_state.drain_seconds.store(options.drain_seconds);
  g_state.holds_gil.store(options.holds_gil);
  g_state.release_gil.store(options.release_gil);
  g_state.active.store(true);
  if (std::get_terminate() == &on_terminate) return;
  if (g_state.in_chain.load()) return;  // another library's is on top
  g_state.previous.store(std::set_terminate(&on_terminate));
  g_state.in_chain.store(true);
}

void terminate_uninstall() noexcept {
  g_state.active.store(false);
  if (std::get_terminate() != &on_terminate) return;
  std::set_terminate(g_state.previous.load());
  g_state.in_chain.store(false);
}

bool terminate_installed() noexcept { return g_state.active.load(); }

bool terminate_reached() noexcept { return g_state.reached.load(); }

void terminate_drainers(int more) noexcept { g_state.drainers.fetch_add(more); }

void terminate_reported() noexcept {
  if (g_state.reached.load()) wait_for_terminal();
}

// The process ends right after this: not before the report is whole.
void terminate_drained() noexcept {
  terminate_reported();
  g_state.drained.store(true);
}

void terminate_after_fork_in_child() noexcept {
  g_state.policy.store(TerminatePolicy::kReport);
  g_state.reached.store(false);
  g_state.drainers.store(0);
}

}  // namespace mlx_safe
