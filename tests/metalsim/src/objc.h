// The types of the simulated Objective-C runtime and what the rest of the
// simulator needs of it.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#define METALSIM_EXPORT extern "C" __attribute__((visibility("default")))

struct objc_class;
struct objc_method;

struct objc_selector {
  std::string name;
  uint32_t index;
};

struct objc_object {
  objc_class* isa;
};

using id = objc_object*;
using Class = objc_class*;
using SEL = objc_selector*;
using Method = objc_method*;
using IMP = void (*)();
using BOOL = bool;

struct objc_method {
  SEL name;
  std::string types;
  std::atomic<IMP> imp;
  IMP original;  // nullptr: added at run time
};

namespace metalsim {

struct Object;
// Destroys the C++ parts of an instance; the memory is dealt with elsewhere.
using Destroy = void (*)(Object*);
// Makes an instance for +alloc.
using Create = Object* (*)(Class);

// metal-cpp registers some 3000 selectors before anybody sends one.
constexpr uint32_t kCacheSize = 4096;

}  // namespace metalsim

struct objc_class : objc_object {
  objc_class() : objc_object{nullptr} {}

  std::string name;
  Class super = nullptr;
  bool meta = false;
  bool block = false;
  std::atomic<bool> registered{false};  // visible to objc_getClass
  metalsim::Destroy destroy = nullptr;
  metalsim::Create create = nullptr;
  std::atomic<int64_t> live{0};
  std::vector<Method> methods;  // guarded by the runtime's lock
  // Methods found before, by selector index. Entries are written under the
  // runtime's lock only, so a stale one cannot come back after an override
  // was added.
  std::array<std::atomic<Method>, metalsim::kCacheSize> cache{};
};

METALSIM_EXPORT void objc_msgSend();
METALSIM_EXPORT SEL sel_registerName(const char* name);
METALSIM_EXPORT Method class_getInstanceMethod(Class cls, SEL sel);
METALSIM_EXPORT id objc_retain(id object);
METALSIM_EXPORT void objc_release(id object);
METALSIM_EXPORT void* objc_autoreleasePoolPush();
METALSIM_EXPORT void objc_autoreleasePoolPop(void* token);
METALSIM_EXPORT void* _Block_copy(const void* block);
METALSIM_EXPORT void _Block_release(const void* block);
METALSIM_EXPORT void _Block_object_assign(void* to, const void* from, int kind);
METALSIM_EXPORT void _Block_object_dispose(const void* object, int kind);

namespace metalsim {

// ---- memory ----------------------------------------------------------------

// Every instance starts with this. C++ parts follow in derived structs.
struct Object : objc_object {
  std::atomic<int32_t> refs{1};
  std::atomic<bool> has_associations{false};
  uint32_t allocated = 0;
  Object() : objc_object{nullptr} {}
};

// Freed memory is handed out again at once, last in first out, so that a
// stale address soon names another object.
void* take_memory(size_t bytes);
void give_memory(void* memory, size_t bytes);

template <class T>
T* make_object(Class cls) {
  auto* object = new (take_memory(sizeof(T))) T();
  object->isa = cls;
  object->allocated = sizeof(T);
  cls->live.fetch_add(1, std::memory_order_relaxed);
  return object;
}

// Says what instances of a class and of its subclasses consist of.
template <class T>
void set_instances(Class cls) {
  cls->create = [](Class which) -> Object* { return make_object<T>(which); };
  cls->destroy = [](Object* object) { static_cast<T*>(object)->~T(); };
}

void dispose_object(Object* object);
void drop_associations(Object* object);
id autorelease(id object);

struct AutoreleasePool {
  void* token = objc_autoreleasePoolPush();
  AutoreleasePool() = default;
  AutoreleasePool(const AutoreleasePool&) = delete;
  AutoreleasePool& operator=(const AutoreleasePool&) = delete;
  ~AutoreleasePool() { objc_autoreleasePoolPop(token); }
};

// ---- classes ---------------------------------------------------------------

struct MethodSpec {
  const char* name;
  const char* types;
  IMP imp;
};

template <class R, class... A>
IMP imp(R (*function)(id, SEL, A...)) {
  return reinterpret_cast<IMP>(function);
}

// Makes a class with its metaclass; it inherits destroy and create unless it
// brings its own. Not yet visible to objc_getClass.
Class define_class(const char* name, Class super,
                   std::initializer_list<MethodSpec> methods,
                   std::initializer_list<MethodSpec> class_methods = {});
void define_block_class(objc_class& cls, const char* name);
void add_methods(Class cls, std::initializer_list<MethodSpec> methods);
void register_class(Class cls);
IMP find_implementation(Class cls, SEL sel);
bool is_kind_of(id object, Class cls);
void restore_removed_selectors();

// ---- messages --------------------------------------------------------------

// Not through objc_msgSend, which is for what comes from outside.
template <class R = void, class... A>
R send(id object, SEL sel, A... args) {
  if (object == nullptr) return R();
  IMP found = find_implementation(object->isa, sel);
  return reinterpret_cast<R (*)(id, SEL, A...)>(found)(object, sel, args...);
}

// What `[super sel]` compiles to inside a method that `owner` owns.
template <class R = void, class... A>
R send_super(Class owner, id object, SEL sel, A... args) {
  IMP found = find_implementation(owner->super, sel);
  return reinterpret_cast<R (*)(id, SEL, A...)>(found)(object, sel, args...);
}

// Prints what Metal's own assertion would and aborts.
[[noreturn]] void fail_assertion(id object, SEL sel, const char* what);

// ---- Blocks ----------------------------------------------------------------

struct BlockDescriptor {
  unsigned long reserved;
  unsigned long size;
  void (*copy)(void* to, const void* from);
  void (*dispose)(const void* block);
};

struct BlockLiteral {
  void* isa;
  int32_t flags;
  int32_t reserved;
  void (*invoke)(void*, ...);
  const BlockDescriptor* descriptor;
};

inline void call_block(const void* block, id argument) {
  auto* literal = static_cast<const BlockLiteral*>(block);
  auto* invoke = reinterpret_cast<void (*)(const void*, id)>(
      reinterpret_cast<IMP>(literal->invoke));
  invoke(block, argument);
}

// A heap Block that calls `block` with `replacement` instead of what it is
// given; it keeps both alive.
void* make_substituting_block(const void* block, id replacement);

uint64_t blocks_copied();
uint64_t blocks_disposed();
void reset_block_counts();

// Classes of the foundation, made on first use.
Class nsobject_class();

}  // namespace metalsim
