// Preloaded into a CPython that is a program and no library: starts this loader
// in place of its main(). What it lacks of its start is here, by Python's C API.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <wchar.h>

#include "machrun.h"

extern int main(int count, char** arguments);

typedef int (*Main)(int, char**);
typedef int (*Start)(Main, int, char**, void*, void*, void*, void*);

int __libc_start_main(Main program, int count, char** arguments, void* init,
                      void* fini, void* end_of_loader, void* stack) {
  (void)program;
  Start start = (Start)dlsym(RTLD_NEXT, "__libc_start_main");
  unsetenv("LD_PRELOAD");  // for this process alone
  return start(main, count, arguments, init, fini, end_of_loader, stack);
}

// <pylifecycle.h>, <sysmodule.h>, <pythonrun.h>
extern __attribute__((weak)) void Py_Initialize(void);
extern __attribute__((weak)) int Py_FinalizeEx(void);
extern __attribute__((weak)) wchar_t* Py_DecodeLocale(const char*, size_t*);
extern __attribute__((weak)) void PySys_SetArgvEx(int, wchar_t**, int);
extern __attribute__((weak)) int PyRun_SimpleStringFlags(const char*, void*);
extern __attribute__((weak)) int PyRun_SimpleFileExFlags(FILE*, const char*,
                                                         int, void*);

// PROGRAM -c CODE ARGUMENT…, or PROGRAM FILE ARGUMENT…
int Py_BytesMain(int count, char** arguments) {
  bool code = count > 2 && !strcmp(arguments[1], "-c");
  FILE* file = count > 1 && !code ? fopen(arguments[1], "rb") : NULL;
  struct stat found;
  if (file != NULL && (fstat(fileno(file), &found) || !S_ISREG(found.st_mode)))
    file = NULL;
  static const Image kCommand = {.path = "command"};
  if (!code && file == NULL) refuse(&kCommand, "neither -c CODE nor a FILE to run");
  Py_Initialize();
  int first = code ? 2 : 1;
  wchar_t** words = calloc((size_t)count, sizeof *words);
  for (int i = first; i < count; i++)
    words[i] = Py_DecodeLocale(code && i == first ? "-c" : arguments[i], NULL);
  PySys_SetArgvEx(count - first, words + first, 1);
  int status = code ? PyRun_SimpleStringFlags(arguments[2], NULL)
                    : PyRun_SimpleFileExFlags(file, arguments[1], 1, NULL);
  return Py_FinalizeEx() < 0 || status < 0 ? 1 : 0;
}
