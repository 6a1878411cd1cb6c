// The control interface of the simulated Metal (libmetalsim.so).
//
// Everything here is plain C so that a test can reach it through dlsym. The
// Objective-C runtime names that the library also exports (objc_msgSend and
// so on) have the types of Apple's headers and are not repeated here.
//
// Unless said otherwise a function may be called from any thread at any time;
// a setting applies to buffers that are committed after it was made.
#ifndef METALSIM_H_
#define METALSIM_H_

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define METALSIM_API __attribute__((visibility("default")))

// ---- life of the simulation ------------------------------------------------

// Waits (at most 100 s) until nothing is in flight. Then it puts every setting,
// plan, counter, the ban of code 4 and every removed selector back to the
// state after loading. Waits that the GPU is stuck in are abandoned and fail
// their buffer with code 2. Method implementations that a hook has replaced
// are left alone: taking them out is the hook's duty. Returns 0, or -1 if
// something was still in flight after 100 s (the settings are reset anyway).
METALSIM_API int metalsim_reset(void);

// 1 as soon as no committed buffer is unfinished (its handlers have run and
// it was let go), 0 after timeout_ms.
METALSIM_API int metalsim_wait_idle(uint64_t timeout_ms);

// ---- fault plan ------------------------------------------------------------

// A plan counts committed buffers from the moment it is added, the first one
// being number 1. Buffer number `nth` fails, and so do the `count - 1` after
// it, or all after it if `persistent`.
typedef struct metalsim_plan {
  uint64_t nth;               // 1-based; 0 never fails
  int32_t code;               // the IOGPU code: 2..0x11, or any other number
  int32_t persistent;         // 1: every counted buffer from nth on
  uint64_t count;             // how many fail in a row; 0 means 1
  const void* queue;          // count only this queue's buffers; NULL: all
  uint32_t after_commands;    // so many commands (dispatches, signals, waits)
                              // still take effect before the buffer fails
  uint32_t handler_delay_us;  // the handlers of a failed buffer come so late
  uint32_t gpu_delay_us;      // and it occupies the GPU so much longer
  uint32_t error_shape;       // METALSIM_ERROR_…, or-ed; 0: as Metal makes it
  int64_t error_number;       // code of the underlying error; 0: as `code`
  const char* error_text;     // the description, not copied; NULL: Metal's
} metalsim_plan;

// What a failed buffer's error lacks, or has instead.
#define METALSIM_ERROR_NIL 1                 // `error` itself
#define METALSIM_ERROR_NO_DESCRIPTION 2      // localizedDescription is nil
#define METALSIM_ERROR_NO_USER_INFO 4        // userInfo is nil
#define METALSIM_ERROR_USER_INFO_STRING 8    // or no dictionary
#define METALSIM_ERROR_NO_UNDERLYING 16      // NSUnderlyingErrorKey: nothing
#define METALSIM_ERROR_UNDERLYING_STRING 32  // or no error

// Up to 64 plans live side by side; the first that applies decides. Returns
// the plan's number, or -1 if there is no room.
METALSIM_API int metalsim_plan_add(const metalsim_plan* plan);
METALSIM_API void metalsim_plan_clear(void);

// Short for: clear, then add a plan over the whole process.
METALSIM_API void metalsim_plan_fail(uint64_t nth, int code, int persistent,
                                     uint32_t handler_delay_us);

// How many buffers that the calling thread has committed were planned to fail.
METALSIM_API uint64_t metalsim_plan_struck_here(void);

// ---- time ------------------------------------------------------------------

// Every buffer's handlers run so long after the GPU is done with it.
METALSIM_API void metalsim_set_handler_delay_us(uint32_t us);
// Every buffer occupies the GPU so much longer.
METALSIM_API void metalsim_set_gpu_delay_us(uint32_t us);
// Making a pipeline takes so long, as its compilation does.
METALSIM_API void metalsim_set_pipeline_delay_us(uint32_t us);
// 1: no handler runs until this is called with 0.
METALSIM_API void metalsim_hold_handlers(int hold);
// 1: late handlers of one queue do not hold up those of another.
METALSIM_API void metalsim_set_completion_by_queue(int by_queue);
// Random extra delays, uniform in 0..max, reproducible per seed and commit
// order. seed 0 turns it off.
METALSIM_API void metalsim_set_random_delays(uint64_t seed, uint32_t max_gpu_us,
                                             uint32_t max_handler_us);
