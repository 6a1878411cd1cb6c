#include "metal/hooks.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "crash/async_io.h"
#include "crash/breadcrumbs.h"
#include "crash/fault_log.h"
#include "metal/error.h"
#include "metal/hook_table.h"
#include "metal/ledger.h"
#include "metal/selectors.h"
#include "metal/thread_state.h"
#include "objc/block.h"

// How an exception is kept from std::terminate: each completion handler that
// MLX adds is wrapped in a Block that calls it inside try and catch. The other
// way, to let `status` report Completed while the handlers run ("mask"), costs
// a little less but rests on more: that handlers run in the order in which they
// were added, that nobody else reads `status` in one, and that MLX throws for
// no other reason. A wrapped handler is called whatever happens, sees the
// truth, and nothing that it throws gets out. Figures: docs/metal.md.
//
// Nothing in this file is for the crash path: it sends messages, and the ledger
// locks and allocates. Which threads each group is for stands above it.

namespace mlx_safe::metal {

using objc::Id;
using objc::Selector;
using objc::send;

namespace {

// A handler that never runs must not become a hang of ours.
constinit std::atomic<std::chrono::milliseconds> g_gate_limit{
    std::chrono::milliseconds(10'000)};

struct Counters {
  std::atomic<std::uint64_t> buffers{0}, completed{0}, failed{0}, swallowed{0},
      thrown{0}, gate_limit{0};
};
constinit Counters g_counters;

// Any thread.
bool any_failed() {
  return g_counters.failed.load(std::memory_order_relaxed) > 0;
}

// Any thread. Never destroyed: Metal's threads may still complete buffers at
// exit.
Ledger& ledger() {
  static auto* found = new Ledger;
  return *found;
}

int (*g_python_initialized)() = nullptr;
void* (*g_python_thread_state)() = nullptr;

// Any thread; takes no GIL. MLX's CPU stream threads terminate on an exception;
// Python's threads surface it as RuntimeError.
bool may_throw() {
  if (t_state.in_handler > 0) return false;
  if (g_python_thread_state == nullptr) return t_state.may_throw;
  return g_python_initialized() != 0 && g_python_thread_state() != nullptr;
}

// Only where `may_throw()`, so never on Metal's threads.
[[noreturn]] void raise(const FailureRef& failure) {
  ledger().tell(failure);
  g_counters.thrown.fetch_add(1, std::memory_order_relaxed);
  throw std::runtime_error(failure->message);
}

// A wait is let go although handlers have not run: it is not known whether what
// it waited for is good, so it counts as failed. Raises where that may be. Any
// thread but Metal's, which never wait.
void give_up_waiting() {
  g_counters.gate_limit.fetch_add(1);
  FaultRecord fault{};
  fault.code = -1;
  copy_text(
      fault.message, sizeof fault.message,
      "[METAL] Command buffer execution failed: not known, its completion "
      "handlers did not run in 10 s");
  fault_log().record(fault);
  if (hook_mode() != Mode::kIntercept) return;
  auto failure = std::make_shared<Failure>(fault.message, objc::Owned());
  if (may_throw()) raise(failure);
  consume(std::move(failure));
}

// ---- on Metal's completion thread ------------------------------------------
// Or, with a device that completes at once, on the thread that commits. Nothing
// here throws, and only `would_lower` waits, a millisecond at most; the
// ledger's lock is taken, Python's never. A Block of ours is copied and let go
// of on any thread.

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

std::uint64_t value_of(const objc::Owned& event) {
  return send<std::uint64_t>(event.get(), selectors().signaledValue);
}

// How far the GPU got with the events of a failed buffer: the values after that
// are the ones that depend on the failure. And which of its waits it left out.
void note_reached(Id buffer) {
  BufferRef record = ledger().find(buffer);
  if (!record) return;
  for (Signal& signal : record->signals)
    signal.reached = value_of(signal.event);
  // Where no thread of Python's waits, nobody else takes the list down.
  for (const Ledger::WaitRef& wait : ledger().skipped_waits())
    if (value_of(wait->event) >= wait->value) ledger().forget_skipped(wait);
  for (const Wait& wait : record->waits)
    if (value_of(wait.event) < wait.value)
      ledger().wait_skipped(wait.event.get(), wait.value);
}

// A failed buffer's signal is done for it while the GPU may be about to do a
// later one's of the same event, for which others wait: to set the lower value
// after it would undo it. The GPU gets a moment to come to where it must wait.
bool would_lower(Id event, std::uint64_t value) {
  using namespace std::chrono_literals;
  if (!ledger().is_pending_beyond(event, value)) return false;
  for (int i = 0; i < 10; ++i) {
    if (send<std::uint64_t>(event, selectors().signaledValue) > value)
      return true;
    std::this_thread::sleep_for(100us);
  }
  return false;
}

// The GPU withholds the signals of a failed buffer; whoever waits for one would
// wait for ever. They are marked failed already. MLX 0.32 does them too, and
// may come later than the GPU with the next buffer's signal of the same event,
// which is lowered then: that is put right when the next buffer completes.
void signal_missing(const Buffer& buffer) {
  for (const Signal& signal : buffer.signals)
    if (value_of(signal.event) < signal.value &&
        !would_lower(signal.event.get(), signal.value))
      send<void>(signal.event.get(), selectors().setSignaledValue,
                 signal.value);
}

// The last handler of every command buffer.
struct Completion {
  Id buffer;
  std::uint64_t number;  // of the buffer, since the first install

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
    // Before anybody who waits for it can go on.
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
  // MLX throws what the failed buffer says, and that is recorded by
  // `Completion`. Anything else is recorded here.
  static void swallowed(Id buffer, const char* what) {
    g_counters.swallowed.fetch_add(1, std::memory_order_relaxed);
    if (send<std::uint64_t>(buffer, selectors().status) == kStatusError) return;
    FaultRecord fault{};
    fault.code = code_in_message(what);
    copy_text(fault.message, sizeof fault.message, what);
    fault_log().record(fault);
  }
};

// ---- command buffers
// ---------------------------------------------------------

// On whatever thread sends the message; for MLX one that encodes, and for
// `dealloc`, which always forgets, also Metal's completion thread. Nested in
// another hook the others only pass on, and in a completion handler those that
// could wait or tell. `waitUntilCompleted` alone waits here; what waits for it,
// or for work beside it, is for the waiting thread, never for Metal's.

void hook_addCompletedHandler(void (*original)(Id, Selector, const void*),
                              Id self, Selector selector, const void* block) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active() || block == nullptr)
    return original(self, selector, block);
  objc::StackBlock<Wrapped> wrapped({block});
  original(self, selector, &wrapped);
}

void hook_commit(void (*original)(Id, Selector), Id self, Selector selector) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active()) return original(self, selector);
  see_class(Kind::kBuffer, self);
  std::uint64_t number =
      g_counters.buffers.fetch_add(1, std::memory_order_relaxed) + 1;
  ledger().committed(self, send<Id>(self, selectors().commandQueue));
  // Last of all: when it runs, every handler of MLX's has run.
  objc::StackBlock<Completion> last({self, number});
  send<void>(self, selectors().addCompletedHandler,
             static_cast<const void*>(&last));
  original(self, selector);
}

