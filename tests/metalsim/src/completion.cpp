// The completion thread: one for the process, which runs the handlers of
// finished buffers in the order in which they finished; by queue, if asked for.

#include <algorithm>
#include <chrono>

#include "metal.h"
#include "trace.h"

namespace metalsim {
namespace {

using Clock = std::chrono::steady_clock;

struct Finished {
  CommandBuffer* buffer;
  Clock::time_point due;
};

struct Completion {
  std::mutex lock;
  std::condition_variable changed;
  std::condition_variable idle;
  std::deque<Finished> finished;
  bool held = false;
  bool by_queue = false;
  bool started = false;
  uint64_t in_flight = 0;
};

// Never destroyed: the thread outlives main.
Completion& completion() {
  static auto* instance = new Completion;
  return *instance;
}

// As on a Mac there is nobody above a handler who could catch.
void call_handler(const void* block, CommandBuffer* buffer) noexcept {
  call_block(block, buffer);
}

void run_handlers(CommandBuffer* buffer) {
  AutoreleasePool pool;
  metalsim_record& record = buffer->record;
  for (void*& block : buffer->completed_handlers) {
    call_handler(block, buffer);
    ++record.handlers_called;
    count(totals().handlers_called);
    void* spent = block;
    block = nullptr;
    _Block_release(spent);
    ++record.handlers_released;
    count(totals().handlers_released);
  }
  buffer->completed_handlers.clear();
}

void check_order(CommandBuffer* buffer) {
  auto& last = buffer->queue->last_finished;
  uint64_t turn = buffer->record.queue_turn;
  if (turn != last.load() + 1) {
    ++buffer->record.order_violations;
    count(totals().order_violations);
  }
  last.store(turn);
}

void let_go(CommandBuffer* buffer) {
  {
    std::lock_guard guard(buffer->lock);
    buffer->handlers_done = true;
  }
  buffer->changed.notify_all();
  objc_release(buffer);
  Completion& state = completion();
  std::lock_guard guard(state.lock);
  if (--state.in_flight == 0) state.idle.notify_all();
}

bool has_earlier_of_queue(const std::deque<Finished>& finished,
                          std::deque<Finished>::const_iterator it) {
  return std::any_of(finished.begin(), it, [&](const Finished& earlier) {
    return earlier.buffer->queue == it->buffer->queue;
  });
}

// The one whose handlers are due first. With the lock held.
std::deque<Finished>::iterator next_due(Completion& state) {
  auto next = state.finished.begin();
  if (!state.by_queue) return next;
  for (auto it = next; it != state.finished.end(); ++it)
    if (it->due < next->due && !has_earlier_of_queue(state.finished, it))
      next = it;
  return next;
}

void run() {
  this_thread_runs_handlers();
  Completion& state = completion();
  std::unique_lock guard(state.lock);
  for (;;) {
    state.changed.wait(guard,
                       [&] { return !state.held && !state.finished.empty(); });
    auto found = next_due(state);
    Finished next = *found;
    if (!settings().fast && Clock::now() < next.due) {
      state.changed.wait_until(guard, next.due);
      continue;
    }
    state.finished.erase(found);
    guard.unlock();
    complete_now(next.buffer);
    guard.lock();
  }
}

}  // namespace

void one_more_in_flight() {
  Completion& state = completion();
  std::lock_guard guard(state.lock);
  ++state.in_flight;
}

void complete_later(CommandBuffer* buffer) {
  Completion& state = completion();
  std::chrono::microseconds delay(buffer->fate.handler_delay_us);
  {
    std::lock_guard guard(state.lock);
    if (!state.started) {
      state.started = true;
      std::thread(run).detach();
    }
    state.finished.push_back({buffer, Clock::now() + delay});
  }
  state.changed.notify_one();
}

void complete_now(CommandBuffer* buffer) {
  check_order(buffer);
  run_handlers(buffer);
  log_finished(buffer->record);
  let_go(buffer);
}

}  // namespace metalsim

using namespace metalsim;

void metalsim_hold_handlers(int hold) {
  Completion& state = completion();
  {
    std::lock_guard guard(state.lock);
    state.held = hold != 0;
  }
  state.changed.notify_all();
}

void metalsim_set_completion_by_queue(int by_queue) {
  Completion& state = completion();
  std::lock_guard guard(state.lock);
  state.by_queue = by_queue != 0;
}

int metalsim_wait_idle(uint64_t timeout_ms) {
  Completion& state = completion();
  std::unique_lock guard(state.lock);
  return state.idle.wait_for(guard, std::chrono::milliseconds(timeout_ms),
                             [&] { return state.in_flight == 0; });
}
