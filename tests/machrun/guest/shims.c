// Compiled for macOS with Apple's headers, and run under machrun: what the shims do
// as a program for macOS sees it. run DIRECTORY PORT prints a line for each check
// that failed, and `checks N` at the end.
#include <copyfile.h>
#include <ctype.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <libproc.h>
#include <limits.h>
#include <locale.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysctl.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

static int g_checks;
#define CHECK(what)                                                          \
  do {                                                                       \
    g_checks++;                                                              \
    if (!(what)) printf("%s: %s (errno %d)\n", __func__, #what, errno);      \
  } while (0)
// Fails with that number.
#define FAILS(call, number) CHECK((call) == -1 && errno == (number))

static char g_file[512];

static void files(const char* directory) {
  snprintf(g_file, sizeof g_file, "%s/%s-%d", directory, "file", 7);
  FAILS(open(g_file, O_RDONLY), ENOENT);
  int fd = open(g_file, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0640);
  CHECK(fd >= 0);
  FAILS(open(g_file, O_CREAT | O_EXCL | O_RDWR, 0640), EEXIST);
  FAILS(open(g_file, O_RDONLY | O_DIRECTORY), ENOTDIR);
  CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
  CHECK(fcntl(fd, F_SETFD, 0) == 0 && fcntl(fd, F_GETFD) == 0);
  CHECK(fcntl(fd, F_SETFL, O_APPEND | O_NONBLOCK) == 0);
  CHECK(fcntl(fd, F_GETFL) == (O_RDWR | O_APPEND | O_NONBLOCK));
  int copy = fcntl(fd, F_DUPFD_CLOEXEC, 100);
  CHECK(copy >= 100 && fcntl(copy, F_GETFD) == FD_CLOEXEC);
  CHECK(fcntl(fd, F_FULLFSYNC) == 0 && fcntl(fd, F_NOCACHE, 1) == 0);
  CHECK(write(fd, "twelve bytes", 12) == 12);
  struct stat one, two;
  CHECK(stat(g_file, &one) == 0 && fstat(copy, &two) == 0);
  CHECK(one.st_size == 12 && one.st_ino == two.st_ino && one.st_nlink == 1);
  CHECK(S_ISREG(one.st_mode) && (one.st_mode & 0777) == 0640);
  struct timespec now;
  CHECK(clock_gettime(CLOCK_REALTIME, &now) == 0);
  CHECK(labs(now.tv_sec - one.st_mtimespec.tv_sec) < 600);
  char* map = mmap(NULL, 12, PROT_READ, MAP_PRIVATE, fd, 0);
  CHECK(map != MAP_FAILED && !memcmp(map, "twelve bytes", 12));
  map = mmap(NULL, 100, PROT_READ | PROT_WRITE, MAP_ANON | MAP_SHARED, -1, 0);
  CHECK(map != MAP_FAILED && map[99] == 0);
  CHECK(mmap(NULL, 12, PROT_READ, MAP_PRIVATE, fd, 4096) == MAP_FAILED);
  CHECK(errno == EINVAL);  // pages have 16 KiB
  CHECK(lseek(fd, 0, SEEK_DATA) == 0 && lseek(fd, 0, SEEK_HOLE) == 12);
  FAILS(lseek(fd, 0, 9), EINVAL);
  CHECK(close(copy) == 0 && close(fd) == 0);
  FAILS(close(fd), EBADF);
  char name[300];
  memset(name, 'x', sizeof name);
  name[299] = '\0';
  FAILS(mkdir(name, 0700), ENAMETOOLONG);
}

static void directories(const char* directory) {
  char path[512];
  snprintf(path, sizeof path, "%s/inner", directory);
  CHECK(mkdir(path, 0700) == 0);
  DIR* opened = opendir(directory);
  CHECK(opened != NULL);
  int seen = 0;
  for (struct dirent* at; (at = readdir(opened)) != NULL;) {
    CHECK(at->d_namlen == strlen(at->d_name) && at->d_ino != 0);
    CHECK(at->d_reclen > at->d_namlen);
    if (!strcmp(at->d_name, "inner")) seen |= at->d_type == DT_DIR ? 1 : 0;
    if (!strcmp(at->d_name, "file-7")) seen |= at->d_type == DT_REG ? 2 : 0;
  }
  CHECK(seen == 3 && closedir(opened) == 0);
  struct statvfs found;
  CHECK(statvfs(directory, &found) == 0 && found.f_namemax == 255);
  CHECK(found.f_frsize >= 512 && found.f_blocks >= found.f_bavail);
  CHECK(found.f_blocks > 0 && (found.f_flag & ST_RDONLY) == 0);
  FAILS(statvfs("/nowhere", &found), ENOENT);
}

static struct sockaddr_in at_port(int port) {
  return (struct sockaddr_in){.sin_len = sizeof(struct sockaddr_in),
                              .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)port),
                              .sin_addr = {htonl(INADDR_LOOPBACK)}};
}

