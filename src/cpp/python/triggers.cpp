#include "python/triggers.h"

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "crash/async_io.h"
#include "crash/fault_log.h"
#include "metal/error.h"
#include "metal/hook_table.h"
#include "metal/selectors.h"
#include "objc/block.h"

namespace mlx_safe {
namespace {

// What MLX 0.32 keeps of a failed buffer, to raise it from the evaluation.
struct Stored {
  std::mutex mutex;
  std::string error;

  void put(std::string text) {
    std::lock_guard lock(mutex);
    error = std::move(text);
  }
  std::string get() {
    std::lock_guard lock(mutex);
    return error;
  }
};

// MLX's check_error: 0.31.2 throws, 0.32 stores. Holds the event, as MLX's
// handlers do: a command buffer with unretained references does not.
struct CheckError {
  objc::Id event;
  const std::shared_ptr<Stored>* stored;  // null: throw

  void retain() {
    objc::runtime().objc_retain(event);
    if (stored != nullptr) stored = new std::shared_ptr<Stored>(*stored);
  }
  void release() const {
    objc::runtime().objc_release(event);
    delete stored;
  }
  void invoke(objc::Id buffer) const {
    const auto& s = metal::selectors();
    if (objc::send<std::uint64_t>(buffer, s.status) != 5) return;
    auto error = objc::send<objc::Id>(buffer, s.error);
    auto text = objc::utf8(objc::send<objc::Id>(error, s.localizedDescription));
    std::string message = metal::kMessagePrefix;
    if (text != nullptr) message += text;
    if (stored == nullptr) throw std::runtime_error(message);
    (*stored)->put(std::move(message));
  }
};

void set_label(objc::Id buffer, const char* text) {
  const auto& r = objc::runtime();
  auto selector = r.sel_registerName("setLabel:");
  auto strings = reinterpret_cast<objc::Id>(r.objc_getClass("NSString"));
  if (strings == nullptr || !objc::responds(buffer, selector)) return;
  auto label = objc::send<objc::Id>(
      strings, metal::selectors().stringWithUTF8String, text);
  objc::send<void>(buffer, selector, label);
}

}  // namespace

void testing_run_command_buffer() {
  std::string why_not;
  if (!objc::load_runtime(&why_not)) throw std::runtime_error(why_not);
  objc::AutoreleasePool pool;
  const auto& s = metal::selectors();
  static objc::Id device = objc::runtime().MTLCreateSystemDefaultDevice();
  if (device == nullptr) throw std::runtime_error("there is no Metal device");
  static objc::Id queue = objc::send<objc::Id>(device, s.newCommandQueue);
  objc::Owned event(objc::send<objc::Id>(device, s.newSharedEvent));
  auto buffer =
      objc::send<objc::Id>(queue, s.commandBufferWithUnretainedReferences);
  set_label(buffer, "mlx_safe.testing");
  auto stored = std::make_shared<Stored>();
  bool stores =
      metal::hooks_active() && metal::hook_mode() == metal::Mode::kObserve;
  objc::StackBlock<CheckError> check({event.get(), stores ? &stored : nullptr});
  objc::send<void>(buffer, s.encodeSignalEvent, event.get(), std::uint64_t{1});
  objc::send<void>(buffer, s.addCompletedHandler,
                   static_cast<const void*>(&check));
  objc::send<void>(buffer, s.commit);
  if (!objc::send<bool>(event.get(), s.waitUntilSignaledValue, std::uint64_t{1},
                        std::uint64_t{20000}))
    throw std::runtime_error("the command buffer did not complete in 20 s");
  if (std::string error = stored->get(); !error.empty())
    throw std::runtime_error(error);
}

std::uint64_t testing_record_fault(std::int32_t code,
                                   const std::string& message) {
  std::uint64_t number = 0;
  std::thread([&] {
    FaultRecord fault{};
    fault.code = code;
    fault.source = static_cast<std::int32_t>(FaultSource::kInjected);
    copy_text(fault.label, sizeof fault.label, "mlx_safe.testing");
    copy_text(fault.message, sizeof fault.message, message.c_str());
    number = fault_log().record(fault);
  }).join();
  return number;
}

void testing_throw_on_foreign_thread(const std::string& message) {
  std::thread([message] { throw std::runtime_error(message); }).detach();
}

}  // namespace mlx_safe
