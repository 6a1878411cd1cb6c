// Object memory, reference counts, autorelease pools, associated objects.

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include "objc.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(memory, bytes) ASAN_POISON_MEMORY_REGION(memory, bytes)
#define UNPOISON(memory, bytes) ASAN_UNPOISON_MEMORY_REGION(memory, bytes)
#else
#define POISON(memory, bytes) (static_cast<void>(0))
#define UNPOISON(memory, bytes) (static_cast<void>(0))
#endif

namespace metalsim {
namespace {

constexpr size_t kGranule = 32;
constexpr size_t kSizes = 64;  // blocks up to 2 KiB come from the free lists

// Freed blocks are remembered outside of themselves, so that under the
// address sanitizer the whole block can be poisoned. Touching a dead object
// is then reported until its address is in use again.
struct FreeLists {
  std::mutex lock;
  std::array<std::vector<void*>, kSizes> blocks;
};

FreeLists& free_lists() {
  static auto* instance = new FreeLists;
  return *instance;
}

size_t size_class(size_t bytes) { return (bytes + kGranule - 1) / kGranule; }

enum Policy : uintptr_t { kAssign = 0, kRetain = 1, kCopy = 3 };

struct Association {
  id value;
  bool owned;
};

struct Associations {
  std::mutex lock;
  std::unordered_map<id, std::unordered_map<const void*, Association>> of;
};

Associations& associations() {
  static auto* instance = new Associations;
  return *instance;
}

// One stack of autoreleased objects per thread; a pool is a height of it. It
// hangs on a pthread key and not on a C++ thread_local, because thread-local
// C++ objects of the program may still send messages from their destructors.
struct PoolStack {
  std::vector<id> objects;
};

// One pointer fits the static TLS that a dlopened library may use. That is
// quicker, and older leak sanitizers cannot follow the dynamic kind.
__attribute__((tls_model("initial-exec"))) thread_local PoolStack* pool_stack =
    nullptr;

void drain(PoolStack& stack, size_t height) {
  while (stack.objects.size() > height) {
    id object = stack.objects.back();
    stack.objects.pop_back();
    objc_release(object);
  }
}

void end_of_thread(void* pointer) {
  auto* stack = static_cast<PoolStack*>(pointer);
  drain(*stack, 0);
  pool_stack = nullptr;
  delete stack;
}

PoolStack& this_threads_stack() {
  static pthread_key_t key = [] {
    pthread_key_t made;
    if (pthread_key_create(&made, &end_of_thread) != 0) std::abort();
    return made;
  }();
  if (pool_stack == nullptr) {
    pool_stack = new PoolStack;
    pthread_setspecific(key, pool_stack);
  }
  return *pool_stack;
}

bool counts_references(id object) {
  return !object->isa->meta && !object->isa->block;
}

}  // namespace

void* take_memory(size_t bytes) {
  size_t size = size_class(bytes);
  if (size >= kSizes) return std::malloc(bytes);
  FreeLists& lists = free_lists();
  {
    std::lock_guard guard(lists.lock);
    auto& blocks = lists.blocks[size];
    if (!blocks.empty()) {
      void* memory = blocks.back();
      blocks.pop_back();
      UNPOISON(memory, size * kGranule);
      return memory;
    }
  }
  void* memory = std::malloc(size * kGranule);
  if (memory == nullptr) std::abort();
  return memory;
}

void give_memory(void* memory, size_t bytes) {
  size_t size = size_class(bytes);
  if (size >= kSizes) return std::free(memory);
  FreeLists& lists = free_lists();
  std::lock_guard guard(lists.lock);
  POISON(memory, size * kGranule);
  lists.blocks[size].push_back(memory);
}

void drop_associations(Object* object) {
  std::unordered_map<const void*, Association> mine;
  {
    std::lock_guard guard(associations().lock);
    auto found = associations().of.find(object);
    if (found == associations().of.end()) return;
    mine = std::move(found->second);
    associations().of.erase(found);
  }
  // Released outside of the lock: a value's dealloc may come back here.
  for (auto& [key, association] : mine) {
    if (association.owned) objc_release(association.value);
  }
}

void dispose_object(Object* object) {
  if (object->has_associations.load()) drop_associations(object);
  Class cls = object->isa;
  uint32_t bytes = object->allocated;
  cls->live.fetch_sub(1, std::memory_order_relaxed);
  if (cls->destroy != nullptr) cls->destroy(object);
  give_memory(object, bytes);
}

id autorelease(id object) {
  if (object != nullptr) this_threads_stack().objects.push_back(object);
  return object;
}

}  // namespace metalsim

using namespace metalsim;

METALSIM_EXPORT id objc_retain(id object) {
  if (object == nullptr) return nullptr;
  if (object->isa->block) return static_cast<id>(_Block_copy(object));
  if (counts_references(object)) {
    auto& refs = static_cast<Object*>(object)->refs;
    refs.fetch_add(1, std::memory_order_relaxed);
  }
  return object;
}

METALSIM_EXPORT void objc_release(id object) {
  if (object == nullptr) return;
  if (object->isa->block) return _Block_release(object);
  if (!counts_references(object)) return;
  auto& refs = static_cast<Object*>(object)->refs;
  if (refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  static SEL dealloc = sel_registerName("dealloc");
  send(object, dealloc);
}

METALSIM_EXPORT void* objc_autoreleasePoolPush() {
  size_t height = this_threads_stack().objects.size();
  return reinterpret_cast<void*>(height + 1);
}

METALSIM_EXPORT void objc_autoreleasePoolPop(void* token) {
  drain(this_threads_stack(), reinterpret_cast<uintptr_t>(token) - 1);
}

METALSIM_EXPORT id objc_getAssociatedObject(id object, const void* key) {
  if (object == nullptr) return nullptr;
  std::lock_guard guard(associations().lock);
  auto found = associations().of.find(object);
  if (found == associations().of.end()) return nullptr;
  auto entry = found->second.find(key);
  return entry == found->second.end() ? nullptr : entry->second.value;
}

METALSIM_EXPORT void objc_setAssociatedObject(id object, const void* key,
                                              id value, uintptr_t policy) {
  if (object == nullptr) return;
  uintptr_t kind = policy & 0xff;  // the rest says atomic or not
  bool owned = kind == kRetain || kind == kCopy;
  static SEL copy = sel_registerName("copy");
  if (value != nullptr && owned) {
    value = kind == kCopy ? send<id>(value, copy) : objc_retain(value);
  }
  Association old{nullptr, false};
  {
    std::lock_guard guard(associations().lock);
    auto& mine = associations().of[object];
    auto [place, added] = mine.try_emplace(key, Association{nullptr, false});
    old = place->second;
    place->second = {value, owned};
    if (value == nullptr) mine.erase(key);
    if (mine.empty()) associations().of.erase(object);
  }
  if (counts_references(object)) {
    static_cast<Object*>(object)->has_associations.store(true);
  }
  if (old.owned) objc_release(old.value);
}
