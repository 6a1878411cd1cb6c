// The objects of the simulated Metal framework, and what they ask of the
// simulation behind them.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../metalsim.h"
#include "foundation.h"
#include "objc.h"

namespace metalsim {

enum Status : uint64_t {
  kNotEnqueued = 0,
  kEnqueued = 1,
  kCommitted = 2,
  kScheduled = 3,
  kCompleted = 4,
  kError = 5,
};

constexpr int kTimeout = 0x2;
constexpr int kSubmissionsIgnored = 0x4;
constexpr int kOutOfMemory = 0x8;

struct Labelled : Object {
  id label = nullptr;
  ~Labelled() { objc_release(label); }
};

struct Device : Object {
  int family = 0;
};

struct SharedEvent : Labelled {
  std::mutex lock;
  std::condition_variable changed;
  std::atomic<uint64_t> value{0};
};

struct Buffer : Labelled {
  uint64_t length = 0;
  std::once_flag contents_made;
  std::unique_ptr<unsigned char[]> contents;
  ~Buffer();
};

using Kernel = void (*)(void* context);

struct Command {
  enum Kind : uint32_t { kDispatch, kSignal, kWait };
  Kind kind;
  uint32_t microseconds;
  SharedEvent* event;
  uint64_t value;
  Kernel kernel;
  void* context;
};

// What will happen to a buffer, settled when it is committed.
struct Fate {
  int code = 0;
  uint32_t after_commands = 0;
  uint64_t gpu_delay_us = 0;
  uint64_t handler_delay_us = 0;
  ErrorShape error;
};

struct CommandQueue;

struct CommandBuffer : Labelled {
  CommandQueue* queue = nullptr;
  bool retains = true;
  uint64_t error_options = 0;
  bool encoding = false;
  std::vector<void*> completed_handlers;
  std::vector<void*> scheduled_handlers;
  std::vector<Command> commands;
  std::vector<Object*> resources;
  uint64_t referenced_bytes = 0;

  std::atomic<uint64_t> status{kNotEnqueued};
  Fate fate;
  id error = nullptr;
  std::atomic<double> gpu_start{0}, gpu_end{0};
  metalsim_record record{};

  std::mutex lock;  // for the two waits below
  std::condition_variable changed;
  bool handlers_done = false;

  ~CommandBuffer();
  void use(Object* resource, uint64_t bytes);
};

// The GPU's side of a queue: buffers run one after the other on one thread.
struct CommandQueue : Labelled {
  Device* device = nullptr;
  int family = 0;
  std::mutex lock;
  std::condition_variable changed;
  std::deque<CommandBuffer*> waiting;
  bool stop = false;
  bool started = false;
  std::thread gpu;
  std::atomic<uint64_t> turns{0};          // given out at commit
  std::atomic<uint64_t> last_finished{0};  // by the completion thread
  ~CommandQueue();
};

struct ComputeEncoder : Labelled {
  CommandBuffer* buffer = nullptr;
  bool ended = false;
  ~ComputeEncoder();
};

struct BufferDescriptor : Object {
  uint64_t error_options = 0;
  bool retains = true;
};

// A layer around another object.
struct Wrapper : Object {
  id base = nullptr;
  ~Wrapper() { objc_release(base); }
};

// ---- classes, each made (not registered) at its first mention --------------

constexpr int kFamilies = 2;

Class labelled_class();
Class device_class(int family);
Class queue_class(int family);
Class command_buffer_class(int family);
Class event_class(int family);
Class buffer_class(int family);
Class encoder_class(int family);
Class fence_class();
Class descriptor_class();
void register_family(int family);

// ---- making objects, with one reference for the caller ---------------------

SharedEvent* make_event(int family);
CommandBuffer* make_command_buffer(CommandQueue* queue, bool retains,
                                   uint64_t error_options);
id wrap_command_buffer(id buffer);
id wrap_event(id event);
// An event, or the event in a wrapper.
SharedEvent* bare_event(id event);

// ---- the machine -----------------------------------------------------------

void signal_event(SharedEvent* event, uint64_t value);

// Commits: settles the buffer's fate and hands it to its queue, or runs it
// at once in inline mode.
void submit(CommandBuffer* buffer);
void reserve_turn(CommandBuffer* buffer);

// Runs one buffer as the GPU would, up to its final status.
void execute(CommandBuffer* buffer);

// Handlers run later, on the completion thread, or at once.
void complete_later(CommandBuffer* buffer);
void complete_now(CommandBuffer* buffer);
void one_more_in_flight();

// ---- settings, plan, log ---------------------------------------------------

struct Settings {
  std::atomic<bool> no_device{false}, fast{false}, run_inline{false};
  std::atomic<bool> rootless{false};
  std::atomic<bool> banned{false};         // after a code 4
  std::atomic<bool> abandon_waits{false};  // while resetting
  std::atomic<int> family{0}, debug_layers{0};
  std::atomic<uint32_t> handler_delay_us{0}, gpu_delay_us{0},
      pipeline_delay_us{0};
  std::atomic<uint64_t> random_seed{0};
  std::atomic<uint32_t> random_gpu_us{0}, random_handler_us{0};
  std::atomic<uint64_t> gpu_wait_limit_us{0};
  std::atomic<int> memory_mode{METALSIM_MEMORY_OFF};
  std::atomic<uint64_t> working_set{0}, ceiling{0};
};

constexpr uint64_t kDefaultWorkingSet = uint64_t{12} << 30;

Settings& settings();
std::atomic<uint64_t>& resident_bytes();

// Takes the buffer's number in every plan and says what becomes of it.
Fate decide_fate(const CommandQueue* queue, uint64_t serial);

struct Totals {
  std::atomic<uint64_t> buffers_created{0}, buffers_committed{0},
      buffers_completed{0}, buffers_failed{0}, handlers_added{0},
      handlers_called{0}, handlers_released{0}, handlers_dropped{0},
      order_violations{0}, signals_encoded{0}, signals_done{0},
      signals_withheld{0}, waits_encoded{0}, waits_done{0}, waits_skipped{0},
      kernels_run{0}, kernels_skipped{0};
};

Totals& totals();

inline void count(std::atomic<uint64_t>& counter, uint64_t by = 1) {
  counter.fetch_add(by, std::memory_order_relaxed);
}

void log_finished(const metalsim_record& record);
void reset_log();

}  // namespace metalsim
