// A full disk, to be preloaded: what is written to files takes of the room that
// is left, and gives it back when a file without a name is closed.
//
// Linux alone; without it nothing is limited until `full_disk` is called.
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>

namespace {

constinit std::atomic<bool> g_full{false};
constinit std::atomic<bool> g_others_are_faster{false};
constinit std::atomic<long> g_room{0};

bool is_file(int fd, struct stat* found) {
  return ::fstat(fd, found) == 0 && S_ISREG(found->st_mode);
}

}  // namespace

// From now on nothing is left. `others_are_faster`: nor when something is given
// back.
extern "C" __attribute__((visibility("default"))) void full_disk(
    int others_are_faster) {
  g_others_are_faster = others_are_faster != 0;
  g_full = true;
}

extern "C" __attribute__((visibility("default"))) ssize_t
write(int fd, const void* data, std::size_t size) {
  struct stat found = {};
  if (g_full && size > 0 && is_file(fd, &found)) {
    size = std::min(size, static_cast<std::size_t>(g_room.load()));
    if (size == 0) {
      errno = ENOSPC;
      return -1;
    }
    g_room -= static_cast<long>(size);
  }
  return ::syscall(SYS_write, fd, data, size);
}

extern "C" __attribute__((visibility("default"))) int close(int fd) {
  struct stat found = {};
  if (g_full && !g_others_are_faster && is_file(fd, &found) &&
      found.st_nlink == 0)
    g_room += static_cast<long>(found.st_size);
  return static_cast<int>(::syscall(SYS_close, fd));
}
