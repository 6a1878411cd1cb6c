#include "terminate.h"

#include <cxxabi.h>
#include <fcntl.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <typeinfo>

#include "async_io.h"
#include "fault_log.h"

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
  std::atomic<int (*)()> holds_gil{nullptr};
  std::atomic<void* (*)()> release_gil{nullptr};
  std::atomic<std::uint64_t> first_thread{0};
  std::atomic<bool> reached{false};
  std::atomic<bool> drained{false};
  char directory[1024] = {};
};

constinit State g_state;

// What was thrown, in storage that the crash path may use.
struct Thrown {
  char type[256] = {};
  char message[512] = {};
};
constinit Thrown g_thrown;

void sleep_ms(long ms) noexcept {
  timespec t{ms / 1000, (ms % 1000) * 1'000'000};
  ::nanosleep(&t, nullptr);
}

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

// "<directory>/<seconds>-<pid>.json". False when it does not fit.
// Async-signal-safe.
bool report_path(char* path, std::size_t capacity) noexcept {
  std::size_t used = std::strlen(g_state.directory);
  if (used == 0 || used + 64 > capacity) return false;
  std::memcpy(path, g_state.directory, used);
  path[used++] = '/';
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  auto put = [&](std::uint64_t value) {
    char digits[20];
    std::size_t n = 0;
    do {
      digits[n++] = static_cast<char>('0' + value % 10);
    } while ((value /= 10) != 0);
    while (n > 0) path[used++] = digits[--n];
  };
  put(static_cast<std::uint64_t>(now.tv_sec));
  path[used++] = '-';
  put(static_cast<std::uint64_t>(::getpid()));
  std::memcpy(path + used, ".json", 6);
  return true;
}

// Async-signal-safe.
void write_report(const FaultRecord& fault, bool drain) noexcept {
  char path[sizeof g_state.directory + 64];
  if (!report_path(path, sizeof path)) return;
  int fd = ::open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return;
  JsonWriter json(fd);
  json.begin_object();
  json.member("schema", 1);
  json.member("why", "terminate");
  json.member("time_ns", fault.time_ns);
  json.member("pid", static_cast<std::int64_t>(::getpid()));
  json.member("thread", static_cast<std::int64_t>(fault.thread));
  json.flush();
  json.member("exception_type", g_thrown.type);
  json.member("exception_message", g_thrown.message);
  json.member("code", fault.code);
  json.member("policy", drain ? "drain" : "report");
  json.member("epoch", static_cast<std::int64_t>(fault_log().epoch()));
  json.end_object();
  json.raw("\n");
  json.flush();
  ::close(fd);
}

// Async-signal-safe.
void say(const char* text) noexcept {
  write_all(STDERR_FILENO, text, std::strlen(text));
}

// Async-signal-safe but for the release of the GIL.
[[noreturn]] void park() noexcept {
  auto holds = g_state.holds_gil.load();
  auto release = g_state.release_gil.load();
  if (holds != nullptr && release != nullptr && holds() != 0) release();
  auto left_ms = static_cast<long>(g_state.drain_seconds.load() * 1000);
  for (; left_ms > 0 && !g_state.drained.load(); left_ms -= 10) sleep_ms(10);
  ::_exit(kDrainedExitStatus);
}

[[noreturn]] void pass_on() noexcept {
  auto previous = g_state.previous.load();
  if (previous != nullptr) previous();
  std::abort();  // a terminate handler must not return
}

[[noreturn]] void on_terminate() noexcept {
  if (!g_state.active.load()) pass_on();
  std::uint64_t self = current_thread_id();
  std::uint64_t first = 0;
  if (!g_state.first_thread.compare_exchange_strong(first, self)) {
    if (first == self) std::abort();  // we failed inside ourselves
    // The first thread writes the report and decides how the process ends.
    for (int i = 0; i < 6000; ++i) sleep_ms(10);
    std::abort();
  }

  describe_current_exception();
  bool drain = g_state.policy.load() == TerminatePolicy::kDrain;
  FaultRecord fault{};
  fault.code = code_in_message(g_thrown.message);
  fault.source = static_cast<std::int32_t>(FaultSource::kTerminate);
  copy_text(fault.message, sizeof fault.message, g_thrown.message);
  if (drain) g_state.reached.store(true);
  fault.number = fault_log().record(fault);
  fault_log().read(fault.number, &fault);
  write_report(fault, drain);
  if (!drain) pass_on();

  say("mlx-safe: an exception reached std::terminate: ");
  say(g_thrown.message);
  say("\nmlx-safe: answering the clients, then leaving with status 75\n");
  park();
}

}  // namespace

void terminate_install(const TerminateOptions& options) noexcept {
  g_state.active.store(false);
  copy_text(g_state.directory, sizeof g_state.directory,
            options.report_directory);
  g_state.policy.store(options.policy);
  g_state.drain_seconds.store(options.drain_seconds);
  g_state.holds_gil.store(options.holds_gil);
  g_state.release_gil.store(options.release_gil);
  g_state.active.store(true);
  if (std::get_terminate() == &on_terminate) return;
  if (g_state.in_chain.load()) return;  // somebody else's is on top of ours
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

void terminate_drained() noexcept { g_state.drained.store(true); }

void terminate_after_fork_in_child() noexcept {
  g_state.policy.store(TerminatePolicy::kReport);
  g_state.reached.store(false);
  g_state.first_thread.store(0);
}

}  // namespace mlx_safe
