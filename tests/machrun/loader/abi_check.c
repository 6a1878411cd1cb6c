// Compiled for macOS, and never run: mac_abi.h against Apple's headers.
#include <ctype.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <libproc.h>
#include <limits.h>
#include <locale.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/ucontext.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "mac_abi.h"

#define CHECK(name, value)                              \
  _Static_assert((uint32_t)(name) == (uint32_t)(value), \
                 #name " is another number");
EACH_LIST(CHECK)

#define SAME(type, ours) \
  _Static_assert(sizeof(type) == sizeof(ours), #type " has another size");
#define MEMBER(type, member, ours, own)                                     \
  _Static_assert(offsetof(type, member) == offsetof(ours, own) &&           \
                     sizeof(((type*)0)->member) == sizeof(((ours*)0)->own), \
                 #type "." #member " lies elsewhere");

SAME(struct stat, MacStat)
MEMBER(struct stat, st_mode, MacStat, mode)
MEMBER(struct stat, st_ino, MacStat, ino)
MEMBER(struct stat, st_gid, MacStat, gid)
MEMBER(struct stat, st_mtimespec, MacStat, mtime)
MEMBER(struct stat, st_size, MacStat, size)
MEMBER(struct stat, st_blksize, MacStat, blksize)
SAME(struct dirent, MacDirent)
MEMBER(struct dirent, d_ino, MacDirent, ino)
MEMBER(struct dirent, d_namlen, MacDirent, namlen)
MEMBER(struct dirent, d_type, MacDirent, type)
MEMBER(struct dirent, d_name, MacDirent, name)
SAME(struct statvfs, MacStatvfs)
MEMBER(struct statvfs, f_bavail, MacStatvfs, bavail)
MEMBER(struct statvfs, f_namemax, MacStatvfs, namemax)
SAME(struct sigaction, MacSigaction)
MEMBER(struct sigaction, sa_flags, MacSigaction, flags)
SAME(siginfo_t, MacSiginfo)
MEMBER(siginfo_t, si_code, MacSiginfo, code)
MEMBER(siginfo_t, si_pid, MacSiginfo, pid)
MEMBER(siginfo_t, si_addr, MacSiginfo, address)
SAME(stack_t, MacStack)
MEMBER(stack_t, ss_flags, MacStack, flags)
SAME(ucontext_t, MacUcontext)
MEMBER(ucontext_t, uc_mcontext, MacUcontext, mcontext)
SAME(*((ucontext_t*)0)->uc_mcontext, MacMcontext)
_Static_assert(offsetof(struct __darwin_mcontext64, __ss.__pc) ==
                   offsetof(MacMcontext, pc),
               "the program counter lies elsewhere");
_Static_assert(offsetof(struct __darwin_mcontext64, __ss.__fp) ==
                   offsetof(MacMcontext, fp),
               "the frame pointer lies elsewhere");
SAME(struct utsname, MacUtsname)
SAME(struct lconv, MacLconv)
MEMBER(struct lconv, decimal_point, MacLconv, texts[0])
MEMBER(struct lconv, int_frac_digits, MacLconv, numbers[0])
MEMBER(struct lconv, int_n_sign_posn, MacLconv, numbers[13])
CHECK(CHAR_MAX, 127)
SAME(struct rusage_info_v0, MacRusage0)
MEMBER(struct rusage_info_v0, ri_resident_size, MacRusage0, resident)
MEMBER(struct rusage_info_v0, ri_phys_footprint, MacRusage0, phys_footprint)
SAME(struct sockaddr_storage, MacSockaddr)
SAME(struct addrinfo, MacAddrinfo)
MEMBER(struct addrinfo, ai_canonname, MacAddrinfo, canonname)
MEMBER(struct addrinfo, ai_addr, MacAddrinfo, addr)
MEMBER(struct addrinfo, ai_next, MacAddrinfo, next)
MEMBER(_RuneLocale, __runetype, MacRuneLocale, type)
MEMBER(_RuneLocale, __maplower, MacRuneLocale, lower)
MEMBER(_RuneLocale, __mapupper, MacRuneLocale, upper)
_Static_assert(sizeof(_RuneLocale) <= sizeof(MacRuneLocale), "_RuneLocale");
_Static_assert(sizeof(sigjmp_buf) >= 192, "what sigsetjmp saves has no room");
_Static_assert(sizeof(pthread_mutex_t) >= sizeof(MacPthread) &&
                   sizeof(pthread_cond_t) >= sizeof(MacPthread) &&
                   sizeof(pthread_rwlock_t) >= sizeof(MacPthread) &&
                   sizeof(pthread_mutexattr_t) >= sizeof(MacPthread) &&
                   sizeof(pthread_once_t) >= sizeof(MacPthread),
               "pthread's objects have no room");
CHECK(_PTHREAD_MUTEX_SIG_init, kMacMutex)
CHECK(_PTHREAD_ERRORCHECK_MUTEX_SIG_init, kMacErrorCheckMutex)
CHECK(_PTHREAD_RECURSIVE_MUTEX_SIG_init, kMacRecursiveMutex)
CHECK(_PTHREAD_FIRSTFIT_MUTEX_SIG_init, kMacFirstFitMutex)
CHECK(_PTHREAD_COND_SIG_init, kMacCondition)
CHECK(_PTHREAD_RWLOCK_SIG_init, kMacLock)
CHECK(_CTYPE_A, kRuneAlpha)
CHECK(_CTYPE_C, kRuneControl)
CHECK(_CTYPE_D, kRuneDigit)
CHECK(_CTYPE_G, kRuneGraph)
CHECK(_CTYPE_L, kRuneLower)
CHECK(_CTYPE_P, kRunePunct)
CHECK(_CTYPE_S, kRuneSpace)
CHECK(_CTYPE_U, kRuneUpper)
CHECK(_CTYPE_X, kRuneHex)
CHECK(_CTYPE_B, kRuneBlank)
CHECK(_CTYPE_R, kRunePrint)
