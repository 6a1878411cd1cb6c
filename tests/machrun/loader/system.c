// All that libSystem and Python have for the images: the shims, whose ABI is
// their own, and the lists here. An import that is in neither does not load. To
// add a name, look up its ABI on both systems; test_imports.py reports names
// that no image imports.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "shims.h"

// Of parts of libc++ that nothing under test reaches: a call ends the process,
// and names the function.
#define ABSENT(name)                                             \
  _Noreturn void mac_##name(void) {                              \
    refuse(NULL, #name " is called, and nobody has written it"); \
  }
// clang-format off
ABSENT(copyfile_state_alloc) ABSENT(copyfile_state_free) ABSENT(fcopyfile)
ABSENT(fchmodat) ABSENT(unlinkat) ABSENT(utimensat) ABSENT(openat)
ABSENT(swprintf)
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
// more, as the locale at the end, changes nothing on arm64. Long double is a
// double on macOS. What is bound or made by the loader is never called.
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
    " pthread_mutex_destroy=destroy_pthread"
    " pthread_cond_destroy=destroy_pthread"
    " pthread_mach_thread_np=gettid freeaddrinfo=free _tlv_bootstrap=abort"
    " dyld_stub_binder=abort ";
// Variadic, or with a va_list: what begins so and has no shim does not pass.
static const char kPythonRefused[] =
    "PyArg_ _PyArg_ PyBytes_FromFormat PyErr_ResourceWarning"
    " PyErr_WarnExplicitF"
    " PyEval_Call PyOS_snprintf PyOS_vsnprintf PyObject_Call _PyObject_Call"
    " PySys_ PyUnicode_FromFormatV Py_VaBuildValue _Py_VaBuild _Py_BuildValue"
    " _PyErr_FormatFromCause _PyErr_TrySetFromCause PyOS_setsig PyOS_getsig ";

static void* shim(const char* name) {
  char own[128];
  return snprintf(own, sizeof own, "mac_%s", name) < (int)sizeof own
             ? dlsym(RTLD_DEFAULT, own)
             : NULL;
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
  void* found = shim(name);
  if (found == NULL && (other != NULL || in_list(kPassThrough, name, ' ')))
    found = dlsym(RTLD_DEFAULT, name);
  return found;
}

void* in_python(const char* name) {
  if (name[0] != '_') return NULL;
  name++;
  if (!has_prefix(name, "Py _Py ")) return NULL;
  void* found = shim(name);
  if (found != NULL || has_prefix(name, kPythonRefused)) return found;
  return dlsym(RTLD_DEFAULT, name);
}

int print_imports(void) {
  printf("pass%s\nalias%s\nrefused %s\n", kPassThrough, kAliases,
         kPythonRefused);
  return 0;
}
