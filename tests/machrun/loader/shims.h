// What the shims share. The shim of libSystem's `name` is mac_name and has the
// ABI of macOS; system.c lists all of them.
#pragma once

#include <stdarg.h>
#include <stdio.h>

#include "mac_abi.h"
#include "machrun.h"

// macOS passes variadic arguments on the stack: a thunk hands their address on
// as one more argument behind the `fixed` ones. That address is all that a
// va_list is there.
#define VARIADIC(result, name, fixed, ...)                                   \
  asm(".text\n.globl mac_" #name "\n.p2align 2\nmac_" #name ": mov x" #fixed \
      ", sp\n b variadic_" #name "\n");                                      \
  __attribute__((used, visibility("hidden"))) result variadic_##name(        \
      __VA_ARGS__, void* stack)

// The same arguments as a va_list of aarch64 Linux, whose registers are used
// up.
static inline va_list* linux_list(va_list* list, void* stack) {
  struct {
    void *stack, *general, *vector;
    int general_left, vector_left;
  } parts = {stack, NULL, NULL, 0, 0};
  _Static_assert(sizeof parts == sizeof *list, "a va_list of another kind");
  __builtin_memcpy(list, &parts, sizeof parts);
  return list;
}

// Without the `L` of long double, which is a double on macOS.
const char* linux_format(const char* format, char copy[1024]);

int mac_errno_of(int number);    // Linux's number as macOS's
int linux_errno_of(int number);  // and back
int linux_signal_of(int number);
int mac_signal_of(int number);
