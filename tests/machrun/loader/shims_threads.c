// Threads: macOS's objects are larger than a signature and a pointer, which is
// how they hold Linux's. A static one gets its Linux object at its first use.
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shims.h"

// The head of mutexes, conditions, locks, and attributes of a mutex.
typedef struct {
  int64_t signature;
  void* own;  // the Linux object behind it
} MacPthread;
enum { kReady = 0x4d616368 };
#define HAS_ROOM(type) \
  _Static_assert(sizeof(apple_pthread_##type##_t) >= sizeof(MacPthread), "");
HAS_ROOM(mutex)
HAS_ROOM(mutexattr)
HAS_ROOM(cond)
HAS_ROOM(rwlock)

typedef union {
  pthread_mutex_t mutex;
  pthread_cond_t condition;
  pthread_rwlock_t lock;
} Own;

static Own* make(int64_t signature) {
  Own* made = calloc(1, sizeof *made);
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  switch (signature) {
    case apple__PTHREAD_COND_SIG_init:
      pthread_cond_init(&made->condition, NULL);
      return made;
    case apple__PTHREAD_RWLOCK_SIG_init:
      pthread_rwlock_init(&made->lock, NULL);
      return made;
    case apple__PTHREAD_RECURSIVE_MUTEX_SIG_init:
      pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
      break;
    case apple__PTHREAD_ERRORCHECK_MUTEX_SIG_init:
      pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
      break;
    case apple__PTHREAD_MUTEX_SIG_init:
    case apple__PTHREAD_FIRSTFIT_MUTEX_SIG_init:
      break;
    default:
      refuse(NULL, "an object of pthread with the signature %#lx", signature);
  }
  pthread_mutex_init(&made->mutex, &attributes);
  return made;
}

static void* own(MacPthread* object) {
  static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
  if (__atomic_load_n(&object->signature, __ATOMIC_ACQUIRE) != kReady) {
    pthread_mutex_lock(&making);
    if (object->signature != kReady) {
      object->own = make(object->signature);
      __atomic_store_n(&object->signature, kReady, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&making);
  }
  return object->own;
}

// Functions of one such object.
#define OF_ONE(name)                                  \
  int mac_pthread_##name(MacPthread* object) {        \
    return to_mac_errno(pthread_##name(own(object))); \
  }
OF_ONE(mutex_lock)
OF_ONE(mutex_trylock)
OF_ONE(mutex_unlock)
OF_ONE(cond_signal)
OF_ONE(cond_broadcast)
OF_ONE(rwlock_rdlock)
OF_ONE(rwlock_wrlock)
OF_ONE(rwlock_unlock)

int mac_pthread_cond_wait(MacPthread* condition, MacPthread* mutex) {
  return to_mac_errno(pthread_cond_wait(own(condition), own(mutex)));
}
int mac_pthread_cond_timedwait(MacPthread* condition, MacPthread* mutex,
                               const struct timespec* until) {
  return to_mac_errno(
      pthread_cond_timedwait(own(condition), own(mutex), until));
}
// A mutex or a condition, which nobody uses any more; the kind that the system
// says EBUSY of cannot be told apart here.
int destroy_pthread(MacPthread* object) {
  if (object->signature == kReady) free(object->own);
  object->signature = 0;
  return 0;
}

// The attributes of a mutex are the signature that it begins with.
int mac_pthread_mutexattr_init(MacPthread* attributes) {
  attributes->signature = apple__PTHREAD_MUTEX_SIG_init;
  return 0;
}
int mac_pthread_mutexattr_settype(MacPthread* attributes, int type) {
  if (type < 0 || type > apple_PTHREAD_MUTEX_RECURSIVE) return EINVAL;
  attributes->signature = type == apple_PTHREAD_MUTEX_RECURSIVE
                              ? apple__PTHREAD_RECURSIVE_MUTEX_SIG_init
                          : type == apple_PTHREAD_MUTEX_ERRORCHECK
                              ? apple__PTHREAD_ERRORCHECK_MUTEX_SIG_init
                              : apple__PTHREAD_MUTEX_SIG_init;
  return 0;
}
int mac_pthread_mutex_init(MacPthread* mutex, const MacPthread* attributes) {
  mutex->signature =
      attributes ? attributes->signature : apple__PTHREAD_MUTEX_SIG_init;
  return 0;
}

int mac_pthread_create(pthread_t* thread, const void* attributes,
                       void* (*start)(void*), void* argument) {
  if (attributes != NULL) refuse(NULL, "pthread_create with attributes");
  return to_mac_errno(pthread_create(thread, NULL, start, argument));
}
int mac_pthread_join(pthread_t thread, void** result) {
  return to_mac_errno(pthread_join(thread, result));
}
int mac_pthread_key_create(unsigned long* key, void (*end)(void*)) {
  pthread_key_t made = 0;
  int status = to_mac_errno(pthread_key_create(&made, end));
  *key = made;
  return status;
}
int mac_pthread_threadid_np(pthread_t thread, uint64_t* id) {
  if (thread != 0 && thread != pthread_self())
    refuse(NULL, "pthread_threadid_np of another thread");
  *id = (uint64_t)gettid();
  return 0;
}

// The predicate is ~0 once it has run, which callers look at themselves.
void mac_dispatch_once_f(long* predicate, void* context, void (*run)(void*)) {
  static pthread_mutex_t running = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
  pthread_mutex_lock(&running);
  if (__atomic_load_n(predicate, __ATOMIC_ACQUIRE) != ~0L) {
    run(context);
    __atomic_store_n(predicate, ~0L, __ATOMIC_RELEASE);
  }
  pthread_mutex_unlock(&running);
}

// ---- ulock -----------------------------------------------------------------

// Of XNU's <sys/ulock.h>, which the SDK lacks; the numbers are libc++'s.
enum { kUlock32 = 1, kUlock64 = 5, kUlockWakeAll = 0x100 };

// A futex has 32 bits, so of a wider value the lower half is waited for. The
// wait ends after 10 ms, so that a change of the upper half is seen. May end
// too early, as on macOS.
int mac___ulock_wait(uint32_t operation, void* address, uint64_t value,
                     uint32_t timeout_us) {
  bool wide = (operation & 0xff) == kUlock64;
  if (!wide && (operation & 0xff) != kUlock32)
    refuse(NULL, "__ulock_wait with the operation %#x", operation);
  if (wide && *(volatile uint64_t*)address != value) return 0;
  uint64_t limit = timeout_us ? timeout_us : UINT32_MAX;
  if (wide && limit > 10000) limit = 10000;
  struct timespec time = {(time_t)(limit / 1000000),
                          (long)(limit % 1000000) * 1000};
  syscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, (uint32_t)value, &time, NULL,
          0);
  return 0;
}
int mac___ulock_wake(uint32_t operation, void* address, uint64_t value) {
  (void)value;
  int count = operation & kUlockWakeAll ? INT_MAX : 1;
  syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
  return 0;
}
