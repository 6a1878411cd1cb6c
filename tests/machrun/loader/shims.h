// What the shims share. The shim of libSystem's or Python's `name` is mac_name,
// and has the ABI of macOS: system.c finds it by that.
#pragma once

#include <stdarg.h>
#include <stdio.h>

#include "apple.h"
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

// apple.h is made of Apple's headers (setup/native.py): apple_NAME is macOS's
// NAME, of numbers as of structures. A number there and on Linux:
typedef struct {
  int mac, own;
} Pair;
#define PAIR(name) {apple_##name, name}
#define COUNT(array) (sizeof(array) / sizeof *(array))

// shims_translate.c: `otherwise` for what is not in the table.
int to_own(const Pair* table, size_t count, int value, int otherwise);
int to_mac(const Pair* table, size_t count, int value, int otherwise);
// Ends the process where a flag is not in the table, naming `what`.
int flags_to_own(const Pair* table, size_t count, int flags, const char* what);
// Leaves out what macOS has not.
int flags_to_mac(const Pair* table, size_t count, int flags);
#define TO_OWN(table, ...) to_own(table, COUNT(table), __VA_ARGS__)
#define TO_MAC(table, ...) to_mac(table, COUNT(table), __VA_ARGS__)
#define FLAGS_TO_OWN(table, ...) flags_to_own(table, COUNT(table), __VA_ARGS__)
#define FLAGS_TO_MAC(table, ...) flags_to_mac(table, COUNT(table), __VA_ARGS__)

int to_mac_errno(int number);  // Linux's number as macOS's
