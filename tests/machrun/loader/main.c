// machrun --python ARGUMENT… | --imports | FILE… [-- FUNCTION ARGUMENT…]
//
// Loads Mach-O files, or runs a Python in which machpy.py can. MACHRUN_MACOS is
// the version of macOS that is pretended, MACHRUN_PYTHON the name of libpython.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machrun.h"

// For machpy.py, which reaches them by ctypes.
__attribute__((visibility("default"))) void* machrun_load(const char* path) {
  return load_image(path, NULL, false);
}
__attribute__((visibility("default"))) void* machrun_symbol(const Image* image,
                                                            const char* name) {
  return exported(image, name, NULL);
}
__attribute__((visibility("default"))) void* machrun_any(const char* name) {
  return in_all(name);
}

uint32_t g_pretends;
// For refuse().
static const Image kEnvironment = {.path = "environment"},
                   kCommand = {.path = "command"};

static void read_settings(void) {
  const char* version = getenv("MACHRUN_MACOS");
  unsigned major = 14, minor = 0;
  char same[32];
  if (version != NULL) {
    sscanf(version, "%u.%u", &major, &minor);
    snprintf(same, sizeof same, "%u.%u", major, minor);
    if (strcmp(version, same) || major > 255 || minor > 255)
      refuse(&kEnvironment, "MACHRUN_MACOS=%s is not a version as 14.0",
             version);
  }
  g_pretends = major << 16 | minor << 8;
}

// The library of the sysroot, in which extension modules find Python's C API.
static void open_python(void) {
  const char* name = getenv("MACHRUN_PYTHON");
  if (name != NULL && *name != '\0' &&
      dlopen(name, RTLD_NOW | RTLD_GLOBAL) == NULL)
    refuse(&kEnvironment, "MACHRUN_PYTHON=%s: %s", name, dlerror());
}

static int run(int count, char** arguments) {
  if (count > 1 && !strcmp(arguments[1], "--imports")) return print_imports();
  if (count > 1 && !strcmp(arguments[1], "--python")) {
    int (*run_python)(int, char**) = dlsym(RTLD_DEFAULT, "Py_BytesMain");
    if (run_python == NULL) refuse(&kEnvironment, "MACHRUN_PYTHON names no Python");
    return run_python(count - 1, arguments + 1);
  }
  Image* image = NULL;
  int at = 1;
  for (; at < count && strcmp(arguments[at], "--"); at++)
    image = load_image(arguments[at], NULL, false);
  if (image == NULL) refuse(&kCommand, "neither --python nor a FILE to load");
  if (at == count) return 0;
  if (at + 1 == count) refuse(&kCommand, "-- without the name of a function");
  char name[1024];
  if (snprintf(name, sizeof name, "_%s", arguments[at + 1]) >= (int)sizeof name)
    refuse(&kCommand, "a function with a name of %zu", strlen(arguments[at + 1]));
  int (*function)(int, char**) = exported(image, name, NULL);
  if (function == NULL) refuse(image, "it has no %s", name);
  if (!is_code(image, (void*)function)) refuse(image, "%s is no function", name);
  return function(count - at - 1, arguments + at + 1);
}

int main(int count, char** arguments) {
  read_settings();
  setvbuf(stdout, NULL, _IOLBF, 0);
  open_python();
  int status = run(count, arguments);
  if (fflush(stdout) != 0 || ferror(stdout))
    refuse(&kCommand, "its output cannot be written");
  return status;
}
