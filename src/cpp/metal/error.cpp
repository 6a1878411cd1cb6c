#include "metal/error.h"

#include <cstring>

#include "async_io.h"
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
  if (string_class == nullptr) return nullptr;
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
  if (objc::responds(buffer, s.label))
    copy_text(fault->label, sizeof fault->label,
              objc::utf8(objc::send<objc::Id>(buffer, s.label)));
  fault->gpu_start_s = seconds(buffer, s.GPUStartTime);
  fault->gpu_end_s = seconds(buffer, s.GPUEndTime);
}

}  // namespace mlx_safe::metal
