// How a program talks to the Objective-C runtime without a compiler that
// knows it: entry points by dlsym, typed sends, Blocks from std::function.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <utility>

#include "../metalsim.h"

namespace host {

struct Object;  // stands for objc_object
struct Selector;
using id = Object*;
using SEL = Selector*;
using Class = Object*;
using Method = struct MethodOpaque*;
using IMP = void (*)();

// The library that MLX_SAFE_METAL_RUNTIME names.
inline void* runtime_library() {
  static void* library = [] {
    const char* path = std::getenv("MLX_SAFE_METAL_RUNTIME");
    if (path == nullptr || *path == '\0') {
      std::fprintf(stderr, "MLX_SAFE_METAL_RUNTIME is not set\n");
      std::exit(2);
    }
    void* opened = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(2);
    }
    return opened;
  }();
  return library;
}

inline void* entry(const char* name) {
  void* address = dlsym(runtime_library(), name);
  if (address == nullptr) {
    std::fprintf(stderr, "the Metal runtime has no %s\n", name);
    std::exit(2);
  }
  return address;
}

template <class Function>
Function* function(const char* name) {
  return reinterpret_cast<Function*>(entry(name));
}

// The simulator's control function of that name, with its type.
#define METALSIM(name) (::host::function<decltype(name)>(#name))

// ---- messages --------------------------------------------------------------

inline SEL selector(const char* name) {
  static auto* registered = function<SEL(const char*)>("sel_registerName");
  return registered(name);
}

// SEL_(commit) is looked up once per place of use.
#define SEL_(name)                                    \
  ([]() -> ::host::SEL {                              \
    static ::host::SEL sel = ::host::selector(#name); \
    return sel;                                       \
  }())

template <class R = void, class... A>
R send(id object, SEL sel, A... args) {
  static void* address = entry("objc_msgSend");
  return reinterpret_cast<R (*)(id, SEL, A...)>(address)(object, sel, args...);
}

inline id retain(id object) {
  static auto* call = function<id(id)>("objc_retain");
  return call(object);
}

inline void release(id object) {
  static auto* call = function<void(id)>("objc_release");
  call(object);
}

class ScopedPool {
 public:
  ScopedPool() {
    static auto* push = function<void*()>("objc_autoreleasePoolPush");
    token_ = push();
  }
  ScopedPool(const ScopedPool&) = delete;
  ScopedPool& operator=(const ScopedPool&) = delete;
  ~ScopedPool() {
    static auto* pop = function<void(void*)>("objc_autoreleasePoolPop");
    pop(token_);
  }

 private:
  void* token_;
};

// A strong reference.
class Ref {
 public:
  Ref() = default;
  static Ref take(id object) { return Ref(object); }
  static Ref share(id object) { return Ref(retain(object)); }
  Ref(const Ref& other) : object_(retain(other.object_)) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ != nullptr) release(object_);
  }
  id get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit Ref(id object) : object_(object) {}
  id object_ = nullptr;
};

// ---- Blocks ----------------------------------------------------------------

// A Block on the stack around a function; its receiver copies it, as
// the ABI wants. The function is copied with it and dies with the last copy.
class Block {
 public:
  using Function = std::function<void(id)>;

  explicit Block(Function function)
      : literal_{entry("_NSConcreteStackBlock"),
                 kHasCopyDispose,
                 0,
                 &invoke,
                 descriptor(),
                 std::move(function)} {}

  id get() { return reinterpret_cast<id>(&literal_); }

 private:
  static constexpr int32_t kHasCopyDispose = 1 << 25;

  struct Descriptor {
    unsigned long reserved, size;
    void (*copy)(void*, const void*);
    void (*dispose)(const void*);
  };

  struct Literal {
    void* isa;
    int32_t flags, reserved;
    void (*invoke)(void*, id);
    const Descriptor* descriptor;
    Function function;
  };

  static void invoke(void* block, id argument) {
    static_cast<Literal*>(block)->function(argument);
  }
  static void copy(void* to, const void* from) {
    // The runtime has copied the bytes; the function needs a real copy.
    new (&static_cast<Literal*>(to)->function)
        Function(static_cast<const Literal*>(from)->function);
  }
  static void dispose(const void* block) {
    static_cast<const Literal*>(block)->function.~Function();
  }
  static const Descriptor* descriptor() {
    static const Descriptor one{0, sizeof(Literal), &copy, &dispose};
    return &one;
  }

  Literal literal_;
};

// ---- the objects -----------------------------------------------------------

inline Ref default_device() {
  static auto* create = function<id()>("MTLCreateSystemDefaultDevice");
  return Ref::take(create());
}

inline std::string text_of(id string) {
  if (string == nullptr) return {};
  return send<const char*>(string, selector("UTF8String"));
}

inline std::string message_of(id command_buffer) {
  id error = send<id>(command_buffer, SEL_(error));
  return text_of(send<id>(error, SEL_(localizedDescription)));
}

constexpr uint64_t kStatusError = 5;

inline bool has_failed(id command_buffer) {
  return send<uint64_t>(command_buffer, SEL_(status)) == kStatusError;
}

}  // namespace host
