// Events and command buffers that a test puts together by hand.
#pragma once

#include "drive.h"

namespace drive {

inline host::Ref new_event() {
  return host::Ref::take(
      host::send<host::id>(device(), host::selector("newSharedEvent")));
}

inline host::Ref new_queue() {
  return host::Ref::take(
      host::send<host::id>(device(), host::selector("newCommandQueue")));
}

// A buffer that waits and signals; its handlers hold the events, as MLX's do.
struct Work {
  explicit Work(const host::Ref& queue) {
    host::ScopedPool pool;
    buffer = host::Ref::share(host::send<host::id>(
        queue.get(), host::selector("commandBufferWithUnretainedReferences")));
  }
  Work& waits(const host::Ref& event, std::uint64_t value) {
    host::send(buffer.get(), host::selector("encodeWaitForEvent:value:"),
               event.get(), value);
    return hold(event);
  }
  Work& signals(const host::Ref& event, std::uint64_t value) {
    host::send(buffer.get(), host::selector("encodeSignalEvent:value:"),
               event.get(), value);
    return hold(event);
  }
  void commit() { host::send(buffer.get(), host::selector("commit")); }

 private:
  Work& hold(const host::Ref& event) {
    host::Block holder([event](host::id) {});
    host::send(buffer.get(), host::selector("addCompletedHandler:"),
               holder.get());
    return *this;
  }
  host::Ref buffer;
};

inline std::uint64_t value_of(const host::Ref& event) {
  return host::send<std::uint64_t>(event.get(),
                                   host::selector("signaledValue"));
}

inline void set_value(const host::Ref& event, std::uint64_t value) {
  host::send(event.get(), host::selector("setSignaledValue:"), value);
}

// "reached", "timed out", or what was thrown.
inline std::string wait_for(const host::Ref& event, std::uint64_t value,
                            std::uint64_t timeout_ms = kLongMs) {
  try {
    return host::send<bool>(event.get(),
                            host::selector("waitUntilSignaledValue:timeoutMS:"),
                            value, timeout_ms)
               ? "reached"
               : "timed out";
  } catch (const std::exception& e) {
    return e.what();
  }
}

inline bool told_of_memory(const std::string& text) {
  return text.find("(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)") !=
         std::string::npos;
}

// Whether a wait that said `said` told of one failure since `before`: it
// raised, or, where MLX raises by itself, the epoch is right when the wait
// returns.
inline bool told_once(const Hooks& hooks, Regime regime, std::uint64_t before,
                      const std::string& said) {
  if (hooks.epoch() != before + 1) return false;
  return regime == Regime::kIntercept ? told_of_memory(said)
                                      : said == "reached";
}

}  // namespace drive
