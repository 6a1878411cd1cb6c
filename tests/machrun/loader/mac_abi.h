// Structures and numbers of macOS (arm64) that differ from Linux, as the shims
// use them. abi_check.c, compiled for macOS, holds each against Apple's
// headers; `struct timespec` and `struct tm` are the same on both.
#pragma once

#include <stdint.h>
#include <time.h>

typedef struct {
  int32_t dev;
  uint16_t mode, nlink;
  uint64_t ino;
  uint32_t uid, gid;
  int32_t rdev;
  struct timespec atime, mtime, ctime, birthtime;
  int64_t size, blocks;
  int32_t blksize;
  uint32_t flags, gen;
  int32_t spare;
  int64_t more[2];
} MacStat;

typedef struct {
  uint64_t ino, seekoff;
  uint16_t reclen, namlen;
  uint8_t type;
  char name[1024];
} MacDirent;

typedef struct {
  uint64_t bsize, frsize;
  uint32_t blocks, bfree, bavail, files, ffree, favail;
  uint64_t fsid, flag, namemax;
} MacStatvfs;

typedef struct {
  void* handler;
  uint32_t mask;
  int32_t flags;
} MacSigaction;

typedef struct {
  int32_t signo, err, code, pid;
  uint32_t uid;
  int32_t status;
  void* address;
  uint64_t value;
  int64_t band;
  uint64_t pad[7];
} MacSiginfo;

typedef struct {
  void* sp;
  uint64_t size;
  int32_t flags;
} MacStack;

typedef struct {
  uint64_t far;
  uint32_t esr, exception;
  uint64_t x[29], fp, lr, sp, pc;
  uint32_t cpsr, pad;
  uint8_t neon[528];
} MacMcontext;

typedef struct {
  int32_t onstack;
  uint32_t mask;
  MacStack stack;
  void* link;
  uint64_t mcsize;
  MacMcontext* mcontext;
} MacUcontext;

typedef struct {
  int64_t signature;
  void* own;   // the Linux object behind it
} MacPthread;  // the head of mutexes, conditions and locks

typedef struct {
  char sysname[256], nodename[256], release[256], version[256], machine[256];
} MacUtsname;

typedef struct {
  uint8_t uuid[16];
  uint64_t times_and_more[6], resident, phys_footprint, start, exit;
} MacRusage0;

typedef struct {
  uint8_t len, family;
  char data[126];
} MacSockaddr;

typedef struct MacAddrinfo {
  int32_t flags, family, socktype, protocol;
  uint32_t addrlen;
  char* canonname;
  void* addr;
  struct MacAddrinfo* next;
} MacAddrinfo;

// <_locale.h>: ten texts, and numbers of which "C" has none (CHAR_MAX, which is
// 127 on macOS and 255 on aarch64 Linux).
typedef struct {
  const char* texts[10];
  char numbers[14];
} MacLconv;

typedef struct {
  char magic[8], encoding[32];
  void *sgetrune, *sputrune;
  int32_t invalid;
  uint32_t type[256];
  int32_t lower[256], upper[256];
  char rest[128];
} MacRuneLocale;

// Each list: X(name in the headers of both systems, its value on macOS), as
// kMac_NAME, and as a table of pairs by which shims.h translates.
// clang-format off
#define OPEN_FLAGS(X)                                                         \
  X(O_WRONLY, 1) X(O_RDWR, 2) X(O_NONBLOCK, 4) X(O_APPEND, 8)                 \
  X(O_SYNC, 0x80) X(O_NOFOLLOW, 0x100) X(O_CREAT, 0x200) X(O_TRUNC, 0x400)    \
  X(O_EXCL, 0x800) X(O_DIRECTORY, 0x100000) X(O_CLOEXEC, 0x1000000)
#define FCNTL_COMMANDS(X)                                                     \
  X(F_DUPFD, 0) X(F_GETFD, 1) X(F_SETFD, 2) X(F_GETFL, 3) X(F_SETFL, 4)       \
  X(F_DUPFD_CLOEXEC, 67)
#define MMAP_FLAGS(X)                                                         \
  X(MAP_SHARED, 1) X(MAP_PRIVATE, 2) X(MAP_FIXED, 0x10)                       \
  X(MAP_NORESERVE, 0x40) X(MAP_ANON, 0x1000)
