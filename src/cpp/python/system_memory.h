// What the system says of the memory of this process, and of its own.
#pragma once

#include <cstdint>

namespace mlx_safe {

// Bytes; -1: not known.
struct SystemMemory {
  // Of this process, as the system counts it: macOS phys_footprint, which
  // jetsam compares; Linux RSS.
  std::int64_t footprint = -1;
  // RAM, or less in a container.
  std::int64_t total = -1;
  // What the system could still give. macOS: its own percentage of free memory
  // (kern.memorystatus_level, what memory_pressure(1) shows); Linux:
  // MemAvailable.
  std::int64_t available = -1;
};

// Some ten microseconds. Any thread; not for the crash path.
SystemMemory read_system_memory() noexcept;

}  // namespace mlx_safe