static void sockets(int port) {
  struct sockaddr_in address = at_port(port), peer;
  int on = 1, size = 65536, client = socket(AF_INET, SOCK_STREAM, 0);
  FAILS(connect(client, (void*)&address, sizeof address), ECONNREFUSED);
  int server = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
  CHECK(setsockopt(server, SOL_SOCKET, SO_RCVBUF, &size, sizeof size) == 0);
  CHECK(setsockopt(server, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on) == 0);
  CHECK(setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
  CHECK(setsockopt(client, IPPROTO_TCP, TCP_KEEPALIVE, &on, sizeof on) == 0);
  CHECK(bind(server, (void*)&address, sizeof address) == 0);
  CHECK(listen(server, 1) == 0);
  int other = socket(AF_INET, SOCK_STREAM, 0);
  FAILS(bind(other, (void*)&address, sizeof address), EADDRINUSE);
  FAILS(socket(AF_SYSTEM, SOCK_STREAM, 0), EAFNOSUPPORT);
  client = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(connect(client, (void*)&address, sizeof address) == 0);
  socklen_t length = sizeof peer;
  CHECK(fcntl(server, F_SETFL, O_NONBLOCK) == 0);
  int accepted = accept(server, (void*)&peer, &length);
  CHECK(fcntl(accepted, F_GETFL) & O_NONBLOCK);  // inherited
  FAILS(recv(accepted, (char[4]){0}, 4, 0), EAGAIN);
  CHECK(fcntl(accepted, F_SETFL, 0) == 0 && fcntl(server, F_SETFL, 0) == 0);
  CHECK(accepted >= 0 && length == sizeof peer);
  CHECK(peer.sin_family == AF_INET && peer.sin_len == sizeof peer);
  CHECK(peer.sin_addr.s_addr == htonl(INADDR_LOOPBACK));
  char data[8] = "";
  FAILS(recv(accepted, data, 4, MSG_DONTWAIT), EAGAIN);
  CHECK(send(client, "four", 4, 0) == 4);
  CHECK(recv(accepted, data, 4, MSG_PEEK | MSG_WAITALL) == 4);
  CHECK(recv(accepted, data, 4, MSG_WAITALL) == 4 && !strcmp(data, "four"));
  CHECK(shutdown(client, SHUT_WR) == 0 && recv(accepted, data, 4, 0) == 0);
  FAILS(send(0x7fff, "x", 1, 0), EBADF);
  FAILS(recv(server, data, 1, 0), ENOTCONN);
}

static void local_sockets(const char* directory) {
  struct sockaddr_un address = {.sun_len = sizeof address, .sun_family = AF_UNIX};
  snprintf(address.sun_path, sizeof address.sun_path, "%s/s", directory);
  int server = socket(AF_UNIX, SOCK_STREAM, 0);
  int client = socket(AF_UNIX, SOCK_STREAM, 0);
  if (strlen(directory) + 3 > sizeof address.sun_path) return;
  FAILS(connect(client, (void*)&address, sizeof address), ENOENT);
  CHECK(bind(server, (void*)&address, sizeof address) == 0);
  CHECK(listen(server, 1) == 0);
  CHECK(connect(client, (void*)&address, sizeof address) == 0);
}

static void addresses(void) {
  struct addrinfo hints = {.ai_flags = AI_NUMERICHOST,
                           .ai_family = AF_INET6,
                           .ai_socktype = SOCK_STREAM},
                  *found = NULL;
  CHECK(getaddrinfo("::1", "80", &hints, &found) == 0 && found != NULL);
  CHECK(found->ai_family == AF_INET6 && found->ai_socktype == SOCK_STREAM);
  struct sockaddr_in6* six = (void*)found->ai_addr;
  CHECK(six->sin6_len == found->ai_addrlen && six->sin6_family == AF_INET6);
  CHECK(six->sin6_port == htons(80) && six->sin6_addr.s6_addr[15] == 1);
  freeaddrinfo(found);
  CHECK(getaddrinfo("no number", "80", &hints, &found) == EAI_NONAME);
  hints.ai_flags |= AI_NUMERICSERV;
  CHECK(getaddrinfo("::1", "http", &hints, &found) == EAI_NONAME);
}

static volatile sig_atomic_t g_number, g_own, g_on_stack;
static char g_stack[65536];
static void handle(int number, siginfo_t* info, void* context) {
  char here;
  g_number = number;
  g_own = info->si_signo == number && info->si_pid == getpid() &&
          ((ucontext_t*)context)->uc_mcontext->__ss.__pc != 0;
  g_on_stack = &here >= g_stack && &here < g_stack + sizeof g_stack;
}

static volatile sig_atomic_t g_code, g_status;
static volatile pid_t g_pid;
static void handle_child(int number, siginfo_t* info, void* context) {
  (void)number, (void)context;
  g_code = info->si_code;
  g_status = info->si_status;
  g_pid = info->si_pid;
}

static void children(void) {
  struct sigaction action = {.sa_flags = SA_SIGINFO | SA_RESTART};
  action.sa_sigaction = handle_child;
  CHECK(sigaction(SIGCHLD, &action, NULL) == 0);
  CHECK(pclose(popen("exit 3", "r")) == 3 << 8);
  CHECK(g_code == CLD_EXITED && g_status == 3 && g_pid > 0);
}

static void signals(void) {
  stack_t stack = {.ss_sp = g_stack, .ss_size = sizeof g_stack}, before;
  stack.ss_size = MINSIGSTKSZ - 1;
  FAILS(sigaltstack(&stack, NULL), ENOMEM);
  stack.ss_size = sizeof g_stack;
  CHECK(sigaltstack(&stack, NULL) == 0 && sigaltstack(NULL, &before) == 0);
  CHECK(before.ss_sp == g_stack && before.ss_size == sizeof g_stack);
  CHECK((before.ss_flags & SS_DISABLE) == 0);
  struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK}, old;
  action.sa_sigaction = handle;
  static const int kNumbers[] = {SIGUSR1, SIGUSR2, SIGBUS, SIGCHLD, SIGURG};
  for (int i = 0; i < 5; i++) {
    CHECK(sigaction(kNumbers[i], &action, &old) == 0);
    CHECK(old.sa_handler == SIG_DFL);
    CHECK(raise(kNumbers[i]) == 0 && g_number == kNumbers[i]);
    CHECK(g_own && g_on_stack);
  }
  CHECK(sigaction(SIGUSR1, NULL, &old) == 0 && old.sa_sigaction == handle);
  CHECK(old.sa_flags == (SA_SIGINFO | SA_ONSTACK));
  action.sa_flags |= SA_RESETHAND;
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0 && raise(SIGUSR1) == 0);
  CHECK(sigaction(SIGUSR1, NULL, &old) == 0 && old.sa_handler == SIG_DFL);
  action = (struct sigaction){.sa_handler = SIG_IGN};
  CHECK(sigaction(SIGUSR2, &action, NULL) == 0 && raise(SIGUSR2) == 0);
  FAILS(sigaction(SIGKILL, &action, NULL), EINVAL);
  FAILS(sigaction(SIGINFO, &action, NULL), EINVAL);
  FAILS(sigaction(99, &action, NULL), EINVAL);
}

