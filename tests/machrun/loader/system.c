// The list of all that libSystem and Python have for the images: an import that
// is not on it does not load. Whoever adds a name looks up its ABI on both
// systems.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "machrun.h"

// Has an ABI of its own: a function or object mac_NAME of this loader.
// clang-format off
#define SHIMS(X)                                                              \
  /* text */                                                                  \
  X(printf) X(fprintf) X(snprintf) X(snprintf_l) X(asprintf_l) X(sscanf)      \
  X(swprintf) X(vfprintf) X(vsnprintf) X(newlocale) X(freelocale)             \
  X(setlocale) X(localeconv_l) X(___mb_cur_max_l) X(strtod_l) X(strtof_l)     \
  X(wcstold) X(strcoll_l) X(strxfrm_l) X(wcscoll_l) X(wcsxfrm_l)              \
  X(strftime_l) X(btowc_l) X(wctob_l) X(mbrlen_l) X(mbrtowc_l) X(mbtowc_l)    \
  X(wcrtomb_l) X(mbsnrtowcs_l) X(mbsrtowcs_l) X(wcsnrtombs_l)                 \
  X(_DefaultRuneLocale) X(__maskrune) X(__maskrune_l) X(__tolower)            \
  X(__toupper) X(___tolower_l) X(___toupper_l) X(catopen) X(catgets)          \
  X(catclose)                                                                 \
  /* threads */                                                               \
  X(pthread_mutexattr_init) X(pthread_mutexattr_settype)                      \
  X(pthread_mutexattr_destroy) X(pthread_mutex_init) X(pthread_mutex_lock)    \
  X(pthread_mutex_trylock) X(pthread_mutex_unlock) X(pthread_mutex_destroy)   \
  X(pthread_cond_wait) X(pthread_cond_timedwait) X(pthread_cond_signal)       \
  X(pthread_cond_broadcast) X(pthread_cond_destroy) X(pthread_rwlock_rdlock)  \
  X(pthread_rwlock_wrlock) X(pthread_rwlock_unlock) X(pthread_create)         \
  X(pthread_key_create) X(pthread_threadid_np) X(pthread_mach_thread_np)      \
  X(dispatch_once_f) X(__ulock_wait) X(__ulock_wake)                          \
  /* signals */                                                               \
  X(sigaction) X(sigaltstack) X(raise) X(sigsetjmp) X(siglongjmp)             \
  /* the system */                                                            \
  X(__error) X(strerror_r) X(__assert_rtn) X(open) X(openat) X(fcntl)         \
  X(stat) X(lstat) X(fstat) X(statvfs) X(readdir) X(utimensat) X(fchmodat)    \
  X(unlinkat) X(copyfile_state_alloc) X(copyfile_state_free) X(fcopyfile)     \
  X(vm_page_size) X(__stack_chk_guard) X(__stack_chk_fail) X(__stdinp)        \
  X(__stdoutp) X(__stderrp) X(mmap) X(memset_pattern16) X(clock_gettime)      \
  X(sysconf) X(sysctlbyname) X(uname) X(proc_pid_rusage)                      \
  X(_availability_version_check) X(_dyld_find_unwind_sections)                \
  X(_dyld_register_func_for_remove_image) X(__cxa_atexit) X(_tlv_bootstrap)   \
  X(__chkstk_darwin) X(dyld_stub_binder) X(dladdr) X(dlopen) X(dlsym)         \
  X(dlerror) X(dlclose)                                                       \
  /* sockets */                                                               \
  X(socket) X(bind) X(connect) X(accept) X(setsockopt) X(send) X(recv)        \
  X(getaddrinfo) X(freeaddrinfo)                                              \
  /* mathematics */                                                           \
  X(__sincos_stret) X(__sincosf_stret) X(__exp10) X(__fmaxf16) X(__fminf16)
#define SIMD(X)                                                               \
  X(acos) X(acosh) X(asin) X(asinh) X(atan) X(atan2) X(atanh) X(cosh)         \
  X(expm1) X(log) X(log10) X(log1p) X(log2) X(pow) X(remainder) X(sinh)       \
  X(tan) X(tanh)
#define PYTHON(X)                                                             \
  X(PyErr_Format) X(PyErr_FormatV) X(PyUnicode_FromFormat)                    \
  X(PyUnicode_FromFormatV) X(Py_BuildValue) X(PyErr_WarnFormat) X(PyTuple_Pack) \
  X(PyObject_CallMethod) X(PyErr_FormatUnraisable)
// clang-format on

