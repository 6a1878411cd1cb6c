#include "crash/fault_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "crash/async_system.h"

namespace mlx_safe {
namespace {

constinit FaultLog g_log;

int hex_digit(char c) noexcept {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

FaultLog& fault_log() noexcept { return g_log; }

std::int32_t code_in_message(const char* message) noexcept {
  if (message == nullptr) return -1;
  for (const char* open = std::strchr(message, '('); open != nullptr;
       open = std::strchr(open + 1, '(')) {
    std::uint32_t code = 0;
    int i = 1;
    for (int digit; i <= 8 && (digit = hex_digit(open[i])) >= 0; ++i)
      code = code * 16 + static_cast<std::uint32_t>(digit);
    if (i == 9 && (open[9] == ':' || open[9] == ')') && code <= INT32_MAX)
      return static_cast<std::int32_t>(code);
  }
  return -1;
}

std::uint64_t FaultLog::record(FaultRecord fault) noexcept {
  int saved_errno = errno;
  fault.number = ring_.claim();
  if (fault.thread == 0) fault.thread = current_thread_id();
  if (fault.time_ns == 0) fault.time_ns = now_ns();
  ring_.store(fault.number, fault);
  notify();
  errno = saved_errno;
  return fault.number;
}

int FaultLog::notify_fd() noexcept {
  int fd = read_fd_.load();
  if (fd >= 0) return fd;
  int ends[2];
  if (::pipe(ends) != 0) return -1;
  for (int end : ends) {
    ::fcntl(end, F_SETFD, FD_CLOEXEC);
    ::fcntl(end, F_SETFL, ::fcntl(end, F_GETFL) | O_NONBLOCK);
  }
  int none = -1;
  if (!read_fd_.compare_exchange_strong(none, ends[0])) {
    ::close(ends[0]);  // another thread was first
    ::close(ends[1]);
    return none;
  }
  write_fd_.store(ends[1]);
  // A fault recorded before there was a descriptor must not wait for the next.
  if (epoch() > 0) notify();
  return ends[0];
}

void FaultLog::drain_notifications() noexcept {
  char sink[64];
  int fd = read_fd_.load();
  if (fd < 0) return;
  while (::read(fd, sink, sizeof sink) > 0) {
  }
}

void FaultLog::notify() noexcept {
  int fd = write_fd_.load();
  // A full pipe is readable already, which is all that is wanted.
  if (fd >= 0) (void)!::write(fd, "!", 1);
}

void FaultLog::after_fork_in_child() noexcept {
  int reader = read_fd_.exchange(-1);
  int writer = write_fd_.exchange(-1);
  if (reader >= 0) ::close(reader);
  if (writer >= 0) ::close(writer);
}

}  // namespace mlx_safe
