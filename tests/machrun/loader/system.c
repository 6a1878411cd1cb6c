// The list of all that libSystem and Python have for the images: an import that
// is not on it does not load. To add a name, look up its ABI on both
// systems; test_imports.py reports names that no image imports.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "shims.h"

// clang-format off
// Have an ABI of their own: a function or object mac_NAME of this loader.
#define SHIMS(X)                                                              \
  /* text */                                                                  \
  X(printf) X(fprintf) X(snprintf) X(snprintf_l) X(asprintf_l) X(sscanf)      \
  X(swprintf) X(vfprintf) X(vsnprintf) X(newlocale) X(setlocale)              \
  X(localeconv)                                                               \
  X(_DefaultRuneLocale) X(__maskrune)                                         \
  /* threads */                                                               \
  X(pthread_mutexattr_init) X(pthread_mutexattr_settype)                      \
  X(pthread_mutex_init) X(pthread_mutex_lock) X(pthread_mutex_trylock)        \
  X(pthread_mutex_unlock) X(pthread_cond_wait) X(pthread_cond_timedwait)      \
  X(pthread_cond_signal) X(pthread_cond_broadcast) X(pthread_rwlock_rdlock)   \
  X(pthread_rwlock_wrlock) X(pthread_rwlock_unlock) X(pthread_create)         \
  X(pthread_key_create) X(pthread_threadid_np) X(dispatch_once_f)             \
  X(pthread_join)                                                             \
  X(__ulock_wait) X(__ulock_wake)                                             \
  /* signals */                                                               \
  X(sigaction) X(sigaltstack) X(raise) X(sigsetjmp) X(siglongjmp)             \
  /* the system */                                                            \
  X(__error) X(strerror_r) X(__assert_rtn) X(open) X(fcntl) X(stat) X(lstat)  \
  X(fstat) X(statvfs) X(readdir) X(vm_page_size) X(__stack_chk_guard)         \
  X(__stdinp) X(__stdoutp) X(__stderrp) X(mmap) X(memset_pattern16)           \
  X(realloc) X(aligned_alloc) X(lseek)                                        \
  X(clock_gettime) X(sysconf) X(sysctlbyname) X(uname) X(proc_pid_rusage)     \
  X(_availability_version_check) X(_dyld_find_unwind_sections)                \
  X(__chkstk_darwin) X(_tlv_atexit) X(dladdr) X(dlopen) X(dlsym) X(dlerror) X(dlclose)           \
  /* sockets */                                                               \
  X(socket) X(bind) X(connect) X(accept) X(setsockopt) X(send) X(recv)        \
  X(getaddrinfo)                                                              \
  /* mathematics */                                                           \
  X(__sincos_stret) X(__sincosf_stret) X(__fmaxf16) X(__fminf16)
#define PYTHON(X)                                                             \
  X(PyErr_Format) X(PyErr_FormatV) X(PyUnicode_FromFormat) X(Py_BuildValue)   \
  X(PyErr_WarnFormat) X(PyTuple_Pack) X(PyObject_CallMethod)                  \
  X(PyErr_FormatUnraisable)
// Of parts of libc++ that nothing under test reaches: a call ends the process,
// and names the function.
#define ABSENT(X)                                                             \
  X(copyfile_state_alloc) X(copyfile_state_free) X(fcopyfile) X(fchmodat)     \
  X(unlinkat) X(utimensat) X(openat)
// clang-format on

// The same on both systems: numbers, pointers, and structures of the same
// layout (timespec, tm, div_t), no flags but access modes and the first three
// of SEEK_….
static const char kPassThrough[] =
    // memory and strings
    " malloc calloc free posix_memalign bzero memchr"
    " memcmp memcpy memmove memset strchr strcmp strdup strlen strncmp strnlen"
    " strrchr strstr wcslen wmemchr wmemcmp atoi strtod strtof strtol strtoul"
    " strtoll strtoull wcstod wcstof wcstol wcstoul wcstoll wcstoull"
    " div ldiv catopen catgets catclose"
    // files; FILE is only passed around
    " fopen fclose fread fwrite fgets fputs fputc fputwc getc getwc ungetc"
    " ungetwc fseek fseeko ftell ftello rewind fflush fileno setbuf putchar"
    " puts popen pclose read write pread close dup2 pipe ftruncate"
    " truncate unlink rename remove link symlink readlink mkdir chdir getcwd"
    " isatty fchmod opendir fdopendir closedir munmap listen shutdown"
    // the process
    " abort _exit getenv getpid system arc4random nanosleep usleep pthread_self"
    " pthread_setspecific pthread_getspecific pthread_detach"
    " __cxa_atexit __stack_chk_fail"
    // mathematics
    " acos acosf acosh acoshf asin asinf asinh asinhf atan atan2 atan2f atanf"
    " atanh atanhf cosf cosh coshf exp exp2 expf expm1 expm1f fmod fmodf hypotf"
    " log log10 log10f log1p log1pf log2 log2f logf nextafterf pow powf"
    " remainder remainderf sin sinf sinh sinhf tan tanf tanh tanhf ";

