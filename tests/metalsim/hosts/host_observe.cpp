// Drives the Metal runtime as MLX 0.32.1 and later do. A command buffer's
// handler stores the error, poisons the events that the buffer was to signal
// and signals them itself. The error is thrown once, at the next safe point.
// Where the versions differ is `commits_before_it_waits`.
//
// One difference is deliberate: an event here shares the ownership of its
// error, where MLX points into the encoder (which may be gone by then).

#include <future>
#include <map>
#include <stdexcept>

#include "host_workloads.h"

namespace host {
namespace {

class Error {
 public:
  bool valid() const {
    std::lock_guard guard(lock_);
    return message_ != nullptr;
  }
  void set(std::shared_ptr<std::string> message) {
    std::lock_guard guard(lock_);
    message_ = std::move(message);
  }
  bool store_if_valid(const std::shared_ptr<Error>& other) {
    if (!other || other.get() == this) return false;
    auto message = other->get();
    if (!message) return false;
    set(std::move(message));
    return true;
  }
  void check() {
    std::shared_ptr<std::string> message;
    {
      std::lock_guard guard(lock_);
      message.swap(message_);
    }
    if (message) throw std::runtime_error(*message);
  }

 private:
  std::shared_ptr<std::string> get() const {
    std::lock_guard guard(lock_);
    return message_;
  }
  mutable std::mutex lock_;
  std::shared_ptr<std::string> message_;
};

using ErrorPtr = std::shared_ptr<Error>;

// What an event is on the inside.
struct EventState {
  Ref event = new_shared_event();
  std::mutex lock;
  ErrorPtr error;

  void poison(ErrorPtr with) {
    std::lock_guard guard(lock);
    error = std::move(with);
  }
  ErrorPtr load() {
    std::lock_guard guard(lock);
    return error;
  }
  void check() {
    if (ErrorPtr found = load()) found->check();
  }
};

using StatePtr = std::shared_ptr<EventState>;

const std::thread::id main_thread = std::this_thread::get_id();

// When encoding throws, MLX 0.32.4 commits what it has encoded for every GPU
// stream and then waits for all streams. 0.32.1 to 0.32.3 wait for each in
// turn, the CPU's first, and commit a GPU stream's only when its turn has come.
bool commits_before_it_waits() {
  const std::string& version = options().mlx;
  return version != "0.32.1" && version != "0.32.2" && version != "0.32.3";
}

// A CPU stream: tasks may throw, the stream remembers the first error.
class CpuStream {
 public:
  void push(std::function<void()> task) {
    if (std::this_thread::get_id() == main_thread) error_->check();
    thread_.push([this, task = std::move(task)] {
      try {
        task();
      } catch (const std::exception& e) {
        if (!error_->valid()) {
          error_->set(std::make_shared<std::string>(e.what()));
        }
      }
    });
  }
  void wait(StatePtr state, uint64_t value) {
    push([this, state = std::move(state), value] {
      wait_for_value(state->event.get(), value);
      error_->store_if_valid(state->load());
    });
  }
  void signal(StatePtr state, uint64_t value) {
    push([this, state = std::move(state), value] {
      if (error_->valid()) state->poison(error_);
      set_value(state->event.get(), value);
    });
  }
  void synchronize() {
    auto done = std::make_shared<std::promise<void>>();
    std::future<void> reached = done->get_future();
    push([done = std::move(done)] { done->set_value(); });
    reached.wait();
  }

 private:
  ErrorPtr error_ = std::make_shared<Error>();
  TaskThread thread_;
};

struct Signal {
  StatePtr state;
  uint64_t value;
};

struct Observe {
  static constexpr const char* kName = "host_observe";
  static constexpr const char* kMode = "observe";
  static constexpr bool kObserve = true;

  class Encoder : public EncoderBase {
   public:
    ~Encoder() {
      exiting_ = true;
      synchronize();
    }

    void dispatch(const std::shared_ptr<Kernel>& kernel) {
      if (!encoding()) error_->check();
      dispatch_kernel(kernel);
    }

    void signal_event(const StatePtr& state, uint64_t value) {
      encode_signal(state->event.get(), value);
      signals_.push_back({state, value});
    }

    void wait_event(const StatePtr& state, uint64_t value) {
      encode_wait(state->event.get(), value);
      waits_.push_back(state);
    }

    void commit(std::function<void()> completion = nullptr) {
      add_handler([error = error_, waits = std::move(waits_),
                   signals = std::move(signals_),
                   completion = std::move(completion)](id buffer) {
        if (completion) completion();
        on_completed(error, waits, signals, buffer);
      });
      waits_.clear();
      signals_.clear();
      commit_buffer();
    }

