// One C function for each method that is replaced, made from one hook.
//
// A method's replacement must know which original it replaces. A family class
// may override what its base class has and call it through super. Then one call
// runs through the same replacement twice, with the same object. Hence one C
// function for each replaced method, made from one hook.
//
// `call` runs on whatever thread sends the message, Metal's included; it takes
// no lock and allocates nothing, but what the hook does. `slots` is for the
// list of hooks. Neither is for the crash path.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <utility>

#include "objc/runtime.h"

namespace mlx_safe::metal {

// Classes that may own one method at a time; real chains have one to three, the
// debug layers add as many.
inline constexpr std::size_t kSlots = 16;

struct Slots {
  std::array<objc::Imp, kSlots> functions;
  std::atomic<objc::Imp>* originals;
};

// `Hook` is a function (original, self, selector, arguments…). Each entry of
// the list has a number of its own: two methods may share a hook, but no
// original.
template <int Entry, auto Hook>
struct Trampolines;

template <int Entry, class Result, class... Arguments,
          Result (*Hook)(Result (*)(objc::Id, objc::Selector, Arguments...),
                         objc::Id, objc::Selector, Arguments...)>
struct Trampolines<Entry, Hook> {
  using Function = Result (*)(objc::Id, objc::Selector, Arguments...);

  static inline std::atomic<objc::Imp> originals[kSlots];

  template <std::size_t Slot>
  static Result call(objc::Id self, objc::Selector selector,
                     Arguments... arguments) {
    auto original = reinterpret_cast<Function>(
        originals[Slot].load(std::memory_order_acquire));
    return Hook(original, self, selector, arguments...);
  }

  static Slots slots() {
    return []<std::size_t... Slot>(std::index_sequence<Slot...>) {
      return Slots{{reinterpret_cast<objc::Imp>(&call<Slot>)...}, originals};
    }(std::make_index_sequence<kSlots>{});
  }
};

}  // namespace mlx_safe::metal