void hook_encodeSignal(void (*original)(Id, Selector, Id, std::uint64_t),
                       Id self, Selector selector, Id event,
                       std::uint64_t value) {
  PassThrough pass;
  if (!pass.was_inside() && hooks_active() && event != nullptr)
    ledger().signal_encoded(self, event, value);
  original(self, selector, event, value);
}

void hook_encodeWait(void (*original)(Id, Selector, Id, std::uint64_t), Id self,
                     Selector selector, Id event, std::uint64_t value) {
  PassThrough pass;
  if (!pass.was_inside() && hooks_active() && event != nullptr)
    ledger().wait_encoded(self, event, value);
  original(self, selector, event, value);
}

// The GPU leaves out the waits of a failed buffer, so MLX's handlers let go of
// its arrays while other queues or the CPU may still be writing to them, which
// the GPU's waits prevent otherwise: the memory would be used again, or
// unmapped, under that work. MLX's thread waits for it before it goes on; not
// while it has encoded signals that this work may be waiting for. With less
// time than the gate's limit, as a caller of a wait may have, what is left is
// for the next one.
void await_skipped(std::chrono::milliseconds limit) {
  using namespace std::chrono_literals;
  using Clock = std::chrono::steady_clock;
  std::vector<Ledger::WaitRef> waits = ledger().skipped_waits();
  if (waits.empty() || !may_throw() || ledger().is_encoding_here()) return;
  bool whole = limit >= g_gate_limit.load();
  Clock::duration left = limit;
  Clock::time_point last = Clock::now();
  for (const Ledger::WaitRef& wait : waits) {
    while (value_of(wait->event) < wait->value && left > 0s) {
      std::this_thread::sleep_for(100us);
      Clock::time_point now = Clock::now();
      // While the process is stopped that work does not go on either.
      left -= std::min<Clock::duration>(now - last, 100ms);
      last = now;
    }
    if (value_of(wait->event) < wait->value) {
      if (!whole) return;
      g_counters.gate_limit.fetch_add(1);
    }
    ledger().forget_skipped(wait);
  }
}

