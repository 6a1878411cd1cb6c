#include "crash/report.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "crash/async_io.h"
#include "crash/async_system.h"
#include "crash/native_stack.h"
#include "crash/recrash.h"
#include "crash/report_sections.h"

namespace mlx_safe {
namespace {

constexpr int kPrivate = 0600;
constexpr int kPrivateDirectory = 0700;
// Where others may write to the directory, a link could be in its place.
constexpr int kOwnFile = O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC;
constexpr int kNamesMax = 99;  // reports of one process in one second
constexpr std::size_t kPathMax = kDirectoryMax + 64;
// What the report of a server takes whose rings and threads are many.
constexpr std::size_t kReserveBytes = 128 * 1024;

// A descriptor and the file that was opened under it. A program that closes
// what it has not opened (daemons do) gets the number again for a file of its
// own.
struct Descriptor {
  std::atomic<int> fd{-1};
  struct stat file = {};

  // Async-signal-safe.
  void hold(int opened) noexcept {
    if (::fstat(opened, &file) == 0) fd.store(opened);
  }
  // -1: there is none, or it is another file by now. Async-signal-safe.
  int get() const noexcept {
    int held = fd.load();
    struct stat now = {};
    if (held < 0 || ::fstat(held, &now) != 0) return -1;
    // Numbers of files are used again, but not by one without a name.
    bool same = now.st_dev == file.st_dev && now.st_ino == file.st_ino &&
                now.st_mode == file.st_mode && now.st_nlink == file.st_nlink;
    return same ? held : -1;
  }
};

struct State {
  std::atomic<bool> active{false};
  char directory[kDirectoryMax + 1] = {};
  char argv0[64] = {};
  std::int64_t started_ns = 0;
  std::atomic<PythonStacks> python_stacks{nullptr};
  // A file without a name, for Python's stacks on their way into the report.
  Descriptor stacks;
  // A file without a name that holds `kReserveBytes`; given up for the report
  // of a death when no other descriptor is left, or the disk is full.
  Descriptor reserve;
  std::atomic<bool> run_file_busy{false};
  std::atomic<int> ordinary_busy{0};  // reports of a process that lives on
  std::atomic<std::int64_t> run_file_pid{0};
  std::atomic<std::uint64_t> written{0}, failed{0};
  std::atomic<std::uint64_t> terminal_thread{0};
  std::atomic<bool> terminal_done{false};
  // A report tells of the death: there is to be no run file.
  std::atomic<bool> death_reported{false};
};
constinit State g_state;

// "<directory>/<prefix><number><suffix>".
bool path_of(char* path, std::size_t capacity, const char* prefix,
             std::int64_t number, const char* suffix) noexcept {
  std::size_t used = 0;
  return append_text(path, capacity, &used, g_state.directory) &&
         append_text(path, capacity, &used, "/") &&
         append_text(path, capacity, &used, prefix) &&
         append_number(path, capacity, &used,
                       static_cast<std::uint64_t>(number)) &&
         append_text(path, capacity, &used, suffix);
}

bool run_path(char* path, std::size_t capacity) noexcept {
  return path_of(path, capacity, "run-", ::getpid(), ".json");
}

// Where it is written before it is renamed.
bool new_run_path(char* path, std::size_t capacity) noexcept {
  return path_of(path, capacity, ".run-", ::getpid(), "");
}

// True if there was one. Async-signal-safe.
bool give_up_reserve() noexcept {
  int reserve = g_state.reserve.get();
  g_state.reserve.fd.store(-1);
  return reserve >= 0 && ::close(reserve) == 0;
}

// Where a program was started without stdin, stdout or stderr their numbers are
// free, and whatever prints would print into our files. Async-signal-safe.
int away_from_stdio(int fd) noexcept {
  if (fd < 0 || fd > STDERR_FILENO) return fd;
  int moved = ::fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  if (moved < 0) return fd;  // no other is left
  ::close(fd);
  return moved;
}

int open_new(const char* path) noexcept {
  constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
  int fd = ::open(path, kFlags, kPrivate);
  if (fd < 0 && (errno == EMFILE || errno == ENFILE) && give_up_reserve())
    fd = ::open(path, kFlags, kPrivate);
  // The whole directory was taken away while the process ran.
  if (fd < 0 && errno == ENOENT &&
      ::mkdir(g_state.directory, kPrivateDirectory) == 0)
    fd = ::open(path, kFlags, kPrivate);
  return away_from_stdio(fd);
}

// "<seconds>-<pid>[-<n>].json", the first that is free. Async-signal-safe.
int create_report(const Event& event, char* path,
                  std::size_t capacity) noexcept {
  for (int n = 1; n <= kNamesMax; ++n) {
    if (!path_of(path, capacity, "", event.time_ns / 1'000'000'000, "-"))
      return -1;
    std::size_t used = std::strlen(path);
    append_number(path, capacity, &used,
                  static_cast<std::uint64_t>(::getpid()));
    if (n > 1) {
      append_text(path, capacity, &used, "-");
      append_number(path, capacity, &used, static_cast<std::uint64_t>(n));
    }
    if (!append_text(path, capacity, &used, ".json")) return -1;
    int fd = open_new(path);
    if (fd >= 0 || errno != EEXIST) return fd;
  }
  return -1;
}

void dump_python_stacks(JsonWriter& json) noexcept {
  auto dump = g_state.python_stacks.load();
  int fd = g_state.stacks.get();
  json.key("python_stacks");
  if (dump == nullptr || fd < 0)
    return json.text("not available: Python has ended, or was not asked");
  if (::ftruncate(fd, 0) != 0 || ::lseek(fd, 0, SEEK_SET) != 0)
    return json.text("not available: their file cannot be used");
  // It reads the frames of threads that may run meanwhile: where the one that
  // died had no GIL, that can go wrong.
  static const char kCut[] =
      "\n(cut: a thread went on while it was looked at)\n";
  auto body = [](void* stacks) { (*static_cast<PythonStacks*>(stacks))(); };
  if (!run_part(body, &dump)) write_all(fd, kCut, sizeof kCut - 1);
  ::lseek(fd, 0, SEEK_SET);
  json.text_from(fd);
}

void stacks_sections(JsonWriter& json, const Event& event) noexcept {
  if (!event.terminal) {
    if (event.python_stacks != nullptr)
      json.member("python_stacks", event.python_stacks);
    return;
  }
  // Last of all: walking stacks is what may crash.
  sections::native_stack(json, event);
  json.flush();
  dump_python_stacks(json);
}

// A thread that has begun to write the run file may create it after it was
// removed, and not live to see that the process dies. One that writes a report
// may not live to end it. Async-signal-safe; the thread that writes may be this
// one.
void wait_for_writers() noexcept {
  for (int ms = 0; ms < 50; ++ms) {
    if (!g_state.run_file_busy.load() && g_state.ordinary_busy.load() == 0)
      return;
    sleep_ms(1);
  }
}

void write_sections(JsonWriter& json, const Event& event) noexcept {
  json.begin_object();
  sections::head(json, event, g_state.argv0, g_state.started_ns);
  if (!json.flush()) return;
  // From here on the report tells of the death, and the run file need not.
  if (event.terminal) {
    g_state.death_reported.store(true);
    wait_for_writers();
    remove_run_file();
  }
  sections::memory(json);
  json.flush();
  sections::context(json);
  json.flush();
  sections::requests(json, event.time_ns);
  json.flush();
  sections::breadcrumbs(json);
  json.flush();
  sections::command_buffers(json);
  json.flush();
  sections::faults(json);
  json.flush();
  stacks_sections(json, event);
  json.key("complete");
  json.boolean(true);
  json.raw("\n");
  json.end_object();
  json.raw("\n");
}

Event completed(const Event& event) noexcept {
  Event found = event;
  if (found.time_ns == 0) found.time_ns = now_ns();
  return found;
}

int open_without_a_name(const char* prefix) noexcept {
  char path[kPathMax];
  if (!path_of(path, sizeof path, prefix, ::getpid(), "")) return -1;
  int fd = away_from_stdio(::open(path, kOwnFile | O_RDWR, kPrivate));
  if (fd >= 0) ::unlink(path);
  return fd;
}

// Keeps the number of a descriptor that there is: Python has it.
void open_stacks_file() noexcept {
  int fd = open_without_a_name(".stacks-");
  if (fd < 0) return;
  int old = g_state.stacks.get();
  if (old < 0) return g_state.stacks.hold(fd);
  ::dup2(fd, old);
  ::fcntl(old, F_SETFD, FD_CLOEXEC);
  ::close(fd);
  g_state.stacks.hold(old);
}

// Written, not only sized: a hole takes no room.
void open_reserve() noexcept {
  int fd = open_without_a_name(".reserve-");
  if (fd < 0) return;
  static const char kZeros[4096] = {};
  std::size_t size = 0;
  while (size < kReserveBytes && write_all(fd, kZeros, sizeof kZeros))
    size += sizeof kZeros;
  // Of the last room on a disk, half is for the run file.
  bool fits = size >= kReserveBytes ||
              ::ftruncate(fd, static_cast<off_t>(size / 2)) == 0;
  if (!fits) {
    ::close(fd);
    return;
  }
  g_state.reserve.hold(fd);
}

// Of an ordinary report that nothing was written of; one of a death says at
// least that there was one.
void remove_empty(int fd, const char* path) noexcept {
  struct stat now = {};
  if (::fstat(fd, &now) == 0 && now.st_size == 0) ::unlink(path);
}

}  // namespace

int report_prepare(const char* directory, const char* argv0) noexcept {
  report_stop();
  bool fits = directory != nullptr && std::strlen(directory) <= kDirectoryMax;
  copy_text(g_state.directory, sizeof g_state.directory,
            fits ? directory : nullptr);
  copy_text(g_state.argv0, sizeof g_state.argv0, argv0);
  if (g_state.directory[0] == '\0') return -1;
  g_state.started_ns = now_ns();
  open_stacks_file();
  if (g_state.reserve.get() < 0) open_reserve();
  prime_native_stack();
  g_state.active.store(true);
  return g_state.stacks.get();
}

void report_set_python_stacks(PythonStacks python_stacks) noexcept {
  g_state.python_stacks.store(python_stacks);
}

void report_stop() noexcept { g_state.active.store(false); }

namespace {

bool write_one(const Event& given, char* path, std::size_t capacity) noexcept {
  Event event = completed(given);
  char own[kPathMax];
  int fd = create_report(event, own, sizeof own);
  if (fd < 0) {
    g_state.failed.fetch_add(1);
    return false;
  }
  JsonWriter json(fd, event.terminal ? &give_up_reserve : nullptr);
  write_sections(json, event);
  bool good = json.flush();
  if (!good && !event.terminal) remove_empty(fd, own);
  ::close(fd);
  (good ? g_state.written : g_state.failed).fetch_add(1);
  if (path != nullptr) copy_text(path, capacity, own);
  return good;
}

}  // namespace

bool write_report(const Event& given, char* path,
                  std::size_t capacity) noexcept {
  if (path != nullptr && capacity > 0) path[0] = '\0';
  if (!g_state.active.load()) return false;
  if (given.terminal) return write_one(given, path, capacity);
  g_state.ordinary_busy.fetch_add(1);
  bool good = write_one(given, path, capacity);
  g_state.ordinary_busy.fetch_sub(1);
  return good;
}

void write_second_report(const Event& given, int number,
                         const void* address) noexcept {
  if (!g_state.active.load()) return;
  Event event = completed(given);
  char path[kPathMax];
  int fd = create_report(event, path, sizeof path);
  if (fd < 0) return;
  // What crashed may be what the first tells: only the signal is new.
  Event minimal;
  minimal.why = event.why;
  minimal.time_ns = event.time_ns;
  minimal.signal = number;
  minimal.address = address;
  minimal.address_known = number != SIGABRT;
  JsonWriter json(fd, &give_up_reserve);
  json.begin_object();
  sections::head(json, minimal, nullptr, g_state.started_ns);
  json.key("second");
  json.boolean(true);
  json.key("complete");
  json.boolean(true);
  json.raw("\n");
  json.end_object();
  json.raw("\n");
  if (!json.flush()) remove_empty(fd, path);
  ::close(fd);
}

bool write_run_file() noexcept {
  if (g_state.death_reported.load()) return true;
  if (!g_state.active.load() || g_state.run_file_busy.exchange(true))
    return false;
  char temporary[kPathMax];
  char path[kPathMax];
  bool good =
      new_run_path(temporary, sizeof temporary) && run_path(path, sizeof path);
  int fd = -1;
  if (good)
    fd = away_from_stdio(::open(temporary, kOwnFile | O_WRONLY, kPrivate));
  if (fd >= 0) {
    JsonWriter json(fd);
    json.begin_object();
    json.member("schema", 1);
    json.member("why", "running");
    json.member("time_ns", now_ns());
    json.member("pid", static_cast<std::int64_t>(::getpid()));
    json.member("argv0", g_state.argv0);
    json.member("started_ns", g_state.started_ns);
    sections::memory(json);
    sections::context(json);
    sections::requests(json, now_ns());
    json.key("complete");
    json.boolean(true);
    json.raw("\n");
    json.end_object();
    json.raw("\n");
    good = json.flush();
    ::close(fd);
    // A run file that is cut is worth less than the one before it.
    good = good && ::rename(temporary, path) == 0;
    if (good) {
      g_state.run_file_pid.store(::getpid());
      // Another thread, which dies, may have removed the one before just now.
      if (g_state.death_reported.load()) remove_run_file();
    } else {
      ::unlink(temporary);
    }
  }
  g_state.run_file_busy.store(false);
  return fd >= 0 && good;
}

void remove_run_file() noexcept {
  if (g_state.run_file_pid.load() != ::getpid()) return;
  g_state.run_file_pid.store(0);
  char path[kPathMax];
  if (run_path(path, sizeof path)) ::unlink(path);
  // Another thread may be at it, and not live to see the end of it.
  if (new_run_path(path, sizeof path)) ::unlink(path);
}

void stopped_in_order() noexcept {
  // First: a thread that is about to write another one looks at this.
  g_state.death_reported.store(true);
  remove_run_file();
}

ReportCounts report_counts() noexcept {
  return {g_state.written.load(), g_state.failed.load()};
}

Claim claim_terminal() noexcept {
  std::uint64_t self = current_thread_id();
  std::uint64_t first = 0;
  if (g_state.terminal_thread.compare_exchange_strong(first, self))
    return Claim::kFirst;
  return first == self ? Claim::kSameThread : Claim::kOtherThread;
}

void terminal_written() noexcept { g_state.terminal_done.store(true); }

bool wait_for_terminal() noexcept {
  for (int ms = 0; ms < 5'000 && !g_state.terminal_done.load(); ms += 10)
    sleep_ms(10);
  return g_state.terminal_done.load();
}

void release_terminal() noexcept {
  g_state.death_reported.store(false);
  g_state.terminal_done.store(false);
  g_state.terminal_thread.store(0);
}

void report_after_fork_in_child() noexcept {
  release_terminal();
  forget_thread_id();
  g_state.run_file_busy.store(false);
  g_state.ordinary_busy.store(0);
  if (!g_state.active.load()) return;
  // What two processes hold, neither of them can give up.
  if (give_up_reserve()) open_reserve();
  // The parent's shares its position. Python knows it by its number: where that
  // is something else's by now, there is none until the next `report_prepare`.
  if (g_state.stacks.get() >= 0) {
    open_stacks_file();
  } else {
    g_state.stacks.fd.store(-1);
  }
}

}  // namespace mlx_safe
