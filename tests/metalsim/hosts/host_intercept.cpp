// Drives the Metal runtime as MLX up to 0.31.2 does: every operation has a
// completion handler that throws if its command buffer failed.

#include <map>
#include <stdexcept>

#include "host_workloads.h"

namespace host {
namespace {

struct Intercept {
  static constexpr const char* kName = "host_intercept";
  static constexpr const char* kMode = "intercept";
  static constexpr bool kObserve = false;

  class Encoder : public EncoderBase {
   public:
    // Other thread-local objects of this thread are gone by now.
    ~Encoder() {
      exiting_ = true;
      synchronize();
    }

    void dispatch(const std::shared_ptr<Kernel>& kernel) {
      dispatch_kernel(kernel);
    }
    void commit() { commit_buffer(); }

    void synchronize() {
      ScopedPool pool;
      Ref waited = Ref::share(buffer());
      end_encoding();
      commit_buffer(!is_before_0_31());
      send(waited.get(), SEL_(waitUntilCompleted));
      if (exiting_ || !has_failed(waited.get())) return;
      throw std::runtime_error("[METAL] Command buffer execution failed: " +
                               message_of(waited.get()) + ".");
    }

   private:
    bool exiting_ = false;
  };

  static Encoder& encoder(Stream stream) {
    static thread_local std::map<int, Encoder> encoders;
    return encoders[stream.index];
  }

  static TaskThread& cpu(Stream stream) {
    static std::mutex lock;
    static auto* threads = new std::map<int, TaskThread>;
    std::lock_guard guard(lock);
    return (*threads)[stream.index];
  }

  static void check_error(id buffer) {
    if (!has_failed(buffer)) return;
    throw std::runtime_error("[METAL] Command buffer execution failed: " +
                             message_of(buffer));
  }

  // A shared event; whatever uses it later keeps it alive by a handler.
  class Event {
   public:
    explicit Event(Stream stream)
        : stream_(stream), event_(std::make_shared<Ref>(new_shared_event())) {}

    void set_value(uint64_t value) { value_ = value; }
    Stream stream() const { return stream_; }

    void wait() const {
      if (!wait_for_value(event_->get(), value_)) {
        throw std::runtime_error("[Event::wait] Timed out");
      }
    }
    void wait(Stream stream) const {
      if (!stream.gpu) return cpu(stream).push([*this] { wait(); });
      Encoder& target = encoder(stream);
      target.encode_wait(event_->get(), value_);
      target.add_handler([*this](id) {});
    }
    void signal(Stream stream) const {
      if (!stream.gpu) {
        return cpu(stream).push(
            [*this] { host::set_value(event_->get(), value_); });
      }
      Encoder& target = encoder(stream);
      target.encode_signal(event_->get(), value_);
      target.add_handler([*this](id) {});
    }
    bool is_signaled() const {
      return send<uint64_t>(event_->get(), SEL_(signaledValue)) >= value_;
    }

   private:
    Stream stream_;
    std::shared_ptr<Ref> event_;
    uint64_t value_ = 0;
  };

  // Orders two streams within one evaluation.
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
      target.add_handler([kernel](id buffer) { check_error(buffer); });
      return;
    }
    target.end_encoding();
    tasks().begin();
    target.add_handler([kernel](id buffer) {
      tasks().end();
      check_error(buffer);
    });
    target.commit();
  }

  static void eval_cpu(Stream stream, std::shared_ptr<Kernel> kernel) {
    cpu(stream).push([kernel = std::move(kernel)] { kernel->run(); });
  }

  static void finalize(Stream stream) {
    ScopedPool pool;
    Encoder& target = encoder(stream);
    target.end_encoding();
    target.add_handler([](id buffer) { check_error(buffer); });
    target.commit();
  }

  static void synchronize(Stream stream) { encoder(stream).synchronize(); }

  // This generation leaves everything as it is when encoding throws.
  template <class Events>
  static void abandon(Events&, const std::set<Stream>&) {}
};

}  // namespace
}  // namespace host

int main(int argc, char** argv) {
  return host::main_program<host::Intercept>(argc, argv);
}
