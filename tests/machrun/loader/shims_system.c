// errno, files, memory, time, what the system says of itself, dyld.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "shims.h"

// ---- errno -----------------------------------------------------------------

// Below 35 the numbers are the same, but for these two and EDEADLK.
#define EACH_ERRNO(X)                                                          \
  X(EDEADLK)                                                                   \
  X(EAGAIN)                                                                    \
  X(EINPROGRESS) X(EALREADY) X(ENOTSOCK) X(EMSGSIZE) X(EPROTONOSUPPORT)        \
      X(ENOTSUP) X(EAFNOSUPPORT) X(EADDRINUSE) X(EADDRNOTAVAIL) X(ENETUNREACH) \
          X(ECONNABORTED) X(ECONNRESET) X(ENOBUFS) X(EISCONN) X(ENOTCONN)      \
              X(ETIMEDOUT) X(ECONNREFUSED) X(ELOOP) X(ENAMETOOLONG)            \
                  X(EHOSTUNREACH) X(ENOTEMPTY) X(ENOLCK) X(ENOSYS)             \
                      X(EOVERFLOW) X(ECANCELED) X(EILSEQ)

int mac_errno_of(int number) {
  switch (number) {
#define TO_MAC(name) \
  case name:         \
    return kMac_##name;
    EACH_ERRNO(TO_MAC)
    default:
      return number;
  }
}
int linux_errno_of(int number) {
  switch (number) {
#define TO_LINUX(name) \
  case kMac_##name:    \
    return name;
    EACH_ERRNO(TO_LINUX)
    default:
      return number;
  }
}

// What Linux's functions have left is taken over whenever somebody looks; what
// the images write stays until then.
int* mac___error(void) {
  static __thread int number;
  if (errno != 0) number = mac_errno_of(errno);
  errno = 0;
  return &number;
}
int mac_strerror_r(int number, char* to, size_t size) {
  const char* text = strerror(linux_errno_of(number));
  return snprintf(to, size, "%s", text) < (int)size ? 0 : ERANGE;
}
_Noreturn void mac___assert_rtn(const char* function, const char* file,
                                int line, const char* what) {
  fprintf(stderr, "Assertion failed: (%s), function %s, file %s, line %d.\n",
          what, function, file, line);
  abort();
}

// ---- files -----------------------------------------------------------------

static int open_flags(int flags) {
  static const int kFlags[][2] = {
      {kMac_O_NONBLOCK, O_NONBLOCK}, {kMac_O_APPEND, O_APPEND},
      {kMac_O_SYNC, O_SYNC},         {kMac_O_NOFOLLOW, O_NOFOLLOW},
      {kMac_O_CREAT, O_CREAT},       {kMac_O_TRUNC, O_TRUNC},
      {kMac_O_EXCL, O_EXCL},         {kMac_O_DIRECTORY, O_DIRECTORY},
      {kMac_O_CLOEXEC, O_CLOEXEC}};
  int result = flags & 3;
  for (size_t i = 0; i < sizeof kFlags / sizeof *kFlags; i++) {
    if (flags & kFlags[i][0]) result |= kFlags[i][1];
    flags &= ~kFlags[i][0];
  }
  if (flags & ~3) refuse(NULL, "open with the unknown flags %#x", flags & ~3);
  return result;
}
static int at_directory(int fd) { return fd == kMac_AT_FDCWD ? AT_FDCWD : fd; }

VARIADIC(int, open, 2, const char* path, int flags) {
  return open(path, open_flags(flags), *(mode_t*)stack);
}
VARIADIC(int, openat, 3, int fd, const char* path, int flags) {
  return openat(at_directory(fd), path, open_flags(flags), *(mode_t*)stack);
}
VARIADIC(int, fcntl, 2, int fd, int command) {
  long argument = *(long*)stack;
  int found;
  switch (command) {
    case kMac_F_DUPFD:
      return fcntl(fd, F_DUPFD, (int)argument);
    case kMac_F_DUPFD_CLOEXEC:
      return fcntl(fd, F_DUPFD_CLOEXEC, (int)argument);
    case kMac_F_GETFD:
      return fcntl(fd, F_GETFD);
    case kMac_F_SETFD:
      return fcntl(fd, F_SETFD, (int)argument);
    case kMac_F_GETFL:
      found = fcntl(fd, F_GETFL);
      return found < 0
                 ? found
                 : (found & 3) | (found & O_NONBLOCK ? kMac_O_NONBLOCK : 0) |
                       (found & O_APPEND ? kMac_O_APPEND : 0);
    case kMac_F_SETFL:
      return fcntl(fd, F_SETFL, open_flags((int)argument));
    case kMac_F_FULLFSYNC:
      return fsync(fd);
    case kMac_F_NOCACHE:
    case kMac_F_SETNOSIGPIPE:
      return 0;
    default:
      refuse(NULL, "fcntl with the unknown command %d", command);
  }
}

