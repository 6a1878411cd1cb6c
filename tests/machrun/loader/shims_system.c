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

static const Pair kOpenFlags[] = {OPEN_FLAGS(PAIR)};
static const Pair kCommands[] = {FCNTL_COMMANDS(PAIR)};

VARIADIC(int, open, 2, const char* path, int flags) {
  return open(path, FLAGS_TO_OWN(kOpenFlags, flags, "open"), *(mode_t*)stack);
}
VARIADIC(int, fcntl, 2, int fd, int command) {
  int argument = *(int*)stack;
  if (command == kMac_F_FULLFSYNC) return fsync(fd);
  if (command == kMac_F_NOCACHE || command == kMac_F_SETNOSIGPIPE) return 0;
  int own = TO_OWN(kCommands, command, -1);
  if (own < 0) refuse(NULL, "fcntl with the unknown command %d", command);
  if (own == F_SETFL) argument = FLAGS_TO_OWN(kOpenFlags, argument, "fcntl");
  int found = fcntl(fd, own, argument);
  return own == F_GETFL && found >= 0 ? FLAGS_TO_MAC(kOpenFlags, found) : found;
}

off_t mac_lseek(int fd, off_t offset, int whence) {
  static const Pair kSeeks[] = {SEEKS(PAIR)};
  return lseek(fd, offset, TO_OWN(kSeeks, whence, -1));
}

static int put_stat(int status, const struct stat* from, MacStat* to) {
  if (status == 0)
    *to = (MacStat){.dev = (int32_t)from->st_dev,
                    .mode = (uint16_t)from->st_mode,
                    .nlink = (uint16_t)from->st_nlink,
                    .ino = from->st_ino,
                    .uid = from->st_uid,
                    .gid = from->st_gid,
                    .rdev = (int32_t)from->st_rdev,
                    .atime = from->st_atim,
                    .mtime = from->st_mtim,
                    .ctime = from->st_ctim,
                    .birthtime = from->st_ctim,
                    .size = from->st_size,
                    .blocks = from->st_blocks,
                    .blksize = (int32_t)from->st_blksize};
  return status;
}
#define STAT(name, type)                                  \
  int mac_##name(type which, MacStat* to) {               \
    struct stat found;                                    \
    return put_stat(name(which, &found), &found, to);     \
  }
STAT(stat, const char*)
STAT(lstat, const char*)
STAT(fstat, int)

int mac_statvfs(const char* path, MacStatvfs* to) {
  struct statvfs found;
  int status = statvfs(path, &found);
  if (status == 0)  // ST_RDONLY and ST_NOSUID are the same
    *to = (MacStatvfs){found.f_bsize, found.f_frsize,
                       (uint32_t)found.f_blocks, (uint32_t)found.f_bfree,
                       (uint32_t)found.f_bavail, (uint32_t)found.f_files,
                       (uint32_t)found.f_ffree, (uint32_t)found.f_favail,
                       found.f_fsid, found.f_flag & 3, found.f_namemax};
  return status;
}
// One thread at a time may read from one directory, as on macOS.
MacDirent* mac_readdir(DIR* directory) {
  static __thread MacDirent entry;
  const struct dirent* found = readdir(directory);
  if (found == NULL) return NULL;
  size_t size = strlen(found->d_name);
  entry = (MacDirent){.ino = found->d_ino,
                      .reclen = (uint16_t)(offsetof(MacDirent, name) + size + 1),
                      .namlen = (uint16_t)size,
                      .type = found->d_type};
  memcpy(entry.name, found->d_name, size + 1);
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
  static const Pair kFlags[] = {MMAP_FLAGS(PAIR)};
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
      CLOCKS(PAIR){kMac_CLOCK_UPTIME_RAW, CLOCK_MONOTONIC}};
  int own = TO_OWN(kClocks, clock, -1);
  if (own < 0) refuse(NULL, "the unknown clock %d", clock);
  return clock_gettime(own, time);
}

// ---- the system ------------------------------------------------------------

long mac_sysconf(int name) {
  static const Pair kNames[] = {SYSCONF_NAMES(PAIR)};
  if (name == kMac__SC_PAGESIZE) return kPage;
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
int mac_uname(MacUtsname* to) {
  *to = (MacUtsname){"Darwin", "mac", "", "Darwin Kernel Version", "arm64"};
  // Darwin 23 is macOS 14, 25 is macOS 26.
  unsigned major = g_pretends >> 16;
  snprintf(to->release, sizeof to->release, "%u.0.0",
           major < 26 ? major + 9 : major - 1);
  return 0;
}
// The footprint is what is resident, of the emulator's process.
int mac_proc_pid_rusage(int pid, int flavor, MacRusage0* to) {
  if (flavor != kMac_RUSAGE_INFO_V0 || pid != getpid())
    refuse(NULL, "proc_pid_rusage of flavor %d", flavor);
  unsigned long all = 0, resident = 0;
  FILE* file = fopen("/proc/self/statm", "re");
  if (file != NULL && fscanf(file, "%lu %lu", &all, &resident) < 2) resident = 0;
  if (file != NULL) fclose(file);
  resident *= (unsigned long)sysconf(_SC_PAGESIZE);
  *to = (MacRusage0){.resident = resident, .phys_footprint = resident};
  return 0;
}
// Pairs of a platform and a version.
bool mac__availability_version_check(uint32_t count, const uint32_t* versions) {
  for (uint32_t i = 0; i < count; i++)
    if (versions[2 * i] == PLATFORM_MACOS && versions[2 * i + 1] > g_pretends)
      return false;
  return true;
}