// The same on both systems: numbers, pointers, and structures of the same
// layout (timespec, tm, div_t, lconv in "C"), no flags but access modes and
// SEEK_….
static const char kPassThrough[] =
    // memory and strings
    " malloc calloc realloc free posix_memalign aligned_alloc bzero memchr "
    "memcmp"
    " memcpy memmove memset strchr strcmp strdup strlen strncmp strnlen strrchr"
    " strstr wcslen wmemchr wmemcmp atoi strtod strtof strtol strtoul strtoll"
    " strtoull wcstod wcstof wcstol wcstoul wcstoll wcstoull localeconv div "
    "ldiv"
    // files; FILE is only passed around
    " fopen fclose fread fwrite fgets fputs fputc fputwc getc getwc ungetc "
    "ungetwc fseek"
    " fseeko ftell ftello rewind fflush fileno setbuf putchar puts popen pclose"
    " read write pread close dup2 pipe lseek ftruncate truncate unlink rename"
    " remove link symlink readlink mkdir chdir getcwd isatty fchmod opendir"
    " fdopendir closedir munmap listen shutdown"
    // the process
    " abort _exit getenv getpid system arc4random nanosleep usleep sched_yield"
    " pthread_self pthread_setspecific pthread_getspecific pthread_join"
    " pthread_detach"
    // mathematics
    " acos acosf acosh acoshf asin asinf asinh asinhf atan atan2 atan2f atanf "
    "atanh"
    " atanhf cosf cosh coshf exp exp2 expf expm1 expm1f fmod fmodf hypotf log "
    "log10"
    " log10f log1p log1pf log2 log2f logf nextafterf pow powf remainder "
    "remainderf"
    " sin sinf sinh sinhf tan tanf tanh tanhf ";

// Variadic, or with a va_list, and without a shim: these do not pass.
static const char kPythonRefused[] =
    " Py_VaBuildValue PyArg_Parse PyArg_ParseTuple PyArg_ParseTupleAndKeywords"
    " PyArg_UnpackTuple PyArg_VaParse PyArg_VaParseTupleAndKeywords"
    " PyArg_ValidateKeywordArguments PyBytes_FromFormat PyBytes_FromFormatV"
    " PyErr_ResourceWarning PyEval_CallFunction"
    " PyEval_CallMethod PyOS_snprintf PyOS_vsnprintf PyObject_CallFunction"
    " PyObject_CallFunctionObjArgs PyObject_CallMethodObjArgs"
    " PySys_FormatStderr PySys_FormatStdout PySys_WriteStderr PySys_WriteStdout"
    " PyThreadState_SetAsyncExc PyOS_setsig PyOS_getsig "
    "_PyErr_FormatFromCause ";

#define DECLARE(name) extern char mac_##name[];
#define DECLARE_SIMD(name) DECLARE(_simd_##name##_d2) DECLARE(_simd_##name##_f4)
SHIMS(DECLARE)
PYTHON(DECLARE)
SIMD(DECLARE_SIMD)
extern char __udivti3[], __divti3[], __mulsc3[];

typedef struct {
  const char* name;
  void* address;
} Shim;
#define ENTRY(name) {#name, mac_##name},
#define ENTRY_SIMD(name) ENTRY(_simd_##name##_d2) ENTRY(_simd_##name##_f4)
static const Shim kShims[] = {SHIMS(ENTRY)
                                  SIMD(ENTRY_SIMD){"strtold", (void*)0},
                              {"strtold_l", mac_strtod_l},
                              {"realpath$DARWIN_EXTSN", (void*)0},
                              {"_tlv_atexit", tlv_atexit},
                              // the compiler's own, the same everywhere
                              {"__udivti3", __udivti3},
                              {"__divti3", __divti3},
                              {"__mulsc3", __mulsc3}};
static const Shim kPythonShims[] = {PYTHON(ENTRY)};

static void* shim(const Shim* list, size_t count, const char* name) {
  for (size_t i = 0; i < count; i++)
    if (!strcmp(list[i].name, name)) return list[i].address;
  return NULL;
}

static bool is_in(const char* list, const char* name) {
  char word[128] = " ";
  if (strlen(name) > 120) return false;
  strcat(strcat(word, name), " ");
  return strstr(list, word) != NULL;
}

void* in_system(const char* name) {
  // Without the underscore of C; the old stub binder has none.
  if (name[0] == '_') name++;
  // long double is a double there
  if (!strcmp(name, "strtold")) return dlsym(RTLD_DEFAULT, "strtod");
  if (!strcmp(name, "realpath$DARWIN_EXTSN"))
    return dlsym(RTLD_DEFAULT, "realpath");
  void* found = shim(kShims, sizeof kShims / sizeof *kShims, name);
  if (found != NULL) return found;
  return is_in(kPassThrough, name) ? dlsym(RTLD_DEFAULT, name) : NULL;
}

void* in_python(const char* name) {
  if (name[0] != '_') return NULL;
  name++;
  if (strncmp(name, "Py", 2) && strncmp(name, "_Py", 3)) return NULL;
  void* found =
      shim(kPythonShims, sizeof kPythonShims / sizeof *kPythonShims, name);
  if (found != NULL) return found;
  return is_in(kPythonRefused, name) ? NULL : dlsym(RTLD_DEFAULT, name);
}