// Does, for whoever waits, signals that nobody can commit. Not for Metal's
// threads.
void signal_instead(const std::vector<Ledger::WaitRef>& held) {
  for (const Ledger::WaitRef& wait : held)
    if (value_of(wait->event) < wait->value)
      send<void>(wait->event.get(), selectors().setSignaledValue, wait->value);
}

// When MLX 0.32 raises a stored failure in the midst of an evaluation, it waits
// for each stream in turn, and the first may be waiting for what this very
// thread has encoded for the next and not committed. Nobody else can commit it:
// what is waited for is signalled, as that evaluation has failed.
void let_go_of_own_signals(const BufferRef& waited_for) {
  using namespace std::chrono_literals;
  while (!ledger().settle_buffer(waited_for, 50ms)) {
    if (!any_failed()) continue;  // MLX knows before our handler has run
    signal_instead(ledger().awaited_from_here());
    if (!ledger().is_encoding_here()) return;
  }
}

void hook_waitUntilCompleted(void (*original)(Id, Selector), Id self,
                             Selector selector) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return original(self, selector);
  BufferRef record = ledger().find(self);
  if (record && ledger().is_encoding_here()) let_go_of_own_signals(record);
  original(self, selector);
  if (record && !ledger().settle_buffer(record, g_gate_limit.load()))
    give_up_waiting();
  await_skipped(g_gate_limit.load());
}

// MLX 0.31.2's synchronize looks at the status of its own, empty buffer; a
// failure of an earlier one on the queue must show there.
std::uint64_t hook_status(std::uint64_t (*original)(Id, Selector), Id self,
                          Selector selector) {
  PassThrough pass;
  std::uint64_t status = original(self, selector);
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return status;
  if (status != kStatusCompleted && status != kStatusError) return status;
  if (t_state.telling != nullptr) t_state.telling->reset();
  if (!may_throw()) return status;
  FailureRef failure =
      ledger().untold_on(send<Id>(self, selectors().commandQueue));
  if (!failure) return status;
  // MLX asks for the error's text, and crashes where there is none.
  if (!failure->error) raise(failure);
  ledger().tell(failure);
  remember(&t_state.telling, std::move(failure));
  return kStatusError;
}

Id hook_error(Id (*original)(Id, Selector), Id self, Selector selector) {
  PassThrough pass;
  Id error = original(self, selector);
  if (error != nullptr || pass.was_inside() || t_state.telling == nullptr ||
      !*t_state.telling)
    return error;
  return (*t_state.telling)->error.get();
}

void hook_buffer_dealloc(void (*original)(Id, Selector), Id self,
                         Selector selector) {
  ledger().forget_buffer(self);
  original(self, selector);
}

// ---- shared events
// --------------------------------------------------------------

// On whatever thread sends the message, in MLX Python's and its CPU streams';
// in a completion handler all but `dealloc` and `setSignaledValue:`, which may
// take a millisecond, only pass on. `waitUntilSignaledValue:` waits, and alone
// raises, where `may_throw()`.

constexpr std::uint64_t kForever_ms = 1'000'000'000;  // MLX: 2^64 - 1