static MacTime mac_time(struct timespec time) {
  return (MacTime){time.tv_sec, time.tv_nsec};
}
static int put_stat(int status, const struct stat* from, MacStat* to) {
  if (status != 0) return status;
  *to = (MacStat){.dev = (int32_t)from->st_dev,
                  .mode = (uint16_t)from->st_mode,
                  .nlink = (uint16_t)from->st_nlink,
                  .ino = from->st_ino,
                  .uid = from->st_uid,
                  .gid = from->st_gid,
                  .rdev = (int32_t)from->st_rdev,
                  .atime = mac_time(from->st_atim),
                  .mtime = mac_time(from->st_mtim),
                  .ctime = mac_time(from->st_ctim),
                  .birthtime = mac_time(from->st_ctim),
                  .size = from->st_size,
                  .blocks = from->st_blocks,
                  .blksize = (int32_t)from->st_blksize};
  return 0;
}
int mac_stat(const char* path, MacStat* to) {
  struct stat found;
  return put_stat(stat(path, &found), &found, to);
}
int mac_lstat(const char* path, MacStat* to) {
  struct stat found;
  return put_stat(lstat(path, &found), &found, to);
}
int mac_fstat(int fd, MacStat* to) {
  struct stat found;
  return put_stat(fstat(fd, &found), &found, to);
}
int mac_statvfs(const char* path, MacStatvfs* to) {
  struct statvfs found;
  int status = statvfs(path, &found);
  if (status != 0) return status;
  *to = (MacStatvfs){found.f_bsize,
                     found.f_frsize,
                     (uint32_t)found.f_blocks,
                     (uint32_t)found.f_bfree,
                     (uint32_t)found.f_bavail,
                     (uint32_t)found.f_files,
                     (uint32_t)found.f_ffree,
                     (uint32_t)found.f_favail,
                     found.f_fsid,
                     found.f_flag & 3,
                     found.f_namemax};
  return 0;
}
// One thread at a time may read from one directory, as on macOS.
MacDirent* mac_readdir(DIR* directory) {
  static __thread MacDirent entry;
  const struct dirent* found = readdir(directory);
  if (found == NULL) return NULL;
  size_t size = strlen(found->d_name);
  entry = (MacDirent){.ino = found->d_ino,
                      .reclen = (uint16_t)(21 + size + 1),
                      .namlen = (uint16_t)size,
                      .type = found->d_type};
  memcpy(entry.name, found->d_name, size + 1);
  return &entry;
}
static struct timespec linux_time(MacTime time) {
  long nsec = time.nsec == kMac_UTIME_NOW    ? UTIME_NOW
              : time.nsec == kMac_UTIME_OMIT ? UTIME_OMIT
                                             : time.nsec;
  return (struct timespec){time.sec, nsec};
}
int mac_utimensat(int fd, const char* path, const MacTime times[2], int flags) {
  struct timespec both[2];
  for (int i = 0; times && i < 2; i++) both[i] = linux_time(times[i]);
  int follow = flags & kMac_AT_SYMLINK_NOFOLLOW ? AT_SYMLINK_NOFOLLOW : 0;
  return utimensat(at_directory(fd), path, times ? both : NULL, follow);
}
int mac_fchmodat(int fd, const char* path, unsigned mode, int flags) {
  int follow = flags & kMac_AT_SYMLINK_NOFOLLOW ? AT_SYMLINK_NOFOLLOW : 0;
  return fchmodat(at_directory(fd), path, mode & 07777, follow);
}
int mac_unlinkat(int fd, const char* path, int flags) {
  int remove = flags & kMac_AT_REMOVEDIR ? AT_REMOVEDIR : 0;
  return unlinkat(at_directory(fd), path, remove);
}
// Only std::filesystem::copy_file uses these, and nothing under test calls
// that.
void* mac_copyfile_state_alloc(void) { return NULL; }
int mac_copyfile_state_free(void* state) {
  (void)state;
  return 0;
}
int mac_fcopyfile(int from, int to, void* state, unsigned flags) {
  (void)from, (void)to, (void)state, (void)flags;
  errno = ENOTSUP;
  return -1;
}

