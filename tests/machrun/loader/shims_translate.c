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

// Below 35 the others are the same.
static const Pair kErrno[] = {
    PAIR(EDEADLK), PAIR(EAGAIN), PAIR(EINPROGRESS), PAIR(EALREADY),
    PAIR(ENOTSOCK), PAIR(EDESTADDRREQ), PAIR(EMSGSIZE), PAIR(EPROTOTYPE),
    PAIR(ENOPROTOOPT), PAIR(EPROTONOSUPPORT), PAIR(ESOCKTNOSUPPORT),
    PAIR(ENOTSUP), PAIR(EPFNOSUPPORT), PAIR(EAFNOSUPPORT), PAIR(EADDRINUSE),
    PAIR(EADDRNOTAVAIL), PAIR(ENETDOWN), PAIR(ENETUNREACH), PAIR(ENETRESET),
    PAIR(ECONNABORTED), PAIR(ECONNRESET), PAIR(ENOBUFS), PAIR(EISCONN),
    PAIR(ENOTCONN), PAIR(ESHUTDOWN), PAIR(ETOOMANYREFS), PAIR(ETIMEDOUT),
    PAIR(ECONNREFUSED), PAIR(ELOOP), PAIR(ENAMETOOLONG), PAIR(EHOSTDOWN),
    PAIR(EHOSTUNREACH), PAIR(ENOTEMPTY), PAIR(EUSERS), PAIR(EDQUOT),
    PAIR(ESTALE), PAIR(EREMOTE), PAIR(ENOLCK), PAIR(ENOSYS), PAIR(EOVERFLOW),
    PAIR(ECANCELED), PAIR(EIDRM), PAIR(ENOMSG), PAIR(EILSEQ), PAIR(EBADMSG),
    PAIR(EMULTIHOP), PAIR(ENODATA), PAIR(ENOLINK), PAIR(ENOSR), PAIR(ENOSTR),
    PAIR(EPROTO), PAIR(ETIME), PAIR(ENOTRECOVERABLE), PAIR(EOWNERDEAD)};

// What only Linux has becomes EIO, and not another error that has its number.
int to_mac_errno(int number) {
  return TO_MAC(kErrno, number, number < 35 ? number : EIO);
}

// What Linux's functions have left is taken over whenever somebody looks; what
// the images write stays until then.
int* mac___error(void) {
  static __thread int number;
  if (errno != 0) number = to_mac_errno(errno);
  errno = 0;
  return &number;
}
int mac_strerror_r(int number, char* to, size_t size) {
  // Below 35 and not in the table they are the same, but for EDEADLK's.
  int own = TO_OWN(kErrno, number, number < 35 ? number : -1);
  if (own < 0) {
    snprintf(to, size, "Unknown error: %d", number);
    return EINVAL;
  }
  const char* text = strerror(own);
  return snprintf(to, size, "%s", text) < (int)size ? 0 : ERANGE;
}
