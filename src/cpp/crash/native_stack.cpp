#include "crash/native_stack.h"

#include <dlfcn.h>
#include <unwind.h>

#if defined(__APPLE__)
#include <sys/ucontext.h>
#else
#include <ucontext.h>
#endif

#include "crash/recrash.h"

namespace mlx_safe {
namespace {

struct Walk {
  std::uintptr_t* frames;
  std::size_t capacity;
  std::size_t used;
  std::uintptr_t start;  // where the signal struck; 0: take all
  bool started;
};

// Without the signature that the system's libraries put into their return
// addresses on a Mac with arm64: bits that no address of a process there has.
std::uintptr_t unsigned_address(std::uintptr_t address) noexcept {
#if defined(__APPLE__) && defined(__aarch64__)
  return address & ((std::uintptr_t{1} << 47) - 1);
#else
  return address;
#endif
}

_Unwind_Reason_Code visit(_Unwind_Context* context, void* argument) {
  auto* walk = static_cast<Walk*>(argument);
  std::uintptr_t address = unsigned_address(_Unwind_GetIP(context));
  if (address == 0) return _URC_END_OF_STACK;
  if (address == walk->start && !walk->started) {
    walk->started = true;  // what was before it is the handler's
    walk->used = 0;
  }
  if (walk->used == walk->capacity) return _URC_END_OF_STACK;
  walk->frames[walk->used++] = address;
  return _URC_NO_REASON;
}

std::uintptr_t program_counter(const void* signal_context) noexcept {
  if (signal_context == nullptr) return 0;
  auto* context = static_cast<const ucontext_t*>(signal_context);
#if defined(__APPLE__) && defined(__aarch64__)
  return static_cast<std::uintptr_t>(context->uc_mcontext->__ss.__pc);
#elif defined(__APPLE__) && defined(__x86_64__)
  return static_cast<std::uintptr_t>(context->uc_mcontext->__ss.__rip);
#elif defined(__linux__) && defined(__aarch64__)
  return static_cast<std::uintptr_t>(context->uc_mcontext.pc);
#elif defined(__linux__) && defined(__x86_64__)
  return static_cast<std::uintptr_t>(context->uc_mcontext.gregs[REG_RIP]);
#else
  (void)context;
  return 0;
#endif
}

}  // namespace

std::size_t capture_native_stack(std::uintptr_t* frames, std::size_t capacity,
                                 const void* signal_context) noexcept {
  Walk walk{frames, capacity, 0, program_counter(signal_context), false};
  // Where nothing can run (a call through a null pointer) GCC's unwinder reads
  // the instruction all the same, and crashes: then the one frame is known.
  auto body = [](void* into) { _Unwind_Backtrace(&visit, into); };
  if (!run_part(body, &walk)) walk.used = 0;
  if (walk.start != 0 && !walk.started && capacity > 0) {
    // The walk did not get past the signal's own frame.
    if (walk.used < capacity) ++walk.used;
    for (std::size_t i = walk.used - 1; i > 0; --i) frames[i] = frames[i - 1];
    frames[0] = walk.start;
  }
  return walk.used;
}

void prime_native_stack() noexcept {
  std::uintptr_t frames[4];
  std::size_t n = capture_native_stack(frames, 4, nullptr);
  if (n > 0) symbol_of(frames[0]);
}

Symbol symbol_of(std::uintptr_t address) noexcept {
  Dl_info info{};
  Symbol found;
  if (::dladdr(reinterpret_cast<void*>(address), &info) == 0) return found;
  found.image = info.dli_fname;
  found.offset = address - reinterpret_cast<std::uintptr_t>(info.dli_fbase);
  found.name = info.dli_sname;
  return found;
}

}  // namespace mlx_safe