// ---- memory, time ----------------------------------------------------------

uint64_t mac_vm_page_size = kPage;
uint64_t mac___stack_chk_guard = 0x1122334455667700;
_Noreturn void mac___stack_chk_fail(void) {
  fprintf(stderr, "machrun: a stack was overwritten\n");
  abort();
}
FILE *mac___stdinp, *mac___stdoutp, *mac___stderrp;
__attribute__((constructor)) static void fill_streams(void) {
  mac___stdinp = stdin;
  mac___stdoutp = stdout;
  mac___stderrp = stderr;
}

void* mac_mmap(void* at, size_t size, int protection, int flags, int fd,
               off_t from) {
  int known = kMac_MAP_FIXED | kMac_MAP_ANON | kMac_MAP_NORESERVE | 3;
  if (flags & ~known) refuse(NULL, "mmap with the unknown flags %#x", flags);
  return mmap(at, size, protection,
              (flags & 3) | (flags & kMac_MAP_FIXED ? MAP_FIXED : 0) |
                  (flags & kMac_MAP_ANON ? MAP_ANONYMOUS : 0),
              fd, from);
}
void mac_memset_pattern16(uint8_t* to, const uint8_t* pattern, size_t size) {
  for (size_t i = 0; i < size; i++) to[i] = pattern[i & 15];
}
static clockid_t linux_clock(int clock) {
  switch (clock) {
    case kMac_CLOCK_REALTIME:
      return CLOCK_REALTIME;
    case kMac_CLOCK_MONOTONIC:
    case kMac_CLOCK_MONOTONIC_RAW:
    case kMac_CLOCK_UPTIME_RAW:
      return CLOCK_MONOTONIC;
    case kMac_CLOCK_PROCESS_CPUTIME_ID:
      return CLOCK_PROCESS_CPUTIME_ID;
    case kMac_CLOCK_THREAD_CPUTIME_ID:
      return CLOCK_THREAD_CPUTIME_ID;
    default:
      refuse(NULL, "the unknown clock %d", clock);
  }
}
int mac_clock_gettime(int clock, struct timespec* time) {
  return clock_gettime(linux_clock(clock), time);
}

// ---- the system ------------------------------------------------------------

long mac_sysconf(int name) {
  switch (name) {
    case kMac__SC_PAGESIZE:
      return kPage;
    case kMac__SC_NPROCESSORS_CONF:
    case kMac__SC_NPROCESSORS_ONLN:
      return sysconf(_SC_NPROCESSORS_ONLN);
    case kMac__SC_CLK_TCK:
      return sysconf(_SC_CLK_TCK);
    case kMac__SC_OPEN_MAX:
      return sysconf(_SC_OPEN_MAX);
    default:
      refuse(NULL, "sysconf of the unknown %d", name);
  }
}
int mac_sysctlbyname(const char* name, void* to, size_t* size, const void* set,
                     size_t set_size) {
  (void)set, (void)set_size;
  static const struct {
    const char *name, *text;
    uint64_t number;
    size_t size;
  } kKnown[] = {{"hw.memsize", NULL, 16ull << 30, 8},
                {"kern.memorystatus_level", NULL, 50, 4},
                {"iogpu.wired_limit_mb", NULL, 0, 4},
                {"hw.model", "Mac14,2", 0, 8},
                {"machdep.cpu.brand_string", "Apple M2 (simulated)", 0, 21}};
  for (size_t i = 0; i < sizeof kKnown / sizeof *kKnown; i++) {
    if (strcmp(name, kKnown[i].name)) continue;
    if (to != NULL && *size < kKnown[i].size) break;
    const void* from = kKnown[i].text ? (const void*)kKnown[i].text
                                      : (const void*)&kKnown[i].number;
    if (to != NULL) memcpy(to, from, kKnown[i].size);
    *size = kKnown[i].size;
    return 0;
  }
  errno = ENOENT;
  return -1;
}
int mac_uname(MacUtsname* to) {
  *to = (MacUtsname){"Darwin", "mac", "", "Darwin Kernel Version", "arm64"};
  // Darwin 23 is macOS 14, 25 is macOS 26.
  unsigned major = g_pretends >> 16;
  snprintf(to->release, sizeof to->release, "%u.0.0",
           major < 26 ? major + 9 : major - 1);
  return 0;
}
int mac_proc_pid_rusage(int pid, int flavor, MacRusage0* to) {
  if (flavor != kMac_RUSAGE_INFO_V0 || pid != getpid())
    refuse(NULL, "proc_pid_rusage of flavor %d", flavor);
  *to = (MacRusage0){.phys_footprint = 100 << 20};
  return 0;
}
// Pairs of a platform and a version; macOS is platform 1.
bool mac__availability_version_check(uint32_t count, const uint32_t* versions) {
  for (uint32_t i = 0; i < count; i++)
    if (versions[2 * i] == kPlatformMacos && versions[2 * i + 1] > g_pretends)
      return false;
  return true;
}

