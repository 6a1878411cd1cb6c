// What the GPU does with one buffer: runs its commands in order, up to the
// point where it is to fail, and leaves status, error and times behind.

#include <chrono>

#include "metal.h"

namespace metalsim {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_now() {
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Sleeping costs some 50 us however short it is, so simulated time is saved
// up until something else can notice it.
class GpuTime {
 public:
  void spend(uint64_t us) { owed_ += us; }
  void pay() {
    if (owed_ == 0) return;
    if (!settings().fast) {
      std::this_thread::sleep_for(std::chrono::microseconds(owed_));
    }
    owed_ = 0;
  }

 private:
  uint64_t owed_ = 0;
};

void tell_waiters(CommandBuffer* buffer) {
  // Empty, but no waiter can be between its look and its sleep afterwards.
  {
    std::lock_guard guard(buffer->lock);
  }
  buffer->changed.notify_all();
}

void call_handler(const void* block, CommandBuffer* buffer) noexcept {
  call_block(block, buffer);
}

void become_scheduled(CommandBuffer* buffer) {
  buffer->status.store(kScheduled);
  tell_waiters(buffer);
  if (buffer->scheduled_handlers.empty()) return;
  AutoreleasePool pool;
  for (void* block : buffer->scheduled_handlers) {
    call_handler(block, buffer);
    _Block_release(block);
  }
  buffer->scheduled_handlers.clear();
}

// False: the wait was given up.
bool wait_for_event(const Command& command) {
  SharedEvent* event = command.event;
  uint64_t limit = settings().gpu_wait_limit_us.load();
  auto deadline = Clock::now() + std::chrono::microseconds(limit);
  std::unique_lock guard(event->lock);
  while (event->value.load() < command.value) {
    if (settings().abandon_waits) return false;
    if (limit != 0 && Clock::now() >= deadline) return false;
    // In slices, since nobody wakes this wait when the simulation is reset.
    auto slice = Clock::now() + std::chrono::milliseconds(20);
    if (limit != 0 && deadline < slice) slice = deadline;
    event->changed.wait_until(guard, slice);
  }
  return true;
}

bool over_memory(const CommandBuffer* buffer) {
  int mode = settings().memory_mode.load();
  if (mode == METALSIM_MEMORY_OFF) return false;
  uint64_t ceiling = settings().ceiling.load();
  if (ceiling == 0) ceiling = settings().working_set.load();
  if (ceiling == 0) ceiling = kDefaultWorkingSet;
  return (mode == METALSIM_MEMORY_PROCESS ? resident_bytes().load()
                                          : buffer->referenced_bytes) > ceiling;
}

// Failures that the plan did not ask for. They strike before any command.
void see_to_circumstances(CommandBuffer* buffer) {
  Fate& fate = buffer->fate;
  if (settings().banned) {
    fate.code = kSubmissionsIgnored;
    fate.after_commands = 0;
  } else if (fate.code == 0 && over_memory(buffer)) {
    fate.code = kOutOfMemory;
    fate.after_commands = 0;
  }
}

// False: the command never took effect and the buffer fails here.
bool run_command(CommandBuffer* buffer, const Command& command, GpuTime& time) {
  switch (command.kind) {
    case Command::kDispatch:
      time.spend(command.microseconds);
      if (command.kernel != nullptr) command.kernel(command.context);
      count(totals().kernels_run);
      return true;
    case Command::kSignal:
      time.pay();
      signal_event(command.event, command.value);
      ++buffer->record.signals_done;
      count(totals().signals_done);
      return true;
    case Command::kWait:
      time.pay();
      if (!wait_for_event(command)) {
        buffer->fate.code = kTimeout;
        return false;
      }
      ++buffer->record.waits_done;
      count(totals().waits_done);
      return true;
  }
  return true;
}

void skip_command(CommandBuffer* buffer, const Command& command) {
  switch (command.kind) {
    case Command::kDispatch:
      count(totals().kernels_skipped);
      break;
    case Command::kSignal:
      ++buffer->record.signals_withheld;
      count(totals().signals_withheld);
      break;
    case Command::kWait:
      ++buffer->record.waits_skipped;
      count(totals().waits_skipped);
      break;
  }
}

void run_commands(CommandBuffer* buffer, GpuTime& time) {
  const std::vector<Command>& commands = buffer->commands;
  size_t at = 0;
  for (; at < commands.size(); ++at) {
    if (buffer->fate.code != 0 && at >= buffer->fate.after_commands) break;
    if (!run_command(buffer, commands[at], time)) break;
  }
  for (; at < commands.size(); ++at) skip_command(buffer, commands[at]);
}

void finish(CommandBuffer* buffer) {
  int code = buffer->fate.code;
  if (code == kSubmissionsIgnored) settings().banned = true;
  buffer->gpu_end = seconds_now();
  buffer->record.code = code;
  buffer->record.status = code ? kError : kCompleted;
  if (code != 0) {
    buffer->error = make_command_buffer_error(code, buffer->fate.error);
  }
  count(code ? totals().buffers_failed : totals().buffers_completed);
  buffer->status.store(code ? kError : kCompleted, std::memory_order_release);
}

}  // namespace

void execute(CommandBuffer* buffer) {
  GpuTime time;
  become_scheduled(buffer);
  buffer->gpu_start = seconds_now();
  see_to_circumstances(buffer);
  time.spend(buffer->fate.gpu_delay_us);
  time.pay();
  run_commands(buffer, time);
  time.pay();
  finish(buffer);
}

}  // namespace metalsim
