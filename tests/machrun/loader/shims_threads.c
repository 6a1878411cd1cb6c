// Threads: macOS's objects are larger than a signature and a pointer, which is
// how they hold Linux's. A static one gets its Linux object at its first use.
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shims.h"

enum { kReady = 0x4d616368 };

static pthread_mutex_t g_making = PTHREAD_MUTEX_INITIALIZER;

static void* make_mutex(int64_t signature) {
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  if (signature == kMacRecursiveMutex)
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
  else if (signature == kMacErrorCheckMutex)
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
  else if (signature != kMacMutex && signature != kMacFirstFitMutex)
    refuse(NULL, "a mutex with the signature %#lx", signature);
  pthread_mutex_t* made = malloc(sizeof *made);
  pthread_mutex_init(made, &attributes);
  return made;
}

static void* make_condition(int64_t signature) {
  if (signature != kMacCondition)
    refuse(NULL, "a condition with the signature %#lx", signature);
  pthread_cond_t* made = malloc(sizeof *made);
  pthread_cond_init(made, NULL);
  return made;
}

static void* make_lock(int64_t signature) {
  if (signature != kMacLock)
    refuse(NULL, "a read-write lock with the signature %#lx", signature);
  pthread_rwlock_t* made = malloc(sizeof *made);
  pthread_rwlock_init(made, NULL);
  return made;
}

static void* own(MacPthread* object, void* (*make)(int64_t)) {
  if (__atomic_load_n(&object->signature, __ATOMIC_ACQUIRE) != kReady) {
    pthread_mutex_lock(&g_making);
    if (object->signature != kReady) {
      object->own = make(object->signature);
      __atomic_store_n(&object->signature, kReady, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&g_making);
  }
  return object->own;
}

// None of these objects is in use when it is destroyed.
static int destroy(MacPthread* object, void (*end)(void*)) {
  if (object->signature == kReady) {
    end(object->own);
    free(object->own);
  }
  object->signature = 0;
  return 0;
}

#define MUTEX(object) ((pthread_mutex_t*)own(object, make_mutex))
#define CONDITION(object) ((pthread_cond_t*)own(object, make_condition))
#define LOCK(object) ((pthread_rwlock_t*)own(object, make_lock))

int mac_pthread_mutexattr_init(MacPthread* attributes) {
  attributes->signature = kMacMutex;
  return 0;
}
int mac_pthread_mutexattr_settype(MacPthread* attributes, int type) {
  attributes->signature =
      type == kMac_PTHREAD_MUTEX_RECURSIVE    ? kMacRecursiveMutex
      : type == kMac_PTHREAD_MUTEX_ERRORCHECK ? kMacErrorCheckMutex
                                              : kMacMutex;
  return 0;
}
int mac_pthread_mutexattr_destroy(MacPthread* attributes) {
  (void)attributes;
  return 0;
}
int mac_pthread_mutex_init(MacPthread* mutex, const MacPthread* attributes) {
  mutex->signature = attributes ? attributes->signature : kMacMutex;
  return 0;
}
int mac_pthread_mutex_lock(MacPthread* mutex) {
  return mac_errno_of(pthread_mutex_lock(MUTEX(mutex)));
}
int mac_pthread_mutex_trylock(MacPthread* mutex) {
  return mac_errno_of(pthread_mutex_trylock(MUTEX(mutex)));
}
int mac_pthread_mutex_unlock(MacPthread* mutex) {
  return mac_errno_of(pthread_mutex_unlock(MUTEX(mutex)));
}
static void end_mutex(void* mutex) { pthread_mutex_destroy(mutex); }
int mac_pthread_mutex_destroy(MacPthread* mutex) {
  return destroy(mutex, end_mutex);
}
int mac_pthread_cond_wait(MacPthread* condition, MacPthread* mutex) {
  return mac_errno_of(pthread_cond_wait(CONDITION(condition), MUTEX(mutex)));
}
int mac_pthread_cond_timedwait(MacPthread* condition, MacPthread* mutex,
                               const struct timespec* until) {
  return mac_errno_of(
      pthread_cond_timedwait(CONDITION(condition), MUTEX(mutex), until));
}
int mac_pthread_cond_signal(MacPthread* condition) {
  return pthread_cond_signal(CONDITION(condition));
}
int mac_pthread_cond_broadcast(MacPthread* condition) {
  return pthread_cond_broadcast(CONDITION(condition));
}
static void end_condition(void* condition) { pthread_cond_destroy(condition); }
int mac_pthread_cond_destroy(MacPthread* condition) {
  return destroy(condition, end_condition);
}
int mac_pthread_rwlock_rdlock(MacPthread* lock) {
  return mac_errno_of(pthread_rwlock_rdlock(LOCK(lock)));
}
int mac_pthread_rwlock_wrlock(MacPthread* lock) {
  return mac_errno_of(pthread_rwlock_wrlock(LOCK(lock)));
}
int mac_pthread_rwlock_unlock(MacPthread* lock) {
  return mac_errno_of(pthread_rwlock_unlock(LOCK(lock)));
}

int mac_pthread_create(pthread_t* thread, const void* attributes,
                       void* (*start)(void*), void* argument) {
  if (attributes != NULL) refuse(NULL, "pthread_create with attributes");
  return mac_errno_of(pthread_create(thread, NULL, start, argument));
}
int mac_pthread_key_create(unsigned long* key, void (*end)(void*)) {
  pthread_key_t made = 0;
  int status = mac_errno_of(pthread_key_create(&made, end));
  *key = made;
  return status;
}
int mac_pthread_threadid_np(pthread_t thread, uint64_t* id) {
  if (thread != 0 && thread != pthread_self())
    refuse(NULL, "pthread_threadid_np of another thread");
  *id = (uint64_t)gettid();
  return 0;
}
unsigned mac_pthread_mach_thread_np(pthread_t thread) {
  (void)thread;
  return (unsigned)gettid();
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

// A futex has 32 bits: of a wider value the lower half is waited for, and the
// wait ends after 10 ms, so that a change of the upper half is seen. May end
// too early, as on macOS.
int mac___ulock_wait(uint32_t operation, void* address, uint64_t value,
                     uint32_t timeout_us) {
  bool wide = (operation & 0xff) == kUlock64;
  if (!wide && (operation & 0xff) != kUlock32)
    refuse(NULL, "__ulock_wait with the operation %#x", operation);
  if (wide && *(volatile uint64_t*)address != value) return 0;
  uint64_t limit = wide ? 10000 : timeout_us ? timeout_us : UINT32_MAX;
  if (timeout_us && timeout_us < limit) limit = timeout_us;
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
