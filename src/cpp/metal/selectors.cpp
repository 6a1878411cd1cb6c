#include "metal/selectors.h"

namespace mlx_safe::metal {

const Selectors& selectors() noexcept {
  static const Selectors found = [] {
    auto s = objc::runtime().sel_registerName;
    return Selectors{
        .addCompletedHandler = s("addCompletedHandler:"),
        .code = s("code"),
        .commandBufferWithUnretainedReferences =
            s("commandBufferWithUnretainedReferences"),
        .commandQueue = s("commandQueue"),
        .commit = s("commit"),
        .encodeSignalEvent = s("encodeSignalEvent:value:"),
        .error = s("error"),
        .GPUEndTime = s("GPUEndTime"),
        .GPUStartTime = s("GPUStartTime"),
        .label = s("label"),
        .localizedDescription = s("localizedDescription"),
        .newCommandQueue = s("newCommandQueue"),
        .newSharedEvent = s("newSharedEvent"),
        .objectForKey = s("objectForKey:"),
        .setSignaledValue = s("setSignaledValue:"),
        .signaledValue = s("signaledValue"),
        .status = s("status"),
        .stringWithUTF8String = s("stringWithUTF8String:"),
        .userInfo = s("userInfo"),
        .waitUntilSignaledValue = s("waitUntilSignaledValue:timeoutMS:"),
    };
  }();
  return found;
}

}  // namespace mlx_safe::metal