// How long a wait may be held back, of the time that its caller gave it.
std::chrono::milliseconds rest_of(std::uint64_t timeout_ms,
                                  std::chrono::steady_clock::time_point begin) {
  using std::chrono::milliseconds;
  auto spent = std::chrono::duration_cast<milliseconds>(
      std::chrono::steady_clock::now() - begin);
  auto limit = g_gate_limit.load();
  if (timeout_ms > kForever_ms) return limit;
  milliseconds given(static_cast<std::int64_t>(timeout_ms));
  return std::min(limit, std::max(given - spent, milliseconds(0)));
}

// What a wait for `event` is held up by now.
Ledger::HeldUp held_up_by(Id event, std::uint64_t value) {
  using namespace std::chrono_literals;
  Ledger::Reached reached;
  for (const Ledger::WaitRef& wait : ledger().waits_in_flight())
    reached.emplace(wait->event.get(), value_of(wait->event));
  return ledger().held_up_by(event, value, reached, 1s, 100ms);
}

bool is_same(const std::vector<Ledger::WaitRef>& one,
             const std::vector<Ledger::WaitRef>& other) {
  return std::is_permutation(one.begin(), one.end(), other.begin(), other.end(),
                             [](const auto& a, const auto& b) {
                               return a->event.get() == b->event.get() &&
                                      a->value == b->value;
                             });
}

// A wait of a CPU stream's thread, which must end although MLX holds back what
// it waits for. MLX 0.32 raises a failure in the midst of an evaluation: it
// waits for the CPU's streams first, and commits the GPU's buffers later. So a
// CPU stream may wait for a signal that the raising thread has encoded and not
// committed.
//
// The rule: such a wait is ended by doing those signals. That happens as soon
// as the thread that encoded them has committed nothing for a second since what
// it had committed before failed. Any other wait that the same open signals
// hold up is ended when they have held one up for as long as a wait here may
// take.
//
// In the first case MLX is raising already. A buffer that was opened later than
// 100 ms after the failure may be of a new evaluation, which raises nothing.
// That is the second case: a fault is counted, as it is not known what is read
// then. The open signals are done, and not what waits for them. So what was
// committed runs, and is through before the memory that it uses is let go of.
bool wait_on_cpu_stream(bool (*original)(Id, Selector, std::uint64_t,
                                         std::uint64_t),
                        Id self, Selector selector, std::uint64_t value) {
  using namespace std::chrono_literals;
  // An evaluation that has failed may leave many waits behind: soon, at first.
  std::uint64_t look_after_ms = any_failed() ? 50 : 500;
  std::chrono::milliseconds unchanged = 0ms;
  std::vector<Ledger::WaitRef> before;
  for (; !original(self, selector, value, look_after_ms); look_after_ms = 500) {
    if (!any_failed()) continue;
    Ledger::HeldUp held = held_up_by(self, value);
    // Counted by looks: while the process is stopped nobody commits either.
    unchanged = !held.by.empty() && is_same(held.by, before)
                    ? unchanged + std::chrono::milliseconds(look_after_ms)
                    : 0ms;
    before = std::move(held.by);
    bool raising = held.by_failure && hook_mode() == Mode::kObserve;
    if (!raising) {
      if (!held.given_up && (before.empty() || unchanged < g_gate_limit.load()))
        continue;
      ledger().give_up_on(before);
      give_up_waiting();
      // Whatever else depends on them is no better.
      if (FailureRef failure = consumed_failure())
        for (const Ledger::WaitRef& wait : before)
          ledger().signalled_by_cpu(wait->event.get(), wait->value, failure);
    }
    signal_instead(before);
  }
  return true;
}

