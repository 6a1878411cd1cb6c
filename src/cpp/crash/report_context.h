// What a report tells of the process and cannot find out in the crash path:
// set beforehand, mostly from Python, kept in static storage.
//
// Setting takes no lock and never waits; reading is async-signal-safe. Any
// thread, unless it says otherwise.
#pragma once

#include <atomic>
#include <cstdint>

#include "crash/ring.h"

namespace mlx_safe {

// Bytes; -1: not known.
struct MemorySample {
  std::int64_t time_ns;  // since 1970
  std::int64_t active, peak, cache, footprint, ceiling, system_total,
      system_available;
};

// Two minutes at one entry in two seconds.
using MemoryHistory = Ring<MemorySample, 64>;

// Keeps it as the last sample; and in the history, unless that has one of the
// last two seconds, or `active` is not known. `time_ns` is filled in.
void sample_memory(MemorySample sample) noexcept;
// False when there is none.
bool last_memory(MemorySample* out) noexcept;
const MemoryHistory& memory_history() noexcept;

// Versions, machine and hook status: one JSON value. Cut ones would not be
// JSON, so what is longer than 16 KB is refused: false. One thread at a time.
bool set_report_context(const char* json) noexcept;
// "" when there is none.
const char* report_context() noexcept;

// ---- requests in flight ----------------------------------------------------

struct RequestIdentity {
  std::int64_t began_ns;  // since 1970
  char id[64];
  char path[24];
};

struct RequestRecord {
  RequestIdentity identity;
  std::int64_t prompt_tokens, prefilled, tokens;
};

// A place in the table; -1 when all 64 are taken, which the other two accept.
int request_begin(const char* id, const char* path) noexcept;
// By the thread that began it, or one that got the place from it.
void request_progress(int place, std::int64_t prompt_tokens,
                      std::int64_t prefilled, std::int64_t tokens) noexcept;
void request_end(int place) noexcept;

inline constexpr int kRequestPlaces = 64;
// False when nothing is in this place.
bool read_request(int place, RequestRecord* out) noexcept;

// The parent's requests are not the child's.
void report_context_after_fork_in_child() noexcept;

}  // namespace mlx_safe