// ---- dyld ------------------------------------------------------------------

typedef struct {
  const void *header, *eh_frame;
  uint64_t eh_frame_size;
  const void* unwind_info;
  uint64_t unwind_info_size;
} UnwindSections;

bool mac__dyld_find_unwind_sections(const void* address, UnwindSections* to) {
  const Image* image = image_of(address);
  if (image == NULL) return false;
  *to = (UnwindSections){
      image->base, image->base + image->eh_frame.offset, image->eh_frame.size,
      image->base + image->unwind_info.offset, image->unwind_info.size};
  return true;
}
void mac__dyld_register_func_for_remove_image(void* function) {
  (void)function;  // none is ever removed
}
int mac___cxa_atexit(void (*end)(void*), void* object, void* image) {
  extern int __cxa_atexit(void (*)(void*), void*, void*);
  (void)image;
  return __cxa_atexit(end, object, NULL);
}
void mac__tlv_bootstrap(void) { abort(); }  // the loader replaces it
void mac___chkstk_darwin(void);             // looks at nothing
asm(".text\n.globl mac___chkstk_darwin\nmac___chkstk_darwin: ret\n");
void mac_dyld_stub_binder(void) { abort(); }  // everything is bound at load

// Async-signal-safe: reads what was mapped, and takes no lock.
int mac_dladdr(const void* address, Dl_info* to) {
  const Image* image = image_of(address);
  if (image == NULL) return dladdr(address, to);
  *to = (Dl_info){image->path, image->base, NULL, NULL};
  if (image->symtab == NULL) return 1;
  const Nlist* symbols = (const void*)(image->file + image->symtab->symoff);
  uint64_t best = 0;
  uint64_t wanted =
      (uint64_t)address - (uint64_t)image->base + image->preferred;
  for (uint32_t i = 0; i < image->symtab->nsyms; i++) {
    const Nlist* symbol = &symbols[i];
    bool defined = !(symbol->type & 0xe0) && (symbol->type & 0x0e) == 0x0e;
    if (!defined || symbol->value > wanted || symbol->value <= best) continue;
    best = symbol->value;
    to->dli_sname =
        (const char*)image->file + image->symtab->stroff + symbol->name + 1;
    to->dli_saddr = image->base + (best - image->preferred);
  }
  return 1;
}

// A handle is a Library; RTLD_DEFAULT is -2 on macOS.
static __thread char t_error[256];
void* mac_dlopen(const char* path, int mode) {
  (void)mode;
  if (path == NULL) return (void*)-2;
  Library found = find_library(path, &g_images[0], true);
  if (found.image == NULL && !found.is_system) {
    snprintf(t_error, sizeof t_error, "dlopen(%s): no such file", path);
    return NULL;
  }
  Library* handle = malloc(sizeof *handle);
  if (handle != NULL) *handle = found;
  return handle;
}
void* mac_dlsym(void* handle, const char* name) {
  char mangled[512];
  snprintf(mangled, sizeof mangled, "_%s", name);
  void* found;
  if (handle == (void*)-2) {
    static const Library kSystem = {"libSystem", NULL, NULL, true};
    found = in_all(mangled);
    if (found == NULL) found = in_library(&kSystem, mangled);
  } else {
    found = in_library(handle, mangled);
  }
  if (found == NULL)
    snprintf(t_error, sizeof t_error, "dlsym(%p, %s): symbol not found", handle,
             name);
  return found;
}
char* mac_dlerror(void) { return t_error[0] ? t_error : NULL; }
int mac_dlclose(void* handle) {
  if (handle != (void*)-2) free(handle);
  return 0;  // nothing is ever unloaded
}
