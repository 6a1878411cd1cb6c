// The Block runtime: the published ABI.

#include <cstring>
#include <new>

#include "objc.h"

// The addresses of these are what a Block's isa holds. They become class
// objects, so that a Block is an object that can be retained. Raw storage,
// since nothing may destroy them while the process exits.
extern "C" {
alignas(objc_class) __attribute__((visibility(
    "default"))) unsigned char _NSConcreteStackBlock[sizeof(objc_class)];
alignas(objc_class) __attribute__((visibility(
    "default"))) unsigned char _NSConcreteGlobalBlock[sizeof(objc_class)];
}

namespace metalsim {
namespace {

constexpr int32_t kRefcountMask = 0xfffe;
constexpr int32_t kRefcountOne = 2;  // bit 0 says "being deallocated"
constexpr int32_t kNeedsFree = 1 << 24;
constexpr int32_t kHasCopyDispose = 1 << 25;
constexpr int32_t kIsGlobal = 1 << 28;

objc_class& malloc_block_class() {
  static auto* instance = new objc_class;
  return *instance;
}

std::atomic<uint64_t> copied{0};
std::atomic<uint64_t> disposed{0};

id block_retain(id self, SEL) { return static_cast<id>(_Block_copy(self)); }
void block_release(id self, SEL) { _Block_release(self); }

[[maybe_unused]] const bool classes_ready = [] {
  auto* on_stack = new (_NSConcreteStackBlock) objc_class;
  auto* global = new (_NSConcreteGlobalBlock) objc_class;
  for (auto [cls, name] : {std::pair{on_stack, "__NSStackBlock__"},
                           {global, "__NSGlobalBlock__"},
                           {&malloc_block_class(), "__NSMallocBlock__"}}) {
    define_block_class(*cls, name);
    add_methods(cls, {{"retain", "@16@0:8", imp(&block_retain)},
                      {"copy", "@16@0:8", imp(&block_retain)},
                      {"release", "v16@0:8", imp(&block_release)}});
  }
  return true;
}();

void* copy_to_heap(const BlockLiteral* from) {
  size_t size = from->descriptor->size;
  auto* to = static_cast<BlockLiteral*>(take_memory(size));
  std::memcpy(to, from, size);
  to->isa = &malloc_block_class();
  to->flags = (from->flags & ~kRefcountMask & ~1) | kNeedsFree | kRefcountOne;
  if (from->flags & kHasCopyDispose) from->descriptor->copy(to, from);
  malloc_block_class().live.fetch_add(1, std::memory_order_relaxed);
  copied.fetch_add(1, std::memory_order_relaxed);
  return to;
}

// ---- a Block of the simulator's own ----------------------------------------

struct SubstitutingBlock {
  BlockLiteral head;
  const void* block;
  id replacement;
};

void substitute(void* self, id) {
  auto* mine = static_cast<SubstitutingBlock*>(self);
  call_block(mine->block, mine->replacement);
}

void copy_substituting(void* to, const void*) {
  auto* mine = static_cast<SubstitutingBlock*>(to);
  mine->block = _Block_copy(mine->block);
  objc_retain(mine->replacement);
}

void dispose_substituting(const void* block) {
  auto* mine = static_cast<const SubstitutingBlock*>(block);
  _Block_release(mine->block);
  objc_release(mine->replacement);
}

constexpr BlockDescriptor kSubstitutingDescriptor{
    0, sizeof(SubstitutingBlock), &copy_substituting, &dispose_substituting};

}  // namespace

void* make_substituting_block(const void* block, id replacement) {
  auto* invoke = reinterpret_cast<void (*)(void*, ...)>(
      reinterpret_cast<IMP>(&substitute));
  SubstitutingBlock literal{{_NSConcreteStackBlock, kHasCopyDispose, 0, invoke,
                             &kSubstitutingDescriptor},
                            block,
                            replacement};
  return _Block_copy(&literal);
}

uint64_t blocks_copied() { return copied.load(); }
uint64_t blocks_disposed() { return disposed.load(); }

void reset_block_counts() {
  copied = 0;
  disposed = 0;
}

}  // namespace metalsim

