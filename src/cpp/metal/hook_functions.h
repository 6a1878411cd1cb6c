// The functions that replace Metal's methods. hook_list.cpp says which is
// whose; each group's file says on which threads it may run. None of them is
// for the crash path.
#pragma once

#include <cstdint>

#include "objc/runtime.h"

namespace mlx_safe::metal {

using objc::Id;
using objc::Selector;

// What a hook calls for the method that it replaces, and its own type:
// `original`, then what the method takes.
template <class Result, class... Arguments>
using Original = Result (*)(Id, Selector, Arguments...);

// buffer_hooks.cpp
void hook_addCompletedHandler(Original<void, const void*> original, Id self,
                              Selector selector, const void* block);
void hook_commit(Original<void> original, Id self, Selector selector);
void hook_encodeSignal(Original<void, Id, std::uint64_t> original, Id self,
                       Selector selector, Id event, std::uint64_t value);
void hook_encodeWait(Original<void, Id, std::uint64_t> original, Id self,
                     Selector selector, Id event, std::uint64_t value);
void hook_waitUntilCompleted(Original<void> original, Id self,
                             Selector selector);
std::uint64_t hook_status(Original<std::uint64_t> original, Id self,
                          Selector selector);
Id hook_error(Original<Id> original, Id self, Selector selector);
void hook_buffer_dealloc(Original<void> original, Id self, Selector selector);

// event_hooks.cpp
bool hook_waitUntilSignaledValue(
    Original<bool, std::uint64_t, std::uint64_t> original, Id self,
    Selector selector, std::uint64_t value, std::uint64_t timeout_ms);
std::uint64_t hook_signaledValue(Original<std::uint64_t> original, Id self,
                                 Selector selector);
void hook_setSignaledValue(Original<void, std::uint64_t> original, Id self,
                           Selector selector, std::uint64_t value);
void hook_event_dealloc(Original<void> original, Id self, Selector selector);

// object_hooks.cpp
Id hook_commandBuffer(Original<Id> original, Id self, Selector selector);
Id hook_commandBufferWithDescriptor(Original<Id, Id> original, Id self,
                                    Selector selector, Id descriptor);
Id hook_newCommandQueue(Original<Id> original, Id self, Selector selector);
Id hook_newCommandQueueWithCount(Original<Id, std::uint64_t> original, Id self,
                                 Selector selector, std::uint64_t count);
Id hook_newSharedEvent(Original<Id> original, Id self, Selector selector);

}  // namespace mlx_safe::metal