bool hook_waitUntilSignaledValue(
    bool (*original)(Id, Selector, std::uint64_t, std::uint64_t), Id self,
    Selector selector, std::uint64_t value, std::uint64_t timeout_ms) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return original(self, selector, value, timeout_ms);
  auto begin = std::chrono::steady_clock::now();
  bool reached;
  try {
    reached = timeout_ms > kForever_ms && !may_throw()
                  ? wait_on_cpu_stream(original, self, selector, value)
                  : original(self, selector, value, timeout_ms);
  } catch (...) {
    // A second copy of this library, below us, has told of the failure.
    if (FailureRef failure = ledger().failure_of(self, value))
      ledger().tell(failure);
    throw;
  }
  if (!reached) return reached;
  auto real = send<std::uint64_t>(self, selectors().signaledValue);
  auto limit = rest_of(timeout_ms, begin);
  if (!ledger().settle_event(self, value, real, limit)) {
    // The caller's own time is up.
    if (limit < g_gate_limit.load()) return false;
    give_up_waiting();
  }
  await_skipped(rest_of(timeout_ms, begin));
  if (hook_mode() != Mode::kIntercept) return reached;  // MLX raises by itself
  FailureRef failure = ledger().failure_of(self, value);
  if (!failure) return reached;
  if (may_throw()) raise(failure);
  consume(std::move(failure));
  return reached;
}

std::uint64_t hook_signaledValue(std::uint64_t (*original)(Id, Selector),
                                 Id self, Selector selector) {
  PassThrough pass;
  std::uint64_t real = original(self, selector);
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return real;
  if (may_throw()) return ledger().visible(self, real);
  // Whoever may not be told would poll for ever: it is let go, and what it
  // signals next is marked failed.
  if (FailureRef failure = ledger().failure_of(self, real))
    consume(std::move(failure));
  return ledger().settled_value(self, real);
}

void hook_setSignaledValue(void (*original)(Id, Selector, std::uint64_t),
                           Id self, Selector selector, std::uint64_t value) {
  PassThrough pass;
  if (!pass.was_inside() && hooks_active() && t_state.in_handler == 0) {
    FailureRef failure = consumed_failure();
    ledger().signalled_by_cpu(self, value, failure);
    if (failure) t_state.consumed_passed_on = true;
  }
  if (!pass.was_inside() && hooks_active() && would_lower(self, value)) return;
  original(self, selector, value);
}

void hook_event_dealloc(void (*original)(Id, Selector), Id self,
                        Selector selector) {
  ledger().forget_event(self);
  original(self, selector);
}

// ---- new objects: an address may be used again, a class be seen first
// -----------

// On whatever thread makes the object. Takes the ledger's lock, and
// install.cpp's for a class that was not seen before. `newSharedEvent` alone
// may wait, after a failure, where `may_throw()`.

Id new_buffer(Id buffer, const PassThrough& pass) {
  if (buffer != nullptr && !pass.was_inside()) {
    ledger().forget_buffer(buffer);
    if (hooks_active()) see_class(Kind::kBuffer, buffer);
  }
  return buffer;
}

Id new_queue(Id queue, const PassThrough& pass) {
  if (queue != nullptr && !pass.was_inside()) {
    ledger().forget_queue(queue);
    if (hooks_active()) see_class(Kind::kQueue, queue);
  }
  return queue;
}

Id hook_commandBuffer(Id (*original)(Id, Selector), Id self,
                      Selector selector) {
  PassThrough pass;
  return new_buffer(original(self, selector), pass);
}

Id hook_commandBufferWithDescriptor(Id (*original)(Id, Selector, Id), Id self,
                                    Selector selector, Id descriptor) {
  PassThrough pass;
  return new_buffer(original(self, selector, descriptor), pass);
}

Id hook_newCommandQueue(Id (*original)(Id, Selector), Id self,
                        Selector selector) {
  PassThrough pass;
  return new_queue(original(self, selector), pass);
}

Id hook_newCommandQueueWithCount(Id (*original)(Id, Selector, std::uint64_t),
                                 Id self, Selector selector,
                                 std::uint64_t count) {
  PassThrough pass;
  return new_queue(original(self, selector, count), pass);
}

Id hook_newSharedEvent(Id (*original)(Id, Selector), Id self,
                       Selector selector) {
  PassThrough pass;
  Id event = original(self, selector);
  if (event != nullptr && !pass.was_inside()) {
    ledger().forget_event(event);
    if (hooks_active()) {
      see_class(Kind::kEvent, event);
      // MLX makes one at the start of every evaluation: those that found their
      // error stored already, and waited for nothing, come by here.
      await_skipped(g_gate_limit.load());
    }
  }
  return event;
}

}  // namespace