#define SA_FLAGS(X)                                                           \
  X(SA_ONSTACK, 1) X(SA_RESTART, 2) X(SA_RESETHAND, 4) X(SA_NOCLDSTOP, 8)     \
  X(SA_NODEFER, 0x10) X(SA_SIGINFO, 0x40)
#define STACK_FLAGS(X) X(SS_ONSTACK, 1) X(SS_DISABLE, 4)
#define SIGNALS(X)                                                            \
  X(SIGBUS, 10) X(SIGSYS, 12) X(SIGURG, 16) X(SIGSTOP, 17) X(SIGTSTP, 18)     \
  X(SIGCONT, 19) X(SIGCHLD, 20) X(SIGIO, 23) X(SIGUSR1, 30) X(SIGUSR2, 31)
#define ERRNOS(X) /* below 35 the others are the same */                      \
  X(EDEADLK, 11) X(EAGAIN, 35) X(EINPROGRESS, 36) X(EALREADY, 37)             \
  X(ENOTSOCK, 38) X(EDESTADDRREQ, 39) X(EMSGSIZE, 40) X(EPROTOTYPE, 41)       \
  X(ENOPROTOOPT, 42) X(EPROTONOSUPPORT, 43) X(ESOCKTNOSUPPORT, 44)            \
  X(ENOTSUP, 45) X(EPFNOSUPPORT, 46) X(EAFNOSUPPORT, 47) X(EADDRINUSE, 48)    \
  X(EADDRNOTAVAIL, 49) X(ENETDOWN, 50) X(ENETUNREACH, 51) X(ENETRESET, 52)    \
  X(ECONNABORTED, 53) X(ECONNRESET, 54) X(ENOBUFS, 55) X(EISCONN, 56)         \
  X(ENOTCONN, 57) X(ESHUTDOWN, 58) X(ETOOMANYREFS, 59) X(ETIMEDOUT, 60)       \
  X(ECONNREFUSED, 61) X(ELOOP, 62) X(ENAMETOOLONG, 63) X(EHOSTDOWN, 64)       \
  X(EHOSTUNREACH, 65) X(ENOTEMPTY, 66) X(EUSERS, 68) X(EDQUOT, 69)            \
  X(ESTALE, 70) X(EREMOTE, 71) X(ENOLCK, 77) X(ENOSYS, 78) X(EOVERFLOW, 84)   \
  X(ECANCELED, 89) X(EIDRM, 90) X(ENOMSG, 91) X(EILSEQ, 92) X(EBADMSG, 94)    \
  X(EMULTIHOP, 95) X(ENODATA, 96) X(ENOLINK, 97) X(ENOSR, 98) X(ENOSTR, 99)   \
  X(EPROTO, 100) X(ETIME, 101) X(ENOTRECOVERABLE, 104) X(EOWNERDEAD, 105)
#define CLOCKS(X)                                                             \
  X(CLOCK_REALTIME, 0) X(CLOCK_MONOTONIC_RAW, 4) X(CLOCK_MONOTONIC, 6)        \
  X(CLOCK_PROCESS_CPUTIME_ID, 12) X(CLOCK_THREAD_CPUTIME_ID, 16)
#define SYSCONF_NAMES(X)                                                      \
  X(_SC_CLK_TCK, 3) X(_SC_OPEN_MAX, 5) X(_SC_NPROCESSORS_CONF, 57)            \
  X(_SC_NPROCESSORS_ONLN, 58)
#define SOCKET_OPTIONS(X)                                                     \
  X(SO_REUSEADDR, 4) X(SO_KEEPALIVE, 8) X(SO_BROADCAST, 0x20)                 \
  X(SO_REUSEPORT, 0x200)                                                      \
  X(SO_SNDBUF, 0x1001) X(SO_RCVBUF, 0x1002)
#define TCP_OPTIONS(X)                                                        \
  X(TCP_NODELAY, 1) X(TCP_KEEPINTVL, 0x101) X(TCP_KEEPCNT, 0x102)
#define ILL_CODES(X)                                                          \
  X(ILL_ILLOPC, 1) X(ILL_ILLTRP, 2) X(ILL_PRVOPC, 3) X(ILL_ILLOPN, 4)         \
  X(ILL_ILLADR, 5) X(ILL_PRVREG, 6) X(ILL_COPROC, 7) X(ILL_BADSTK, 8)
