// Blocks made by hand after the published Block ABI, so that a compiler without
// -fblocks builds them: https://clang.llvm.org/docs/Block-ABI-Apple.html
//
// A Block may be made, copied and called on any thread, Metal's included, once
// the runtime is loaded. Nothing here is for the crash path.
#pragma once

#include "objc/runtime.h"

namespace mlx_safe::objc {

// The head that every Block has.
struct BlockHead {
  void* isa;
  std::int32_t flags;
  std::int32_t reserved;
  void (*invoke)(void*, Id);
  const void* descriptor;
};

struct BlockDescriptor {
  unsigned long reserved;
  unsigned long size;
  void (*copy)(void* to, const void* from);
  void (*dispose)(const void* block);
};

inline constexpr std::int32_t kBlockHasCopyDispose = 1 << 25;

// Calls a completion handler `block` with `argument`. Metal's completion
// thread; whatever the handler throws comes through.
inline void call_block(const void* block, Id argument) {
  auto* head = static_cast<const BlockHead*>(block);
  head->invoke(const_cast<void*>(block), argument);
}

// A Block `void (^)(id)` on the stack that holds one `Capture`: a trivially
// copyable struct with
//   void invoke(Id argument) const   what the Block does; Metal's threads
//   void retain() const              called when the runtime copies the Block
//   void release() const             called when a copy is disposed of
// The last two: any thread.
// Pass `&block` where a Block is taken; the callee copies it.
template <class Capture>
struct StackBlock {
  BlockHead head;
  Capture capture;

  explicit StackBlock(const Capture& held)
      : head{runtime().stack_block_class, kBlockHasCopyDispose, 0, &call,
             &kDescriptor},
        capture(held) {}

 private:
  static void call(void* self, Id argument) {
    static_cast<StackBlock*>(self)->capture.invoke(argument);
  }
  // The runtime has copied the bytes already.
  static void copy(void* to, const void*) {
    static_cast<StackBlock*>(to)->capture.retain();
  }
  static void dispose(const void* block) {
    static_cast<const StackBlock*>(block)->capture.release();
  }
  static constexpr BlockDescriptor kDescriptor{
      0, sizeof(BlockHead) + sizeof(Capture), &copy, &dispose};
};

}  // namespace mlx_safe::objc
