// Numbers and flags by table, and errno.
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "shims.h"

int to_own(const Pair* table, size_t count, int value, int otherwise) {
  for (size_t i = 0; i < count; i++)
    if (table[i].mac == value) return table[i].own;
  return otherwise;
}
int to_mac(const Pair* table, size_t count, int value, int otherwise) {
  for (size_t i = 0; i < count; i++)
    if (table[i].own == value) return table[i].mac;
  return otherwise;
}
int flags_to_own(const Pair* table, size_t count, int flags, const char* what) {
  int result = 0;
  for (size_t i = 0; i < count; i++) {
    if (flags & table[i].mac) result |= table[i].own;
    flags &= ~table[i].mac;
  }
  if (flags) refuse(NULL, "%s with the unknown flags %#x", what, flags);
  return result;
}
int flags_to_mac(const Pair* table, size_t count, int flags) {
  int result = 0;
  for (size_t i = 0; i < count; i++)
    if ((flags & table[i].own) == table[i].own) result |= table[i].mac;
  return result;
}

static const Pair kErrno[] = {{0, 0}, ERRNO_PAIRS};

// What only Linux has becomes EIO, and not another error that has its number.
int to_mac_errno(int number) { return TO_MAC(kErrno, number, apple_EIO); }

// What Linux's functions have left is taken over whenever somebody looks; what
// the images write stays until then.
int* mac___error(void) {
  static __thread int number;
  if (errno != 0) number = to_mac_errno(errno);
  errno = 0;
  return &number;
}
int mac_strerror_r(int number, char* to, size_t size) {
  int own = TO_OWN(kErrno, number, -1);
  if (own < 0) {
    snprintf(to, size, "Unknown error: %d", number);
    return EINVAL;
  }
  const char* text = strerror(own);
  return snprintf(to, size, "%s", text) < (int)size ? 0 : ERANGE;
}