// ---- the list
// ---------------------------------------------------------------------

// Any thread: made once, by the first install.
const std::vector<HookSpec>& hook_list() {
  static const auto* list = new std::vector<HookSpec>{
#define MLX_SAFE_HOOK(kind, selector, function, when, need)         \
  {Kind::kind, selector, Trampolines<__LINE__, &function>::slots(), \
   When::when, Need::need}
      // clang-format off
      MLX_SAFE_HOOK(kBuffer, "addCompletedHandler:", hook_addCompletedHandler, kIntercept, kRequired),
      MLX_SAFE_HOOK(kBuffer, "commit", hook_commit, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "encodeSignalEvent:value:", hook_encodeSignal, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "encodeWaitForEvent:value:", hook_encodeWait, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "waitUntilCompleted", hook_waitUntilCompleted, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "status", hook_status, kIntercept, kRequired),
      MLX_SAFE_HOOK(kBuffer, "error", hook_error, kIntercept, kRequired),
      MLX_SAFE_HOOK(kBuffer, "dealloc", hook_buffer_dealloc, kAlways, kOptional),
      MLX_SAFE_HOOK(kEvent, "waitUntilSignaledValue:timeoutMS:", hook_waitUntilSignaledValue, kAlways, kRequired),
      MLX_SAFE_HOOK(kEvent, "signaledValue", hook_signaledValue, kAlways, kRequired),
      MLX_SAFE_HOOK(kEvent, "setSignaledValue:", hook_setSignaledValue, kAlways, kRequired),
      MLX_SAFE_HOOK(kEvent, "dealloc", hook_event_dealloc, kAlways, kOptional),
      MLX_SAFE_HOOK(kQueue, "commandBuffer", hook_commandBuffer, kAlways, kOptional),
      MLX_SAFE_HOOK(kQueue, "commandBufferWithUnretainedReferences", hook_commandBuffer, kAlways, kRequired),
      MLX_SAFE_HOOK(kQueue, "commandBufferWithDescriptor:", hook_commandBufferWithDescriptor, kAlways, kOptional),
      MLX_SAFE_HOOK(kDevice, "newCommandQueue", hook_newCommandQueue, kAlways, kOptional),
      MLX_SAFE_HOOK(kDevice, "newCommandQueueWithMaxCommandBufferCount:", hook_newCommandQueueWithCount, kAlways, kOptional),
      MLX_SAFE_HOOK(kDevice, "newSharedEvent", hook_newSharedEvent, kAlways, kOptional),
  // clang-format on
#undef MLX_SAFE_HOOK
  };
  return *list;
}

// The thread that installs.
void hooks_prepare(Mode mode) {
  // Not linked: the stable ABI has the first only from 3.10 on, and a native
  // host has neither.
  g_python_initialized =
      reinterpret_cast<int (*)()>(::dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
  auto state = reinterpret_cast<void* (*)()>(
      ::dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState"));
  g_python_thread_state = g_python_initialized == nullptr ? nullptr : state;
  ledger().track_failures(mode == Mode::kIntercept);
}

// Any thread; takes the ledger's lock.
HookCounters counters() {
  auto [buffers, events] = ledger().sizes();
  return {g_counters.buffers.load(),
          g_counters.completed.load(),
          g_counters.failed.load(),
          g_counters.swallowed.load(),
          g_counters.thrown.load(),
          g_counters.gate_limit.load(),
          buffers,
          events};
}

// The thread that installs or uninstalls.
void hooks_forget_failures() { ledger().forget_failures(); }

// Python's threads, without the GIL; elsewhere nothing.
void wait_for_skipped() {
  PassThrough pass;
  await_skipped(g_gate_limit.load());
}

// For the calling thread; no lock. The next: any thread.
void this_thread_may_throw(bool may) { t_state.may_throw = may; }

void set_gate_limit(std::chrono::milliseconds limit) {
  g_gate_limit.store(limit);
}

// The one thread of a forked child.
void hooks_after_fork_in_child() noexcept { ledger().reset_after_fork(); }

}  // namespace mlx_safe::metal
