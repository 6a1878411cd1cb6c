// The members of a report, section by section. Async-signal-safe but for
// `native_stack` (see native_stack.h).
#pragma once

#include "crash/async_io.h"
#include "crash/report.h"

namespace mlx_safe::sections {

// `argv0` null: not told. `started_ns`: when the library was installed.
void head(JsonWriter& json, const Event& event, const char* argv0,
          std::int64_t started_ns) noexcept;
void memory(JsonWriter& json) noexcept;
void context(JsonWriter& json) noexcept;
void requests(JsonWriter& json, std::int64_t now) noexcept;
void breadcrumbs(JsonWriter& json) noexcept;
void command_buffers(JsonWriter& json) noexcept;
void faults(JsonWriter& json) noexcept;
void native_stack(JsonWriter& json, const Event& event) noexcept;

}  // namespace mlx_safe::sections
