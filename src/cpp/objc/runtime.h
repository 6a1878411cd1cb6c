// The Objective-C runtime and Metal's one C function, found at install.
//
// Nothing of Apple's is linked: on macOS the names come from libobjc, libSystem
// and Metal.framework, elsewhere from the library that MLX_SAFE_METAL_RUNTIME
// names (a simulated Metal). One list, `MLX_SAFE_RUNTIME_FUNCTIONS`, says what
// is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace mlx_safe::objc {

struct Object;
struct ClassType;
struct SelectorType;
struct MethodType;
using Id = Object*;
using Class = ClassType*;
using Selector = SelectorType*;
using Method = MethodType*;
using Imp = void (*)();

// X(result, name, parameters)
#define MLX_SAFE_RUNTIME_FUNCTIONS(X)                      \
  X(void, objc_msgSend, ())                                \
  X(Class, objc_getClass, (const char*))                   \
  X(Class, object_getClass, (Id))                          \
  X(const char*, class_getName, (Class))                   \
  X(Class, class_getSuperclass, (Class))                   \
  X(Method, class_getInstanceMethod, (Class, Selector))    \
  X(Method*, class_copyMethodList, (Class, unsigned int*)) \
  X(Selector, method_getName, (Method))                    \
  X(Imp, method_getImplementation, (Method))               \
  X(Imp, method_setImplementation, (Method, Imp))          \
  X(Selector, sel_registerName, (const char*))             \
  X(const char*, sel_getName, (Selector))                  \
  X(Id, objc_retain, (Id))                                 \
  X(void, objc_release, (Id))                              \
  X(void*, objc_autoreleasePoolPush, ())                   \
  X(void, objc_autoreleasePoolPop, (void*))                \
  X(void*, _Block_copy, (const void*))                     \
  X(void, _Block_release, (const void*))                   \
  X(Id, MTLCreateSystemDefaultDevice, ())

struct Runtime {
#define MLX_SAFE_MEMBER(result, name, parameters) \
  result(*name) parameters = nullptr;
  MLX_SAFE_RUNTIME_FUNCTIONS(MLX_SAFE_MEMBER)
#undef MLX_SAFE_MEMBER
  void* stack_block_class = nullptr;  // &_NSConcreteStackBlock
  std::string path;                   // where it was found
};

// Finds everything; false, and why not, when anything is missing. Idempotent:
// the first success is kept for the life of the process, since hooks may be
// called as long as it lives. Not for Metal's threads or the crash path.
bool load_runtime(std::string* why_not);

// What `load_runtime` found. Any thread, once that has succeeded.
const Runtime& runtime() noexcept;

// Sends a message. The caller names the method's exact types, as metal-cpp
// does: `send<Result>(object, selector, arguments…)`. Any thread.
template <class Result, class... Arguments>
Result send(Id object, Selector selector, Arguments... arguments) {
  auto f = reinterpret_cast<Result (*)(Id, Selector, Arguments...)>(
      runtime().objc_msgSend);
  return f(object, selector, arguments...);
}

// Whether `object` has the method. Any thread.
bool responds(Id object, Selector selector) noexcept;

// An owning reference: releases what it was given when it goes.
class Owned {
 public:
  Owned() = default;
  explicit Owned(Id object) noexcept : object_(object) {}
  static Owned retaining(Id object) noexcept {
    return Owned(object == nullptr ? nullptr : runtime().objc_retain(object));
  }
  Owned(Owned&& other) noexcept
      : object_(std::exchange(other.object_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Owned() {
    if (object_ != nullptr) runtime().objc_release(object_);
  }
  Id get() const noexcept { return object_; }
  explicit operator bool() const noexcept { return object_ != nullptr; }

 private:
  Id object_ = nullptr;
};

class AutoreleasePool {
 public:
  AutoreleasePool() : pool_(runtime().objc_autoreleasePoolPush()) {}
  ~AutoreleasePool() { runtime().objc_autoreleasePoolPop(pool_); }
  AutoreleasePool(const AutoreleasePool&) = delete;
  AutoreleasePool& operator=(const AutoreleasePool&) = delete;

 private:
  void* pool_;
};

// UTF8String of an NSString; null for nil. Valid as long as the string.
const char* utf8(Id string) noexcept;

}  // namespace mlx_safe::objc