// A GPU-side wait longer than this fails its buffer with code 2; 0: never.
METALSIM_API void metalsim_set_gpu_wait_limit_us(uint64_t us);
// 1: nothing sleeps, every delay above counts as zero.
METALSIM_API void metalsim_set_fast(int fast);
// 1: commit executes the buffer and runs its handlers on the calling thread.
// Switch only while idle. A wait that is not yet satisfied blocks the caller.
METALSIM_API void metalsim_set_inline(int run_inline);

// ---- memory ----------------------------------------------------------------

#define METALSIM_MEMORY_OFF 0         // never out of memory
#define METALSIM_MEMORY_PROCESS 1     // all live buffers count
#define METALSIM_MEMORY_REFERENCED 2  // those a command buffer uses count

// recommended: what recommendedMaxWorkingSetSize answers. A command buffer
// that runs while more than `ceiling` bytes count fails with code 8; ceiling
// 0 means the recommended size.
METALSIM_API void metalsim_set_memory(int mode, uint64_t recommended,
                                      uint64_t ceiling);
METALSIM_API uint64_t metalsim_resident_bytes(void);

// ---- shape of the framework ------------------------------------------------

// 1: MTLCreateSystemDefaultDevice returns nil.
METALSIM_API void metalsim_set_no_device(int no_device);

// Takes a selector out of every class, as if this system did not have it.
// Call it before the selector is used. Returns how many methods went.
METALSIM_API int metalsim_remove_selector(const char* name);

// Queues created from now on belong to this family: 0 (AGXG16X…, whose
// commit calls super) or 1 (AGXG17X…, whose commit is its own). Its classes
// are registered at their first use, as drivers load lazily.
METALSIM_API void metalsim_set_family(int family);

// 1: Metal's classes have no superclass beyond their own, so that the one which
// owns a method may be a root. For class_getSuperclass only.
METALSIM_API void metalsim_set_rootless(int rootless);

// Layers that queues and devices put around what they return from now on.
// Every call on a wrapper is forwarded by objc_msgSend to the `baseObject`.
#define METALSIM_DEBUG_BUFFERS 1  // MTLDebugCommandBuffer
#define METALSIM_DEBUG_EVENTS 2   // MTLDebugSharedEvent
METALSIM_API void metalsim_set_debug_layer(int layers);

// ---- what happened ---------------------------------------------------------

typedef struct metalsim_totals {
  uint64_t buffers_created, buffers_committed, buffers_completed;
  uint64_t buffers_failed;
  uint64_t handlers_added, handlers_called, handlers_released;
  uint64_t handlers_dropped;  // released uncalled: the buffer died uncommitted
  uint64_t order_violations;  // a buffer of a queue overtook another
  uint64_t signals_encoded, signals_done, signals_withheld;
  uint64_t waits_encoded, waits_done, waits_skipped;
  uint64_t kernels_run, kernels_skipped;
  uint64_t blocks_copied, blocks_disposed;
} metalsim_totals;

METALSIM_API void metalsim_get_totals(metalsim_totals* out);

typedef struct metalsim_record {
  uint64_t serial;      // commit number in this process, from 1
  const void* buffer;   // its address; may since have been reused
  const void* queue;    // likewise
  uint64_t queue_turn;  // commit number on its queue, from 1
  int32_t status;       // 4 completed, 5 error
  int32_t code;         // the IOGPU code, 0 without an error
  uint32_t handlers_added, handlers_called, handlers_released;
  uint32_t order_violations;
  uint32_t signals_done, signals_withheld;
  uint32_t waits_done, waits_skipped;
} metalsim_record;

// Keeps the last `capacity` finished buffers; 0 (the default) keeps none.
METALSIM_API void metalsim_set_detailed_log(uint32_t capacity);
// Copies up to max records, oldest first, and returns how many.
METALSIM_API uint32_t metalsim_read_log(metalsim_record* out, uint32_t max);

// Live instances of the class of that name and of its subclasses. Blocks on
// the heap count as "__NSMallocBlock__".
METALSIM_API int64_t metalsim_live_objects(const char* class_name);

// Methods whose implementation is not the original one, or that were added:
// 0 once a hook has taken itself out (added ones can only be neutralised).
METALSIM_API uint32_t metalsim_modified_methods(void);

// From now on appends a line for each message that is sent through
// objc_msgSend, and so from outside, to the file: THREAD CLASS SELECTOR. THREAD
// is "handlers" on the thread that runs completion handlers, and otherwise a
// number, given as the threads come, from 1. NULL: no more. -1: not opened.
METALSIM_API int metalsim_trace(const char* path);

#if defined(__cplusplus)
}  // extern "C"
#endif

#endif  // METALSIM_H_