using namespace metalsim;

METALSIM_EXPORT void* _Block_copy(const void* block) {
  if (block == nullptr) return nullptr;
  auto* literal = static_cast<BlockLiteral*>(const_cast<void*>(block));
  int32_t flags = __atomic_load_n(&literal->flags, __ATOMIC_RELAXED);
  if (flags & kIsGlobal) return literal;
  if (!(flags & kNeedsFree)) return copy_to_heap(literal);
  __atomic_fetch_add(&literal->flags, kRefcountOne, __ATOMIC_RELAXED);
  return literal;
}

METALSIM_EXPORT void _Block_release(const void* block) {
  if (block == nullptr) return;
  auto* literal = static_cast<BlockLiteral*>(const_cast<void*>(block));
  int32_t flags = __atomic_load_n(&literal->flags, __ATOMIC_RELAXED);
  if ((flags & kIsGlobal) || !(flags & kNeedsFree)) return;
  int32_t left =
      __atomic_sub_fetch(&literal->flags, kRefcountOne, __ATOMIC_ACQ_REL);
  if (left & kRefcountMask) return;
  if (flags & kHasCopyDispose) literal->descriptor->dispose(literal);
  malloc_block_class().live.fetch_sub(1, std::memory_order_relaxed);
  disposed.fetch_add(1, std::memory_order_relaxed);
  give_memory(literal, literal->descriptor->size);
}

// ---- what a Block has captured ---------------------------------------------

namespace {

// The compiler's kinds (BLOCK_FIELD_IS_…).
constexpr int kCapturedObject = 3, kCapturedBlock = 7, kCapturedVariable = 8;

// A __block variable: on the stack until a Block that has captured it is
// copied, then on the heap, where `forwarding` of both leads.
struct Variable {
  void* isa;
  Variable* forwarding;
  int32_t flags;
  uint32_t size;
  void (*keep)(Variable* to, Variable* from);  // with kHasCopyDispose
  void (*destroy)(Variable* variable);
};

Variable* move_to_heap(Variable* from) {
  // One reference is the stack's, which it gives up when its frame ends.
  auto* to = static_cast<Variable*>(take_memory(from->size));
  std::memcpy(to, from, from->size);
  to->isa = nullptr;
  to->flags = from->flags | kNeedsFree | 2 * kRefcountOne;
  to->forwarding = to;
  from->forwarding = to;
  if (from->flags & kHasCopyDispose) to->keep(to, from);
  return to;
}

}  // namespace

METALSIM_EXPORT void _Block_object_assign(void* to, const void* from,
                                          int kind) {
  auto** place = static_cast<const void**>(to);
  *place = from;
  auto* object = const_cast<void*>(from);
  if ((kind & 15) == kCapturedBlock) *place = _Block_copy(from);
  if ((kind & 15) == kCapturedObject) objc_retain(static_cast<id>(object));
  if ((kind & 15) != kCapturedVariable) return;
  Variable* variable = static_cast<Variable*>(object)->forwarding;
  if (variable->flags & kNeedsFree) {
    __atomic_fetch_add(&variable->flags, kRefcountOne, __ATOMIC_RELAXED);
    *place = variable;
  } else {
    *place = move_to_heap(variable);
  }
}

METALSIM_EXPORT void _Block_object_dispose(const void* object, int kind) {
  auto* given = const_cast<void*>(object);
  if ((kind & 15) == kCapturedBlock) _Block_release(object);
  if ((kind & 15) == kCapturedObject) objc_release(static_cast<id>(given));
  if ((kind & 15) != kCapturedVariable) return;
  Variable* variable = static_cast<Variable*>(given)->forwarding;
  if (!(variable->flags & kNeedsFree)) return;
  int32_t left =
      __atomic_sub_fetch(&variable->flags, kRefcountOne, __ATOMIC_ACQ_REL);
  if (left & kRefcountMask) return;
  if (variable->flags & kHasCopyDispose) variable->destroy(variable);
  give_memory(variable, variable->size);
}