static void jumps(void) {
  sigjmp_buf place;
  volatile double kept = 1.5;
  int value = sigsetjmp(place, 1);
  if (value == 0) siglongjmp(place, 7);
  CHECK(value == 7 && kept == 1.5);
}

static pthread_mutex_t g_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t g_condition = PTHREAD_COND_INITIALIZER;
static pthread_key_t g_key;
static int g_shared, g_ended;
static uint32_t g_word;
extern int __ulock_wait(uint32_t, void*, uint64_t, uint32_t);
extern int __ulock_wake(uint32_t, void*, uint64_t);

static void at_end(void* value) { g_ended += *(int*)value; }
static void* work(void* argument) {
  pthread_setspecific(g_key, argument);
  pthread_mutex_lock(&g_mutex);
  g_shared = 1;
  pthread_cond_signal(&g_condition);
  pthread_mutex_unlock(&g_mutex);
  usleep(20000);
  __atomic_store_n(&g_word, 1, __ATOMIC_RELEASE);
  __ulock_wake(1 | 0x100, &g_word, 0);
  return pthread_getspecific(g_key);
}

static void threads(void) {
  static pthread_mutex_t again = PTHREAD_RECURSIVE_MUTEX_INITIALIZER;
  CHECK(pthread_mutex_lock(&again) == 0 && pthread_mutex_lock(&again) == 0);
  pthread_mutexattr_t attributes;
  pthread_mutex_t checked;
  CHECK(pthread_mutexattr_init(&attributes) == 0);
  CHECK(pthread_mutexattr_settype(&attributes, 99) == EINVAL);
  CHECK(!pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK));
  CHECK(pthread_mutex_init(&checked, &attributes) == 0);
  CHECK(pthread_mutexattr_destroy(&attributes) == 0);
  CHECK(pthread_mutex_lock(&checked) == 0);
  CHECK(pthread_mutex_lock(&checked) == EDEADLK);
  CHECK(pthread_mutex_trylock(&checked) == EBUSY);
  CHECK(pthread_mutex_unlock(&checked) == 0);
  CHECK(pthread_mutex_unlock(&checked) == EPERM);
  CHECK(pthread_mutex_destroy(&checked) == 0);
  CHECK(pthread_join(pthread_self(), NULL) == EDEADLK);
  pthread_t thread;
  int value = 5;
  void* result = NULL;
  CHECK(pthread_key_create(&g_key, at_end) == 0);
  pthread_mutex_lock(&g_mutex);
  CHECK(pthread_create(&thread, NULL, work, &value) == 0);
  while (!g_shared) pthread_cond_wait(&g_condition, &g_mutex);
  struct timespec past = {1, 0};
  CHECK(pthread_cond_timedwait(&g_condition, &g_mutex, &past) == ETIMEDOUT);
  pthread_mutex_unlock(&g_mutex);
  while (__atomic_load_n(&g_word, __ATOMIC_ACQUIRE) == 0)
    __ulock_wait(1, &g_word, 0, 5000000);
  CHECK(__ulock_wait(1, &g_word, 0, 0) >= 0);     // it is another value
  CHECK(__ulock_wait(1, &g_word, 1, 1000) <= 0);  // it ends after a time
  CHECK(pthread_join(thread, &result) == 0 && result == &value);
  CHECK(g_ended == 5);
  uint64_t id = 0;
  CHECK(pthread_threadid_np(NULL, &id) == 0 && id != 0);
}

