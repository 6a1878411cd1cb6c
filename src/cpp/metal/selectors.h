// The selectors that the hooks send or replace, registered once.
#pragma once

#include "objc/runtime.h"

namespace mlx_safe::metal {

struct Selectors {
  objc::Selector addCompletedHandler, code,
      commandBufferWithUnretainedReferences, commandQueue, commit,
      encodeSignalEvent, error, GPUEndTime, GPUStartTime, label,
      localizedDescription, newCommandQueue, newSharedEvent, objectForKey,
      setSignaledValue, signaledValue, status, stringWithUTF8String, userInfo,
      waitUntilSignaledValue;
};

// Any thread, once the runtime is loaded.
const Selectors& selectors() noexcept;

}  // namespace mlx_safe::metal