    void synchronize() {
      ScopedPool pool;
      Ref waited = Ref::share(buffer());
      end_encoding();
      commit();
      send(waited.get(), SEL_(waitUntilCompleted));
      if (!exiting_) error_->check();
    }

   private:
    static void on_completed(const ErrorPtr& error,
                             const std::vector<StatePtr>& waits,
                             const std::vector<Signal>& signals, id buffer) {
      for (auto& waited : waits) {
        if (error->store_if_valid(waited->load())) break;
      }
      if (!error->valid() && has_failed(buffer)) {
        error->set(std::make_shared<std::string>(
            "[METAL] Command buffer execution failed: " + message_of(buffer) +
            "."));
      }
      if (error->valid()) {
        for (auto& signal : signals) signal.state->poison(error);
      }
      if (!has_failed(buffer)) return;
      // Metal does not signal for a failed buffer.
      for (auto& signal : signals) {
        set_value(signal.state->event.get(), signal.value);
      }
    }

    bool exiting_ = false;
    ErrorPtr error_ = std::make_shared<Error>();
    std::vector<Signal> signals_;
    std::vector<StatePtr> waits_;
  };

  static Encoder& encoder(Stream stream) {
    static thread_local std::map<int, Encoder> encoders;
    return encoders[stream.index];
  }

  static CpuStream& cpu(Stream stream) {
    static std::mutex lock;
    static auto* streams = new std::map<int, CpuStream>;
    std::lock_guard guard(lock);
    return (*streams)[stream.index];
  }

  class Event {
   public:
    explicit Event(Stream stream) : stream_(stream) {}

    void set_value(uint64_t value) { value_ = value; }
    Stream stream() const { return stream_; }

    void wait() const {
      state_->check();
      wait_for_value(state_->event.get(), value_);
      state_->check();
    }
    void wait(Stream stream) const {
      if (!stream.gpu) return cpu(stream).wait(state_, value_);
      encoder(stream).wait_event(state_, value_);
    }
    void signal(Stream stream) const {
      if (!stream.gpu) return cpu(stream).signal(state_, value_);
      encoder(stream).signal_event(state_, value_);
    }
    bool is_signaled() const {
      id event = state_->event.get();
      return send<uint64_t>(event, SEL_(signaledValue)) >= value_;
    }

   private:
    Stream stream_;
    StatePtr state_ = std::make_shared<EventState>();
    uint64_t value_ = 0;
  };

  class Fence {
   public:
    explicit Fence(Stream stream) : event_(stream) {}
    void wait(Stream stream) const { event_.wait(stream); }
    void update(Stream stream) {
      event_.set_value(++count_);
      event_.signal(stream);
    }

   private:
    Event event_;
    uint64_t count_ = 0;
  };

  static void eval_gpu(Stream stream, const std::shared_ptr<Kernel>& kernel) {
    Encoder& target = encoder(stream);
    if (kernel) target.dispatch(kernel);
    if (!target.needs_commit()) {
      target.add_handler([kernel](id) {});
      return;
    }
    target.end_encoding();
    tasks().begin();
    target.commit([kernel] { tasks().end(); });
  }

  static void eval_cpu(Stream stream, std::shared_ptr<Kernel> kernel) {
    cpu(stream).push([kernel = std::move(kernel)] { kernel->run(); });
  }

  static void finalize(Stream stream) {
    ScopedPool pool;
    Encoder& target = encoder(stream);
    target.end_encoding();
    target.commit();
  }

  static void synchronize(Stream stream) {
    if (stream.gpu) return encoder(stream).synchronize();
    cpu(stream).synchronize();
  }

  // When encoding throws, everything begun is signalled and flushed.
  template <class Events>
  static void abandon(Events& events, std::set<Stream> streams) {
    for (auto& [index, event] : events) {
      stream_by_stream([&] {
        event.signal(event.stream());
        streams.insert(event.stream());
      });
    }
    if (commits_before_it_waits()) {
      for (Stream stream : streams)
        if (stream.gpu) stream_by_stream([&] { finalize(stream); });
    }
    for (Stream stream : streams)
      stream_by_stream([&] { synchronize(stream); });
  }

 private:
  // What one stream throws meanwhile is dropped, as MLX does.
  template <class Body>
  static void stream_by_stream(Body body) {
    try {
      body();
    } catch (const std::exception&) {
    }
  }
};

}  // namespace
}  // namespace host

int main(int argc, char** argv) {
  return host::main_program<host::Observe>(argc, argv);
}
