// What both generations of MLX's Metal back end share: streams, kernels,
// counted completion handlers, and the encoder that gathers operations into
// command buffers.
#pragma once

#include <unistd.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <queue>
#include <set>
#include <thread>
#include <vector>

#include "host_common.h"

namespace host {

struct Stream {
  int index;
  bool gpu;
  bool operator==(const Stream& other) const { return index == other.index; }
  // As in MLX: those of the CPU come first.
  bool operator<(const Stream& other) const {
    return gpu != other.gpu ? !gpu : index < other.index;
  }
};

struct Options {
  std::string workload = "basic", hooks, expect, mlx, trace;
  uint64_t fail_nth = 0, seed = 0;
  int code = 8, rounds = 20, debug_layer = 0, family = 0;
  uint32_t after_commands = 0, late_us = 0;
  bool persistent = false, hold_first = false;
  unsigned time_limit = 300;
  int ops_per_buffer = 40;
};

inline Options& options() {
  static Options one;
  return one;
}

inline bool is_before_0_31() { return options().mlx.rfind("0.30", 0) == 0; }

// ---- data ------------------------------------------------------------------

// The memory of one array. It holds garbage until a kernel has written it.
struct Cell {
  static constexpr uint64_t kGarbage = 0xdeadbeefdeadbeef;
  std::atomic<uint64_t> value{kGarbage};
};

inline uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b + 0x9e3779b97f4a7c15 + (a << 6) + (a >> 2)));
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  return x ^ (x >> 27);
}

// Writes a number that depends on every input, so one unwritten input spoils
// all that comes after it.
struct Kernel {
  uint64_t operation;
  useconds_t encode_us = 0;  // as long as it takes to encode it
  std::vector<std::shared_ptr<Cell>> inputs;
  std::shared_ptr<Cell> output;

  void run() {
    uint64_t value = operation;
    for (auto& input : inputs) value = mix(value, input->value.load());
    output->value.store(value);
  }
  static void run_on_gpu(void* kernel) { static_cast<Kernel*>(kernel)->run(); }
};

// ---- completion handlers, counted ------------------------------------------

struct HandlerCounts {
  std::atomic<uint64_t> registered{0}, called{0}, released{0};
  std::atomic<uint64_t> out_of_order{0}, called_twice{0};
};

inline HandlerCounts& handler_counts() {
  static auto* counts = new HandlerCounts;
  return *counts;
}

// One per command buffer: which of its handlers is to come next.
struct Turns {
  int given = 0;  // by the encoding thread
  std::atomic<int> next{0};
};

class CountedHandler {
 public:
  CountedHandler(std::shared_ptr<Turns> turns, std::function<void(id)> function)
      : turns_(std::move(turns)),
        turn_(turns_->given++),
        function_(std::move(function)) {
    ++handler_counts().registered;
  }
  ~CountedHandler() { ++handler_counts().released; }

  void call(id buffer) {
    HandlerCounts& counts = handler_counts();
    ++counts.called;
    if (called_.exchange(true)) ++counts.called_twice;
    if (turns_->next++ != turn_) ++counts.out_of_order;
    function_(buffer);
  }

 private:
  std::shared_ptr<Turns> turns_;
  int turn_;
  std::function<void(id)> function_;
  std::atomic<bool> called_{false};
};

// ---- counting tasks, so that not too much work is in flight ----------------

class Tasks {
 public:
  static constexpr int kMost = 10;

  void begin() { change(1); }
  void end() { change(-1); }
  bool too_many() {
    std::lock_guard guard(lock_);
    return active_ > kMost;
  }
  void wait_for_one() {
    std::unique_lock guard(lock_);
    int before = active_;
    if (before > 1) changed_.wait(guard, [&] { return active_ < before; });
  }

 private:
  void change(int by) {
    {
      std::lock_guard guard(lock_);
      active_ += by;
    }
    changed_.notify_all();
  }
  std::mutex lock_;
  std::condition_variable changed_;
  int active_ = 0;
};

inline Tasks& tasks() {
  static auto* one = new Tasks;
  return *one;
}

// ---- a CPU stream ----------------------------------------------------------

void mark_thread(bool client);  // tells the hooks what kind of thread this is

