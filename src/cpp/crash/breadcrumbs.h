// What happened lately: breadcrumbs, and the last command buffers.
//
// Two fixed rings in static storage, so that they are still there in the crash
// path. Recording takes no lock, allocates nothing and never waits: any thread,
// Metal's included. The cost is in docs/library.md; `make bench` measures it.
#pragma once

#include <cstdint>

#include "crash/async_io.h"
#include "crash/ring.h"

namespace mlx_safe {

struct Breadcrumb {
  std::int64_t time_ns;  // since 1970
  std::uint64_t thread;  // system id
  char kind[16];         // "note", "request", "fault", …
  char text[96];
  char fields[128];  // members of a JSON object, without its braces
};

struct CommandBufferRecord {
  std::uint64_t number;  // command buffers since install
  std::uint64_t queue;   // address of the command queue
  std::int64_t time_ns;  // since 1970, when its handlers had run
  double gpu_start_s;    // GPUStartTime, GPUEndTime (CFTimeInterval);
  double gpu_end_s;      // 0: not known
  std::int32_t failed;   // 1: its status was error
  std::int32_t code;     // IOGPU code; -1: none could be read
  char label[48];
};

using Breadcrumbs = Ring<Breadcrumb, 256>;
using CommandBuffers = Ring<CommandBufferRecord, 64>;

Breadcrumbs& breadcrumbs() noexcept;
CommandBuffers& command_buffers() noexcept;

// A breadcrumb's fields: whole members only; one that does not fit is left out.
// Written where they stay: to read a copy's bytes right after they were written
// takes longer than to write them. Any thread; async-signal-safe.
class Fields {
 public:
  Fields() noexcept : json_(crumb_.fields, sizeof crumb_.fields - 1) {}

  // `write(json)` writes the value.
  template <class Write>
  Fields& add(const char* name, Write write) noexcept {
    std::size_t before = json_.used();
    if (!empty_) json_.raw(", ");
    json_.text(name);
    json_.raw(": ");
    write(json_);
    if (json_.flush()) {
      empty_ = false;
    } else {
      json_.back_to(before);
    }
    return *this;
  }

 private:
  friend void breadcrumb(const char*, const char*, Fields&) noexcept;

  Breadcrumb crumb_;
  JsonWriter json_;
  bool empty_ = true;
};

// Adds a breadcrumb; `fields` are used up. `text` and `kind` are cut to their
// room. Any thread; async-signal-safe.
void breadcrumb(const char* kind, const char* text, Fields& fields) noexcept;
void breadcrumb(const char* kind, const char* text) noexcept;

}  // namespace mlx_safe