// The same as a function of Linux, or as a shim, with another name. An argument
// more, as the locale at the end, changes nothing on arm64; long double is a
// double on macOS; what is bound or made by the loader is never called.
static const char kAliases[] =
    " strtod_l=strtod strtof_l=strtof strtold=strtod strtold_l=strtod"
    " wcstold=wcstod strcoll_l=strcmp strxfrm_l=strxfrm wcscoll_l=wcscmp"
    " wcsxfrm_l=wcsxfrm strftime_l=strftime localeconv_l=localeconv"
    " btowc_l=btowc wctob_l=wctob mbrlen_l=mbrlen mbrtowc_l=mbrtowc"
    " mbtowc_l=mbtowc wcrtomb_l=wcrtomb mbsnrtowcs_l=mbsnrtowcs"
    " mbsrtowcs_l=mbsrtowcs wcsnrtombs_l=wcsnrtombs"
    " ___mb_cur_max_l=__ctype_get_mb_cur_max __maskrune_l=__maskrune"
    " __tolower=tolower __toupper=toupper ___tolower_l=tolower"
    " ___toupper_l=toupper realpath$DARWIN_EXTSN=realpath __exp10=exp10"
    " freelocale=nothing pthread_mutexattr_destroy=nothing"
    " _dyld_register_func_for_remove_image=nothing"
    " pthread_mutex_destroy=pthread_destroy pthread_cond_destroy=pthread_destroy"
    " pthread_mach_thread_np=gettid freeaddrinfo=free _tlv_bootstrap=abort"
    " dyld_stub_binder=abort ";
#define HELPERS(X) X(nothing) X(pthread_destroy)

// Variadic, or with a va_list: what begins so and has no shim does not pass.
static const char kPythonRefused[] =
    "PyArg_ _PyArg_ PyBytes_FromFormat PyErr_ResourceWarning PyErr_WarnExplicitF"
    " PyEval_Call PyOS_snprintf PyOS_vsnprintf PyObject_Call _PyObject_Call"
    " PySys_ PyUnicode_FromFormatV Py_VaBuildValue _Py_VaBuild _Py_BuildValue"
    " _PyErr_FormatFromCause _PyErr_TrySetFromCause PyOS_setsig PyOS_getsig ";

#define ABSENT_SHIM(name)                                                   \
  _Noreturn void mac_##name(void) {                                         \
    refuse(NULL, #name " is called, and nobody has written it");            \
  }
ABSENT(ABSENT_SHIM)
#define DECLARE(name) extern char mac_##name[];
#define DECLARE_SIMD(name) DECLARE(_simd_##name##_d2) DECLARE(_simd_##name##_f4)
SHIMS(DECLARE)
PYTHON(DECLARE)
HELPERS(DECLARE)
SIMD_ONE(DECLARE_SIMD)
SIMD_TWO(DECLARE_SIMD)
extern char __udivti3[], __divti3[], __mulsc3[];

typedef struct {
  const char* name;
  void* address;
} Shim;
#define ENTRY(name) {#name, mac_##name},
#define ENTRY_SIMD(name) ENTRY(_simd_##name##_d2) ENTRY(_simd_##name##_f4)
static const Shim kShims[] = {
    SHIMS(ENTRY) ABSENT(ENTRY) SIMD_ONE(ENTRY_SIMD) SIMD_TWO(ENTRY_SIMD)
    // the compiler's own, the same everywhere
    {"__udivti3", __udivti3}, {"__divti3", __divti3}, {"__mulsc3", __mulsc3},
};
static const Shim kHelpers[] = {HELPERS(ENTRY)};
static const Shim kPythonShims[] = {PYTHON(ENTRY)};

static void* shim(const Shim* list, size_t count, const char* name) {
  for (size_t i = 0; i < count; i++)
    if (!strcmp(list[i].name, name)) return list[i].address;
  return NULL;
}

// What stands in a list behind ` NAME` and `end`; NULL if it is not there.
static const char* in_list(const char* list, const char* name, char end) {
  char word[128];
  int size = snprintf(word, sizeof word, " %s%c", name, end);
  const char* found = size < (int)sizeof word ? strstr(list, word) : NULL;
  return found ? found + size : NULL;
}

void* in_system(const char* name) {
  char target[128];
  // Without the underscore of C; the old stub binder has none.
  if (name[0] == '_') name++;
  const char* other = in_list(kAliases, name, '=');
  if (other != NULL) {
    snprintf(target, sizeof target, "%.*s", (int)strcspn(other, " "), other);
    name = target;
  }
  void* found = shim(kShims, COUNT(kShims), name);
  if (found == NULL && other != NULL)
    found = shim(kHelpers, COUNT(kHelpers), name);
  if (found == NULL && (other != NULL || in_list(kPassThrough, name, ' ')))
    found = dlsym(RTLD_DEFAULT, name);
  return found;
}

void* in_python(const char* name) {
  if (name[0] != '_') return NULL;
  name++;
  if (!has_prefix(name, "Py _Py ")) return NULL;
  void* found = shim(kPythonShims, COUNT(kPythonShims), name);
  if (found != NULL || has_prefix(name, kPythonRefused)) return found;
  return dlsym(RTLD_DEFAULT, name);
}

int print_imports(void) {
  for (size_t i = 0; i < COUNT(kShims); i++)
    printf("shim %s\n", kShims[i].name);
  for (size_t i = 0; i < COUNT(kPythonShims); i++)
    printf("python %s\n", kPythonShims[i].name);
  printf("pass%s\nalias%s\nrefused %s\n", kPassThrough, kAliases,
         kPythonRefused);
  return 0;
}
