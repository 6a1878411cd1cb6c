// Files, memory, time, and what the system says of itself.
#define _GNU_SOURCE
#include <dirent.h>
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

_Noreturn void mac___assert_rtn(const char* function, const char* file,
                                int line, const char* what) {
  fprintf(stderr, "Assertion failed: (%s), function %s, file %s, line %d.\n",
          what, function, file, line);
  abort();
}

// ---- files -----------------------------------------------------------------

static const Pair kOpenFlags[] = {
    PAIR(O_WRONLY), PAIR(O_RDWR), PAIR(O_NONBLOCK), PAIR(O_APPEND),
    PAIR(O_SYNC), PAIR(O_NOFOLLOW), PAIR(O_CREAT), PAIR(O_TRUNC), PAIR(O_EXCL),
    PAIR(O_DIRECTORY), PAIR(O_CLOEXEC)};
static const Pair kCommands[] = {
    PAIR(F_DUPFD), PAIR(F_GETFD), PAIR(F_SETFD), PAIR(F_GETFL), PAIR(F_SETFL),
    PAIR(F_DUPFD_CLOEXEC)};

VARIADIC(int, open, 2, const char* path, int flags) {
  return open(path, FLAGS_TO_OWN(kOpenFlags, flags, "open"), *(mode_t*)stack);
}
VARIADIC(int, fcntl, 2, int fd, int command) {
  int argument = *(int*)stack;
  if (command == apple_F_FULLFSYNC) return fsync(fd);
  if (command == apple_F_NOCACHE || command == apple_F_SETNOSIGPIPE) return 0;
  int own = TO_OWN(kCommands, command, -1);
  if (own < 0) refuse(NULL, "fcntl with the unknown command %d", command);
  if (own == F_SETFL) argument = FLAGS_TO_OWN(kOpenFlags, argument, "fcntl");
  int found = fcntl(fd, own, argument);
  return own == F_GETFL && found >= 0 ? FLAGS_TO_MAC(kOpenFlags, found) : found;
}

off_t mac_lseek(int fd, off_t offset, int whence) {
  static const Pair kSeeks[] = {
      PAIR(SEEK_SET), PAIR(SEEK_CUR), PAIR(SEEK_END), PAIR(SEEK_HOLE),
      PAIR(SEEK_DATA)};
  return lseek(fd, offset, TO_OWN(kSeeks, whence, -1));
}

#define TIME(from) {(from).tv_sec, (from).tv_nsec}
static int put_stat(int status, const struct stat* from,
                    struct apple_stat* to) {
  if (status == 0)
    *to = (struct apple_stat){.apple_st_dev = (int32_t)from->st_dev,
                              .apple_st_mode = (uint16_t)from->st_mode,
                              .apple_st_nlink = (uint16_t)from->st_nlink,
                              .apple_st_ino = from->st_ino,
                              .apple_st_uid = from->st_uid,
                              .apple_st_gid = from->st_gid,
                              .apple_st_rdev = (int32_t)from->st_rdev,
                              .apple_st_atimespec = TIME(from->st_atim),
                              .apple_st_mtimespec = TIME(from->st_mtim),
                              .apple_st_ctimespec = TIME(from->st_ctim),
                              .apple_st_birthtimespec = TIME(from->st_ctim),
                              .apple_st_size = from->st_size,
                              .apple_st_blocks = from->st_blocks,
                              .apple_st_blksize = (int32_t)from->st_blksize};
  return status;
}
#define STAT(name, type)                              \
  int mac_##name(type which, struct apple_stat* to) { \
    struct stat found;                                \
    return put_stat(name(which, &found), &found, to); \
  }
STAT(stat, const char*)
STAT(lstat, const char*)
STAT(fstat, int)

