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

// A number on macOS and on Linux: `static const Pair kX[] = {LIST(PAIR)};` of a
// list in mac_abi.h.
typedef struct {
  int mac, own;
} Pair;
#define PAIR(name, value) {value, name},
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

// Functions of vectors in shims_math.c, of one argument and of two.
// clang-format off
#define SIMD_ONE(X)                                                           \
  X(acos) X(acosh) X(asin) X(asinh) X(atan) X(atanh) X(cosh) X(expm1) X(log)  \
  X(log10) X(log1p) X(log2) X(sinh) X(tan) X(tanh)
#define SIMD_TWO(X) X(atan2) X(pow) X(remainder)
// clang-format on

int mac_errno_of(int number);  // Linux's number as macOS's