static void system_itself(void) {
  struct rusage_info_v0 before, after;
  int self = getpid();
  CHECK(proc_pid_rusage(self, RUSAGE_INFO_V0, (void*)&before) == 0);
  size_t size = 32 << 20;
  volatile char* memory = malloc(size);
  for (size_t i = 0; i < size; i += 4096) memory[i] = 1;
  CHECK(proc_pid_rusage(self, RUSAGE_INFO_V0, (void*)&after) == 0);
  CHECK(after.ri_phys_footprint > before.ri_phys_footprint + size / 2);
  CHECK(memory[0] == 1);
  struct utsname name;
  CHECK(uname(&name) == 0 && !strcmp(name.machine, "arm64"));
  CHECK(!strcmp(name.sysname, "Darwin") && !strcmp(name.release, "23.0.0"));
  CHECK(sysconf(_SC_PAGESIZE) == 16384 && sysconf(_SC_NPROCESSORS_ONLN) > 0);
  uint64_t bytes = 0;
  size_t room = 2;
  FAILS(sysctlbyname("hw.memsize", &bytes, &room, NULL, 0), ENOMEM);
  room = sizeof bytes;
  CHECK(sysctlbyname("hw.memsize", &bytes, &room, NULL, 0) == 0 && bytes);
  FAILS(sysctlbyname("hw.nothing", &bytes, &room, NULL, 0), ENOENT);
  FAILS(sysctlbyname("hw.memsize", NULL, NULL, &bytes, sizeof bytes), EPERM);
  static const clockid_t kClocks[] = {CLOCK_MONOTONIC, CLOCK_UPTIME_RAW,
                                      CLOCK_PROCESS_CPUTIME_ID};
  for (int i = 0; i < 3; i++) {
    struct timespec one = {0}, two = {0};
    CHECK(clock_gettime(kClocks[i], &one) == 0);
    CHECK(clock_gettime(kClocks[i], &two) == 0);
    CHECK(two.tv_sec > one.tv_sec ||
          (two.tv_sec == one.tv_sec && two.tv_nsec >= one.tv_nsec));
  }
}

