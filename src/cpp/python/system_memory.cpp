#include "python/system_memory.h"

#include <unistd.h>

#include <algorithm>

#if defined(__APPLE__)
#include <libproc.h>
#include <sys/sysctl.h>
#else
#include <fcntl.h>

#include <cstdlib>
#include <cstring>
#endif

namespace mlx_safe {
namespace {

#if defined(__APPLE__)

std::int64_t sysctl_number(const char* name) noexcept {
  // Integers have 4 or 8 bytes; both are little-endian on all that runs MLX.
  std::int64_t value = 0;
  std::size_t size = sizeof value;
  return ::sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : -1;
}

std::int64_t read_footprint() noexcept {
  rusage_info_v0 info{};
  bool good = ::proc_pid_rusage(::getpid(), RUSAGE_INFO_V0,
                                reinterpret_cast<rusage_info_t*>(&info)) == 0;
  return good ? static_cast<std::int64_t>(info.ri_phys_footprint) : -1;
}

#else

constexpr std::size_t kTextMax = 512;

// The beginning of a file; "" where there is none.
void read_text(const char* path, char (&text)[kTextMax]) noexcept {
  int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd >= 0 ? ::read(fd, text, kTextMax - 1) : 0;
  if (fd >= 0) ::close(fd);
  text[n > 0 ? n : 0] = '\0';
}

// The number that follows `name`; -1 when there is none.
std::int64_t number_after(const char* text, const char* name) noexcept {
  const char* found = std::strstr(text, name);
  if (found == nullptr) return -1;
  found += std::strlen(name);
  char* end = nullptr;
  long long value = std::strtoll(found, &end, 10);
  return end == found ? -1 : value;
}

std::int64_t read_footprint() noexcept {
  char text[kTextMax];
  read_text("/proc/self/statm", text);
  std::int64_t pages = number_after(text, " ");  // the second is the resident
  return pages < 0 ? -1 : pages * ::sysconf(_SC_PAGESIZE);
}

// A container's own limit, of either version of cgroups.
std::int64_t limited(std::int64_t total) noexcept {
  for (const char* path : {"/sys/fs/cgroup/memory.max",
                           "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    char text[kTextMax];
    read_text(path, text);
    std::int64_t limit = number_after(text, "");
    if (limit >= 0) total = std::min(total, limit);
  }
  return total;
}

#endif

}  // namespace

SystemMemory read_system_memory() noexcept {
  SystemMemory found;
  found.footprint = read_footprint();
#if defined(__APPLE__)
  found.total = sysctl_number("hw.memsize");
  std::int64_t level = sysctl_number("kern.memorystatus_level");
  if (found.total >= 0 && level >= 0)
    found.available = found.total / 100 * level;
#else
  char text[kTextMax];
  read_text("/proc/meminfo", text);
  std::int64_t total = number_after(text, "MemTotal:");
  if (total >= 0) found.total = limited(total * 1024);
  std::int64_t available = number_after(text, "MemAvailable:");
  if (available >= 0) found.available = std::min(available * 1024, found.total);
#endif
  return found;
}

}  // namespace mlx_safe
