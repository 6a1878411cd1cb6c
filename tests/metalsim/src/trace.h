// The messages that come from outside, written down.
#pragma once

#include <atomic>

#include "objc.h"

namespace metalsim {

extern std::atomic<bool> is_tracing;

void note_message(id object, SEL sel);

// Said by the thread that completes command buffers.
void this_thread_runs_handlers();

}  // namespace metalsim
