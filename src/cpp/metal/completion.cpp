#include "metal/completion.h"

#include <chrono>
#include <memory>
#include <thread>
#include <utility>

#include "crash/async_io.h"
#include "crash/breadcrumbs.h"
#include "crash/fault_log.h"
#include "metal/error.h"
#include "metal/hook_state.h"
#include "metal/hook_table.h"
#include "metal/selectors.h"
#include "metal/thread_state.h"
#include "objc/block.h"

// On Metal's completion thread or, with a device that completes at once, on the
// thread that commits. Nothing here throws, and only `would_lower` waits. The
// ledger's lock is taken, Python's never. A Block is copied and released on any
// thread. None of it is for the crash path.

namespace mlx_safe::metal {
namespace {

using objc::send;

// For the report's list of command buffers.
void record_done(const CommandBufferRecord& done) {
  command_buffers().store(command_buffers().claim(), done);
}

FailureRef record_failure(Id buffer, CommandBufferRecord done) {
  Id error = send<Id>(buffer, selectors().error);
  FaultRecord fault{};
  describe(buffer, error, &fault);
  fault.buffer = done.number;
  fault.queue = done.queue;
  done.failed = 1;
  done.code = fault.code;
  // Before the fault, of which a report is written as soon as it is known.
  record_done(done);
  fault_log().record(fault);
  g_counters.failed.fetch_add(1, std::memory_order_relaxed);
  return std::make_shared<Failure>(fault.message,
                                   objc::Owned::retaining(error));
}

// How far the GPU got with the events of a failed buffer: the values after that
// depend on the failure (R4). And which of its waits it left out (R13).
void note_reached(Id buffer) {
  BufferRef record = ledger().find(buffer);
  if (!record) return;
  for (Signal& signal : record->signals)
    signal.reached = value_of(signal.event.get());
  // Where no thread of Python's waits, nothing else shortens the list.
  for (const WaitRef& wait : skipped_waits().all())
    if (value_of(wait->event.get()) >= wait->value)
      skipped_waits().forget(wait);
  for (const Wait& wait : record->waits)
    if (value_of(wait.event.get()) < wait.value)
      skipped_waits().add(wait.event.get(), wait.value);
}

// The GPU withholds the signals of a failed buffer, and what waits for one
// would wait for ever. They are marked failed already (R4). MLX 0.32 does them
// too. It may do so after the GPU has done the next buffer's signal of the same
// event, which it lowers then: that is put right when the next buffer
// completes.
void signal_missing(const Buffer& buffer) {
  for (const Signal& signal : buffer.signals) {
    Id event = signal.event.get();
    if (value_of(event) < signal.value && !would_lower(event, signal.value))
      send<void>(event, selectors().setSignaledValue, signal.value);
  }
}

// The last handler of every command buffer.
struct Completion {
  Id buffer;
  std::uint64_t number;

  void retain() const {}
  void release() const {}
  void invoke(Id) const {
    HandlerScope handler;
    PassThrough pass;
    objc::AutoreleasePool pool;
    CommandBufferRecord done = describe_done(buffer, number);
    FailureRef own;
    if (send<std::uint64_t>(buffer, selectors().status) == kStatusError) {
      own = record_failure(buffer, done);
    } else {
      record_done(done);
    }
    bool failed = own != nullptr;
    // Before any thread that waits for it can go on.
    g_counters.completed.fetch_add(1, std::memory_order_relaxed);
    if (failed) note_reached(buffer);
    BufferRef record = ledger().completed(buffer, std::move(own));
    if (record && any_failed()) signal_missing(*record);
  }
};

// A handler of MLX's, called inside try and catch.
struct Wrapped {
  const void* block;

  void retain() { block = objc::runtime()._Block_copy(block); }
  void release() const { objc::runtime()._Block_release(block); }
  void invoke(Id buffer) const {
    HandlerScope handler;
    try {
      objc::call_block(block, buffer);
    } catch (const std::exception& e) {
      swallowed(buffer, e.what());
    } catch (...) {
      swallowed(buffer, "an exception that is not a std::exception");
    }
  }

 private:
  // MLX throws what the failed buffer says, and `Completion` records that.
  // Anything else is recorded here.
  static void swallowed(Id buffer, const char* what) {
    g_counters.swallowed.fetch_add(1, std::memory_order_relaxed);
    if (send<std::uint64_t>(buffer, selectors().status) == kStatusError) return;
    FaultRecord fault{};
    fault.code = code_in_message(what);
    copy_text(fault.message, sizeof fault.message, what);
    fault_log().record(fault);
  }
};

}  // namespace

void add_last_handler(Id buffer, std::uint64_t number) {
  objc::StackBlock<Completion> last({buffer, number});
  send<void>(buffer, selectors().addCompletedHandler,
             static_cast<const void*>(&last));
}

void add_wrapped(Original<void, const void*> original, Id buffer,
                 Selector selector, const void* block) {
  objc::StackBlock<Wrapped> wrapped({block});
  original(buffer, selector, &wrapped);
}

// A failed buffer's signal is done for it while the GPU may be about to do a
// later one's of the same event, for which others wait. To set the lower value
// after that would undo it. The GPU gets a moment to come to where it must
// wait.
bool would_lower(Id event, std::uint64_t value) {
  using namespace std::chrono_literals;
  if (!ledger().is_pending_beyond(event, value)) return false;
  for (int i = 0; i < 10; ++i) {
    if (value_of(event) > value) return true;
    std::this_thread::sleep_for(100us);
  }
  return false;
}

}  // namespace mlx_safe::metal