// Runs tasks in order. Nothing catches here: an exception that leaves a task
// ends the process.
class TaskThread {
 public:
  TaskThread() : thread_([this] { run(); }) {}
  ~TaskThread() {
    push(nullptr);
    thread_.join();
  }
  void push(std::function<void()> task) {
    {
      std::lock_guard guard(lock_);
      tasks_.push(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void run() {
    mark_thread(false);
    for (;;) {
      std::unique_lock guard(lock_);
      changed_.wait(guard, [this] { return !tasks_.empty(); });
      auto task = std::move(tasks_.front());
      tasks_.pop();
      guard.unlock();
      if (!task) return;
      task();
    }
  }
  std::mutex lock_;
  std::condition_variable changed_;
  std::queue<std::function<void()>> tasks_;
  std::thread thread_;
};

// ---- encoding --------------------------------------------------------------

inline id device() {
  static Ref* one = new Ref(default_device());
  return one->get();
}

inline Ref new_shared_event() {
  ScopedPool pool;
  return Ref::take(send<id>(device(), SEL_(newSharedEvent)));
}

inline bool wait_for_value(id event, uint64_t value) {
  return send<bool>(event, selector("waitUntilSignaledValue:timeoutMS:"), value,
                    UINT64_MAX);
}

inline void set_value(id event, uint64_t value) {
  send(event, selector("setSignaledValue:"), value);
}

class EncoderBase {
 public:
  EncoderBase() {
    ScopedPool pool;
    queue_ = Ref::take(send<id>(device(), SEL_(newCommandQueue)));
    next_buffer();
  }
  EncoderBase(const EncoderBase&) = delete;
  EncoderBase& operator=(const EncoderBase&) = delete;

  id buffer() {
    if (!buffer_) next_buffer();
    return buffer_.get();
  }
  bool needs_commit() const { return operations_ > options().ops_per_buffer; }

  void add_handler(std::function<void(id)> function) {
    auto handler =
        std::make_shared<CountedHandler>(turns_, std::move(function));
    Block block([handler](id buffer) { handler->call(buffer); });
    send(buffer(), selector("addCompletedHandler:"), block.get());
  }

  void encode_signal(id event, uint64_t value) {
    end_encoding();
    send(buffer(), selector("encodeSignalEvent:value:"), event, value);
  }

  void encode_wait(id event, uint64_t value) {
    end_encoding();
    send(buffer(), selector("encodeWaitForEvent:value:"), event, value);
  }

  // The encoder's own handler, which drops what it tracked of the outputs.
  void end_encoding() {
    if (!encoder_) return;
    add_handler([this, outputs = std::move(outputs_)](id) {
      std::lock_guard guard(outputs_lock_);
      for (auto& output : outputs) in_flight_outputs_.erase(output.get());
    });
    outputs_.clear();
    send(encoder_.get(), SEL_(endEncoding));
    encoder_ = Ref();
  }

 protected:
  void dispatch_kernel(const std::shared_ptr<Kernel>& kernel) {
    if (!encoder_) {
      SEL make = selector("computeCommandEncoderWithDispatchType:");
      encoder_ = Ref::share(send<id>(buffer(), make, uint64_t{1}));
    }
    {
      std::lock_guard guard(outputs_lock_);
      in_flight_outputs_.insert(kernel->output.get());
    }
    outputs_.push_back(kernel->output);
    send(encoder_.get(),
         selector("dispatchSimulatedKernel:context:microseconds:"),
         &Kernel::run_on_gpu, static_cast<void*>(kernel.get()), uint64_t{2});
    ++operations_;
  }

  void commit_buffer(bool makes_next = true) {
    send(buffer(), SEL_(commit));
    buffer_ = Ref();
    if (makes_next) next_buffer();
  }

  bool encoding() const { return static_cast<bool>(encoder_); }

 private:
  void next_buffer() {
    SEL make = SEL_(commandBufferWithUnretainedReferences);
    buffer_ = Ref::share(send<id>(queue_.get(), make));
    turns_ = std::make_shared<Turns>();
    operations_ = 0;
  }

  Ref queue_, buffer_, encoder_;
  std::shared_ptr<Turns> turns_;
  std::vector<std::shared_ptr<Cell>> outputs_;
  std::mutex outputs_lock_;
  std::set<Cell*> in_flight_outputs_;
  int operations_ = 0;
};

}  // namespace host