#define FPE_CODES(X)                                                          \
  X(FPE_FLTDIV, 1) X(FPE_FLTOVF, 2) X(FPE_FLTUND, 3) X(FPE_FLTRES, 4)         \
  X(FPE_FLTINV, 5) X(FPE_FLTSUB, 6) X(FPE_INTDIV, 7) X(FPE_INTOVF, 8)
#define SEEKS(X)                                                              \
  X(SEEK_SET, 0) X(SEEK_CUR, 1) X(SEEK_END, 2) X(SEEK_HOLE, 3) X(SEEK_DATA, 4)
#define MESSAGE_FLAGS(X)                                                      \
  X(MSG_OOB, 1) X(MSG_PEEK, 2) X(MSG_WAITALL, 0x40) X(MSG_DONTWAIT, 0x80)
#define ADDRESS_FAMILIES(X)                                                   \
  X(AF_UNSPEC, 0) X(AF_UNIX, 1) X(AF_INET, 2) X(AF_INET6, 30)
#define ADDRESS_FLAGS(X)                                                      \
  X(AI_PASSIVE, 1) X(AI_NUMERICHOST, 4) X(AI_ALL, 0x100)                      \
  X(AI_ADDRCONFIG, 0x400) X(AI_V4MAPPED, 0x800) X(AI_NUMERICSERV, 0x1000)
#define ADDRESS_ERRORS(X)                                                     \
  X(EAI_AGAIN, 2) X(EAI_BADFLAGS, 3) X(EAI_FAIL, 4) X(EAI_FAMILY, 5)          \
  X(EAI_MEMORY, 6) X(EAI_NONAME, 8) X(EAI_SERVICE, 9) X(EAI_SOCKTYPE, 10)     \
  X(EAI_SYSTEM, 11)
#define ALONE(X) /* what a shim treats by itself, or Linux has not */         \
  X(F_NOCACHE, 48) X(F_FULLFSYNC, 51) X(F_SETNOSIGPIPE, 73)                   \
  X(SI_USER, 0x10001) X(SIGEMT, 7) X(SIGINFO, 29) X(_SC_PAGESIZE, 29)          \
  X(CLOCK_UPTIME_RAW, 8) X(SOL_SOCKET, 0xffff) X(PTHREAD_MUTEX_RECURSIVE, 2)                         \
  X(PTHREAD_MUTEX_ERRORCHECK, 1) X(RUSAGE_INFO_V0, 0) X(SO_NOSIGPIPE, 0x1022) \
  X(TCP_KEEPALIVE, 0x10) X(MINSIGSTKSZ, 32768) X(RTLD_NOLOAD, 0x10)
#define EACH_LIST(X)                                                          \
  OPEN_FLAGS(X) FCNTL_COMMANDS(X) MMAP_FLAGS(X) SA_FLAGS(X)       \
  STACK_FLAGS(X) SIGNALS(X) ERRNOS(X) CLOCKS(X) SYSCONF_NAMES(X)              \
  SOCKET_OPTIONS(X) MESSAGE_FLAGS(X) ADDRESS_FAMILIES(X) ADDRESS_FLAGS(X)     \
  ADDRESS_ERRORS(X) TCP_OPTIONS(X) ILL_CODES(X) FPE_CODES(X) SEEKS(X) ALONE(X)
// clang-format on

#define MAC_ENUM(name, value) kMac_##name = value,
enum { EACH_LIST(MAC_ENUM) };
#undef MAC_ENUM

// Signatures of what is initialised statically (<pthread_impl.h>).
enum {
  kMacMutex = 0x32AAABA7,
  kMacErrorCheckMutex = 0x32AAABA1,
  kMacRecursiveMutex = 0x32AAABA2,
  kMacFirstFitMutex = 0x32AAABA3,
  kMacCondition = 0x3CB0B1BB,
  kMacLock = 0x2DA8B3B4,
};

// Classes of characters in MacRuneLocale.type (<_ctype.h>).
enum {
  kRuneAlpha = 0x100,
  kRuneControl = 0x200,
  kRuneDigit = 0x400,
  kRuneGraph = 0x800,
  kRuneLower = 0x1000,
  kRunePunct = 0x2000,
  kRuneSpace = 0x4000,
  kRuneUpper = 0x8000,
  kRuneHex = 0x10000,
  kRuneBlank = 0x20000,
  kRunePrint = 0x40000,
};

// ulock: <sys/ulock.h> of XNU, which the SDK lacks; the numbers are libc++'s.
enum { kUlock32 = 1, kUlock64 = 5, kUlockWakeAll = 0x100 };