static void texts(void) {
  char text[128];
  int number = 0, size = snprintf(text, sizeof text, "%d %s %.2f %ld %Lg %5c|",
                                  -1, "two", 3.25, 4L << 40, 5.5L, 'x');
  CHECK(!strcmp(text, "-1 two 3.25 4398046511104 5.5     x|"));
  CHECK(size == (int)strlen(text));
  double one = 0;
  long double two = 0;
  CHECK(sscanf("1.5 7 2.5", "%lf %d %Lf", &one, &number, &two) == 3);
  CHECK(one == 1.5 && number == 7 && two == 2.5L);
  CHECK(isalpha('x') && !isalpha('1') && isspace('\t') && isxdigit('F'));
  CHECK(tolower('X') == 'x' && toupper('x') == 'X' && !isalpha(0xe4));
  CHECK(setlocale(LC_ALL, "xx_XX") == NULL && setlocale(LC_ALL, "C") != NULL);
  CHECK(strerror_r(ETIMEDOUT, text, sizeof text) == 0);
  CHECK(strstr(text, "timed out") != NULL);
  CHECK(strerror_r(ETIMEDOUT, text, 3) == ERANGE);
  CHECK(strerror_r(9999, text, sizeof text) == EINVAL);
  CHECK(!strcmp(text, "Unknown error: 9999"));
  // Linux has these numbers for others.
  CHECK(strerror_r(EDEADLK, text, sizeof text) == 0 && strstr(text, "deadlock"));
  CHECK(snprintf(text, sizeof text, "%p|%p", NULL, (void*)16) == 8);
  CHECK(!strcmp(text, "0x0|0x10"));
  struct lconv* c = localeconv();
  CHECK(c->int_frac_digits == CHAR_MAX && c->n_sign_posn == CHAR_MAX);
  CHECK(!strcmp(c->decimal_point, ".") && c->grouping[0] == '\0');
}

static void memory(void) {
  char* kept = malloc(8);
  kept = realloc(kept, 0);
  CHECK(kept != NULL);
  free(kept);
  CHECK(aligned_alloc(64, 100) == NULL && errno == EINVAL);
  void* aligned = aligned_alloc(64, 128);
  CHECK(aligned != NULL && (uintptr_t)aligned % 64 == 0);
}

static void libraries(void) {
  CHECK(dlopen("/nowhere.dylib", RTLD_NOW) == NULL);
  CHECK(dlerror() != NULL && dlerror() == NULL);  // told once
  CHECK(dlopen(g_file, RTLD_NOLOAD) == NULL);     // nor is it looked at
  CHECK(dlsym(RTLD_DEFAULT, "lseek") == (void*)lseek);
  CHECK(dlsym(RTLD_DEFAULT, "no_such_name") == NULL && dlerror() != NULL);
}

int run(int count, char** arguments) {
  if (count != 3) return 1;
  files(arguments[1]);
  directories(arguments[1]);
  sockets(atoi(arguments[2]));
  local_sockets(arguments[1]);
  addresses();
  signals();
  children();
  jumps();
  threads();
  system_itself();
  texts();
  memory();
  libraries();
  printf("checks %d\n", g_checks);
  return 0;
}

// What no shim knows ends the process, by name.
int unknown_open(void) { return open("/", 0x8000); }
int unknown_fcntl(void) { return fcntl(0, 999); }
int unknown_send(void) { return (int)send(0, "", 0, 0x40000); }
int unknown_mmap(void) { return mmap(NULL, 1, 0, 0x800, -1, 0) == NULL; }
int unknown_clock(void) { return clock_gettime(99, NULL); }
int unknown_attributes(void) {
  pthread_t thread;
  return pthread_create(&thread, (const pthread_attr_t*)&thread, work, NULL);
}
int unknown_option(void) {
  return setsockopt(0, SOL_SOCKET, SO_USELOOPBACK, "", 0);
}
int unknown_level(void) { return setsockopt(0, IPPROTO_IPV6, 27, "", 0); }
int unknown_signal(void) { return raise(SIGEMT); }
int unknown_handle(void) { return dlsym(RTLD_NEXT, "open") == NULL; }
int absent(void) { return fcopyfile(0, 1, NULL, 0); }
