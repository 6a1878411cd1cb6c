#include "metal/error.h"

#include <atomic>
#include <cstring>

#include "crash/async_io.h"
#include "crash/async_system.h"
#include "metal/selectors.h"

namespace mlx_safe::metal {
namespace {

// NSUnderlyingErrorKey is the string "NSUnderlyingError"; Foundation is not
// linked, so the key is made from its value.
objc::Id underlying_error(objc::Id error) noexcept {
  const Selectors& s = selectors();
  if (!objc::responds(error, s.userInfo)) return nullptr;
  objc::Id info = objc::send<objc::Id>(error, s.userInfo);
  if (!objc::responds(info, s.objectForKey)) return nullptr;
  static objc::Class string_class = objc::runtime().objc_getClass("NSString");
  if (!objc::responds(reinterpret_cast<objc::Id>(string_class),
                      s.stringWithUTF8String))
    return nullptr;
  objc::Id key =
      objc::send<objc::Id>(reinterpret_cast<objc::Id>(string_class),
                           s.stringWithUTF8String, "NSUnderlyingError");
  return key == nullptr ? nullptr
                        : objc::send<objc::Id>(info, s.objectForKey, key);
}

const char* description_of(objc::Id error) noexcept {
  const Selectors& s = selectors();
  if (!objc::responds(error, s.localizedDescription)) return nullptr;
  return objc::utf8(objc::send<objc::Id>(error, s.localizedDescription));
}

double seconds(objc::Id buffer, objc::Selector selector) noexcept {
  return objc::responds(buffer, selector) ? objc::send<double>(buffer, selector)
                                          : 0.0;
}

const char* label_of(objc::Id buffer) noexcept {
  objc::Selector label = selectors().label;
  if (!objc::responds(buffer, label)) return nullptr;
  return objc::utf8(objc::send<objc::Id>(buffer, label));
}

// The lookup of a method takes the runtime's lock, so it is done once for the
// class that all command buffers have.
bool tells_all(objc::Id buffer) noexcept {
  static std::atomic<objc::Class> known{nullptr};
  objc::Class own = objc::runtime().object_getClass(buffer);
  if (known.load(std::memory_order_relaxed) == own) return true;
  const Selectors& s = selectors();
  bool all = objc::responds(buffer, s.label) &&
             objc::responds(buffer, s.GPUStartTime) &&
             objc::responds(buffer, s.GPUEndTime);
  if (all) known.store(own, std::memory_order_relaxed);
  return all;
}

}  // namespace

std::int32_t code_of(objc::Id error) noexcept {
  if (error == nullptr) return -1;
  objc::Id underlying = underlying_error(error);
  if (objc::responds(underlying, selectors().code)) {
    long code = objc::send<long>(underlying, selectors().code);
    if (code > 0 && code <= INT32_MAX) return static_cast<std::int32_t>(code);
  }
  return code_in_message(description_of(error));
}

void describe(objc::Id buffer, objc::Id error, FaultRecord* fault) noexcept {
  const Selectors& s = selectors();
  fault->source = static_cast<std::int32_t>(FaultSource::kMetal);
  fault->code = code_of(error);
  const char* text = description_of(error);
  constexpr std::size_t kPrefix = sizeof kMessagePrefix - 1;
  std::memcpy(fault->message, kMessagePrefix, kPrefix);
  copy_text(fault->message + kPrefix, sizeof fault->message - kPrefix,
            text == nullptr ? "unknown error" : text);
  copy_text(fault->label, sizeof fault->label, label_of(buffer));
  fault->gpu_start_s = seconds(buffer, s.GPUStartTime);
  fault->gpu_end_s = seconds(buffer, s.GPUEndTime);
}

CommandBufferRecord describe_done(objc::Id buffer,
                                  std::uint64_t number) noexcept {
  const Selectors& s = selectors();
  CommandBufferRecord done{};
  done.number = number;
  done.queue = reinterpret_cast<std::uint64_t>(
      objc::send<objc::Id>(buffer, s.commandQueue));
  done.time_ns = now_ns();
  if (!tells_all(buffer)) return done;
  done.gpu_start_s = objc::send<double>(buffer, s.GPUStartTime);
  done.gpu_end_s = objc::send<double>(buffer, s.GPUEndTime);
  copy_text(done.label, sizeof done.label,
            objc::utf8(objc::send<objc::Id>(buffer, s.label)));
  return done;
}

}  // namespace mlx_safe::metal