int mac_statvfs(const char* path, struct apple_statvfs* to) {
  struct statvfs found;
  int status = statvfs(path, &found);
  if (status == 0)  // ST_RDONLY and ST_NOSUID are the same
    *to = (struct apple_statvfs){found.f_bsize,
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
  return status;
}
// One thread at a time may read from one directory, as on macOS.
struct apple_dirent* mac_readdir(DIR* directory) {
  static __thread struct apple_dirent entry;
  const struct dirent* found = readdir(directory);
  if (found == NULL) return NULL;
  size_t size = strlen(found->d_name);
  entry = (struct apple_dirent){.apple_d_ino = found->d_ino,
                                .apple_d_namlen = (uint16_t)size,
                                .apple_d_type = found->d_type};
  entry.apple_d_reclen =
      (uint16_t)(offsetof(struct apple_dirent, apple_d_name) + size + 1);
  memcpy(entry.apple_d_name, found->d_name, size + 1);
  return &entry;
}

// ---- memory, time ----------------------------------------------------------

uint64_t mac_vm_page_size = kPage;
uint64_t mac___stack_chk_guard = 0x1122334455667700;
FILE *mac___stdinp, *mac___stdoutp, *mac___stderrp;
__attribute__((constructor)) static void fill_streams(void) {
  mac___stdinp = stdin, mac___stdoutp = stdout, mac___stderrp = stderr;
}

void* mac_mmap(void* at, size_t size, int protection, int flags, int fd,
               off_t from) {
  static const Pair kFlags[] = {
      PAIR(MAP_SHARED), PAIR(MAP_PRIVATE), PAIR(MAP_FIXED),
      PAIR(MAP_NORESERVE), PAIR(MAP_ANON)};
  if (from % kPage) {  // Linux's pages are smaller
    errno = EINVAL;
    return MAP_FAILED;
  }
  return mmap(at, size, protection, FLAGS_TO_OWN(kFlags, flags, "mmap"), fd,
              from);
}
// On Linux this frees, and returns NULL.
void* mac_realloc(void* old, size_t size) {
  return realloc(old, size ? size : 1);
}
void* mac_aligned_alloc(size_t alignment, size_t size) {
  if (alignment >= sizeof(void*) && size % alignment == 0)
    return aligned_alloc(alignment, size);
  errno = EINVAL;
  return NULL;
}
void mac_memset_pattern16(uint8_t* to, const uint8_t* pattern, size_t size) {
  for (size_t i = 0; i < size; i++) to[i] = pattern[i & 15];
}
int mac_clock_gettime(int clock, struct timespec* time) {
  static const Pair kClocks[] = {
      PAIR(CLOCK_REALTIME), PAIR(CLOCK_MONOTONIC_RAW), PAIR(CLOCK_MONOTONIC),
      PAIR(CLOCK_PROCESS_CPUTIME_ID), PAIR(CLOCK_THREAD_CPUTIME_ID),
      {apple_CLOCK_UPTIME_RAW, CLOCK_MONOTONIC}};
  int own = TO_OWN(kClocks, clock, -1);
  if (own < 0) refuse(NULL, "the unknown clock %d", clock);
  return clock_gettime(own, time);
}

// ---- the system ------------------------------------------------------------

long mac_sysconf(int name) {
  static const Pair kNames[] = {
      PAIR(_SC_CLK_TCK), PAIR(_SC_OPEN_MAX), PAIR(_SC_NPROCESSORS_CONF),
      PAIR(_SC_NPROCESSORS_ONLN)};
  if (name == apple__SC_PAGESIZE) return kPage;
  int own = TO_OWN(kNames, name, -1);
  if (own < 0) refuse(NULL, "sysconf of the unknown %d", name);
  return sysconf(own);
}
int mac_sysctlbyname(const char* name, void* to, size_t* size, const void* set,
                     size_t set_size) {
  if (set != NULL || set_size != 0) {
    errno = EPERM;
    return -1;
  }
  static const uint64_t memory = 16ull << 30;
  static const uint32_t level = 50, wired = 0;
  static const struct {
    const char* name;
    const void* value;
    size_t size;
  } kKnown[] = {{"hw.memsize", &memory, 8},
                {"kern.memorystatus_level", &level, 4},
                {"iogpu.wired_limit_mb", &wired, 4},
                {"hw.model", "Mac14,2", 8},
                {"machdep.cpu.brand_string", "Apple M2 (simulated)", 21}};
  for (size_t i = 0; i < COUNT(kKnown); i++) {
    if (strcmp(name, kKnown[i].name)) continue;
    errno = ENOMEM;
    if (to != NULL && *size < kKnown[i].size) return -1;
    if (to != NULL) memcpy(to, kKnown[i].value, kKnown[i].size);
    *size = kKnown[i].size;
    return 0;
  }
  errno = ENOENT;
  return -1;
}
int mac_uname(struct apple_utsname* to) {
  *to = (struct apple_utsname){"Darwin", "mac", "", "Darwin Kernel Version",
                               "arm64"};
  // Darwin 23 is macOS 14, 25 is macOS 26.
  unsigned major = g_pretends >> 16;
  snprintf(to->apple_release, sizeof to->apple_release, "%u.0.0",
           major < 26 ? major + 9 : major - 1);
  return 0;
}
// The footprint is what is resident, of the emulator's process.
int mac_proc_pid_rusage(int pid, int flavor, struct apple_rusage_info_v0* to) {
  if (flavor != apple_RUSAGE_INFO_V0 || pid != getpid())
    refuse(NULL, "proc_pid_rusage of flavor %d", flavor);
  unsigned long all = 0, resident = 0;
  FILE* file = fopen("/proc/self/statm", "re");
  if (file != NULL && fscanf(file, "%lu %lu", &all, &resident) < 2)
    resident = 0;
  if (file != NULL) fclose(file);
  resident *= (unsigned long)sysconf(_SC_PAGESIZE);
  *to = (struct apple_rusage_info_v0){.apple_ri_resident_size = resident,
                                      .apple_ri_phys_footprint = resident};
  return 0;
}
// Pairs of a platform and a version.
bool mac__availability_version_check(uint32_t count, const uint32_t* versions) {
  for (uint32_t i = 0; i < count; i++)
    if (versions[2 * i] == PLATFORM_MACOS && versions[2 * i + 1] > g_pretends)
      return false;
  return true;
}
