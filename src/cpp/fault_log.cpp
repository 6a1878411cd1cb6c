#include "fault_log.h"

#include <fcntl.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace mlx_safe {
namespace {

constinit FaultLog g_log;

std::int64_t now_ns() noexcept {
  timespec t{};
  ::clock_gettime(CLOCK_REALTIME, &t);
  return static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

int hex_digit(char c) noexcept {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

FaultLog& fault_log() noexcept { return g_log; }

std::uint64_t current_thread_id() noexcept {
#if defined(__APPLE__)
  std::uint64_t id = 0;
  ::pthread_threadid_np(nullptr, &id);
  return id;
#else
  return static_cast<std::uint64_t>(::syscall(SYS_gettid));
#endif
}

std::int32_t code_in_message(const char* message) noexcept {
  if (message == nullptr) return -1;
  for (const char* open = std::strchr(message, '('); open != nullptr;
       open = std::strchr(open + 1, '(')) {
    std::uint32_t code = 0;
    int i = 1;
    for (int digit; i <= 8 && (digit = hex_digit(open[i])) >= 0; ++i)
      code = code * 16 + static_cast<std::uint32_t>(digit);
    if (i == 9 && (open[9] == ':' || open[9] == ')'))
      return static_cast<std::int32_t>(code);
  }
  return -1;
}

std::uint64_t FaultLog::record(FaultRecord fault) noexcept {
  int saved_errno = errno;
  fault.number = claimed_.fetch_add(1) + 1;
  if (fault.thread == 0) fault.thread = current_thread_id();
  if (fault.time_ns == 0) fault.time_ns = now_ns();

  Slot& slot = slots_[fault.number % kCapacity];
  std::uint64_t seen = slot.stamp.load();
  if (seen == kBusy || seen > fault.number ||
      !slot.stamp.compare_exchange_strong(seen, kBusy)) {
    // A writer that claimed this place a whole ring ago is still in it, or this
    // one was held up for so long that a newer fault is there.
    dropped_.fetch_add(1);
  } else {
    std::uint64_t words[kWords];
    std::memcpy(words, &fault, sizeof fault);
    for (std::size_t i = 0; i < kWords; ++i)
      slot.words[i].store(words[i], std::memory_order_relaxed);
    slot.stamp.store(fault.number, std::memory_order_release);
  }
  notify();
  errno = saved_errno;
  return fault.number;
}

ReadResult FaultLog::read(std::uint64_t number,
                          FaultRecord* out) const noexcept {
  if (number == 0 || number > epoch()) return ReadResult::kPending;
  if (epoch() - number >= kCapacity) return ReadResult::kLost;
  const Slot& slot = slots_[number % kCapacity];
  std::uint64_t before = slot.stamp.load(std::memory_order_acquire);
  if (before == kBusy || before < number) return ReadResult::kPending;
  if (before > number) return ReadResult::kLost;
  std::uint64_t words[kWords];
  // Acquire on each word: the second look at the stamp must not move above.
  for (std::size_t i = 0; i < kWords; ++i)
    words[i] = slot.words[i].load(std::memory_order_acquire);
  if (slot.stamp.load(std::memory_order_relaxed) != before)
    return ReadResult::kLost;
  std::memcpy(out, words, sizeof *out);
  return ReadResult::kOk;
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
