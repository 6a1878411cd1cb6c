// A hook in little, made of parts of the real ones. It replaces `commit` of a
// command buffer, adds a Block to each, and throws once when it is asked to.
#include <atomic>
#include <stdexcept>

#include "objc/block.h"
#include "objc/runtime.h"

using namespace mlx_safe::objc;

extern "C" void call_through(void (*function)(), volatile int* calls);

namespace {

std::atomic<int> g_seen{0};
std::atomic<bool> g_throws{false};
volatile int g_calls = 0;
void (*g_original)(Id, Selector) = nullptr;
Selector g_add_handler = nullptr;

// Counts the buffers whose handler has run with what it was made with.
struct Counts {
  Id buffer, again;

  void retain() { runtime().objc_retain(again); }
  void release() const { runtime().objc_release(again); }
  void invoke(Id argument) const {
    if (argument == buffer && again == buffer) ++g_seen;
  }
};

void fail() { throw std::runtime_error("thrown by the hook"); }

void hook_commit(Id self, Selector selector) {
  if (g_throws.exchange(false)) call_through(&fail, &g_calls);
  StackBlock<Counts> block({self, self});
  send<void>(self, g_add_handler, static_cast<const void*>(&block));
  g_original(self, selector);
}

Id made(Id from, const char* selector) {
  return send<Id>(from, runtime().sel_registerName(selector));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int start() {
  std::string why_not;
  if (!load_runtime(&why_not)) return 1;
  const Runtime& r = runtime();
  g_add_handler = r.sel_registerName("addCompletedHandler:");
  AutoreleasePool pool;
  Id queue = made(r.MTLCreateSystemDefaultDevice(), "newCommandQueue");
  Id buffer = made(queue, "commandBuffer");
  Method method = r.class_getInstanceMethod(r.object_getClass(buffer),
                                            r.sel_registerName("commit"));
  g_original = reinterpret_cast<void (*)(Id, Selector)>(
      r.method_getImplementation(method));
  r.method_setImplementation(method, reinterpret_cast<Imp>(&hook_commit));
  return 0;
}

EXPORT void throw_once() { g_throws = true; }
EXPORT int seen() { return g_seen; }
