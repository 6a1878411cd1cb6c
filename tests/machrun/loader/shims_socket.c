// Sockets: addresses have a length byte, and the numbers differ. MLX's ring of
// machines uses them; nothing under test does.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "shims.h"

static const Pair kFamilies[] = {
    PAIR(AF_UNSPEC), PAIR(AF_UNIX), PAIR(AF_INET), PAIR(AF_INET6)};
static const Pair kOptions[] = {
    PAIR(SO_REUSEADDR), PAIR(SO_KEEPALIVE), PAIR(SO_BROADCAST),
    PAIR(SO_REUSEPORT), PAIR(SO_SNDBUF), PAIR(SO_RCVBUF)};
static const Pair kTcpOptions[] = {
    PAIR(TCP_NODELAY), PAIR(TCP_KEEPINTVL), PAIR(TCP_KEEPCNT),
    {apple_TCP_KEEPALIVE, TCP_KEEPIDLE}};
static const Pair kMessageFlags[] = {
    PAIR(MSG_OOB), PAIR(MSG_PEEK), PAIR(MSG_WAITALL), PAIR(MSG_DONTWAIT)};
static const Pair kAddressFlags[] = {
    PAIR(AI_PASSIVE), PAIR(AI_NUMERICHOST), PAIR(AI_ALL), PAIR(AI_ADDRCONFIG),
    PAIR(AI_V4MAPPED), PAIR(AI_NUMERICSERV)};
static const Pair kAddressErrors[] = {
    PAIR(EAI_AGAIN), PAIR(EAI_BADFLAGS), PAIR(EAI_FAIL), PAIR(EAI_FAMILY),
    PAIR(EAI_MEMORY), PAIR(EAI_NONAME), PAIR(EAI_SERVICE), PAIR(EAI_SOCKTYPE),
    PAIR(EAI_SYSTEM)};

typedef struct apple_sockaddr_storage MacAddress;

// Linux says that it does not know a family of which it has no number.
static int own_family(int family) { return TO_OWN(kFamilies, family, -1); }

// An address of macOS for a call, or of a call for macOS.
static struct sockaddr* own_address(const MacAddress* from, socklen_t size,
                                    struct sockaddr_storage* to) {
  memcpy(to, from, size < sizeof *to ? size : sizeof *to);
  to->ss_family = (sa_family_t)own_family(from->apple_ss_family);
  return (struct sockaddr*)to;
}
static void to_mac_address(MacAddress* address, socklen_t size) {
  int family = ((struct sockaddr*)address)->sa_family;
  address->apple_ss_len = (uint8_t)size;
  address->apple_ss_family = (uint8_t)TO_MAC(kFamilies, family, family);
}
int mac_socket(int family, int type, int protocol) {
  return socket(own_family(family), type, protocol);
}
int mac_bind(int fd, const MacAddress* address, socklen_t size) {
  struct sockaddr_storage own;
  return bind(fd, own_address(address, size, &own), size);
}
int mac_connect(int fd, const MacAddress* address, socklen_t size) {
  struct sockaddr_storage own;
  return connect(fd, own_address(address, size, &own), size);
}
int mac_accept(int fd, MacAddress* address, socklen_t* size) {
  int made = accept(fd, (struct sockaddr*)address, size);
  if (made >= 0 && address != NULL && *size >= 2)
    to_mac_address(address, *size);
  // On macOS it inherits this.
  if (made >= 0)
    fcntl(made, F_SETFL,
          fcntl(made, F_GETFL) | (fcntl(fd, F_GETFL) & O_NONBLOCK));
  return made;
}
int mac_setsockopt(int fd, int level, int name, const void* value,
                   socklen_t size) {
  int own = -1;
  if (level == IPPROTO_TCP) own = TO_OWN(kTcpOptions, name, -1);
  if (level == apple_SOL_SOCKET) own = TO_OWN(kOptions, name, -1);
  // `send` never raises the signal.
  if (level == apple_SOL_SOCKET && name == apple_SO_NOSIGPIPE) return 0;
  if (own < 0)
    refuse(NULL, "setsockopt of level %#x with the unknown option %#x", level,
           name);
  return setsockopt(fd, level == apple_SOL_SOCKET ? SOL_SOCKET : level, own,
                    value, size);
}
// Linux's signal for a broken connection is off, as with SO_NOSIGPIPE.
ssize_t mac_send(int fd, const void* data, size_t size, int flags) {
  int own = FLAGS_TO_OWN(kMessageFlags, flags, "send");
  return send(fd, data, size, own | MSG_NOSIGNAL);
}
ssize_t mac_recv(int fd, void* data, size_t size, int flags) {
  return recv(fd, data, size, FLAGS_TO_OWN(kMessageFlags, flags, "recv"));
}

// One block for all entries and their addresses, so that freeing is one call.
typedef struct {
  struct apple_addrinfo info;
  MacAddress address;
} Entry;
int mac_getaddrinfo(const char* host, const char* service,
                    const struct apple_addrinfo* hints,
                    struct apple_addrinfo** result) {
  struct addrinfo wanted = {0}, *found;
  if (hints != NULL)
    wanted = (struct addrinfo){
        .ai_flags =
            FLAGS_TO_OWN(kAddressFlags, hints->apple_ai_flags, "getaddrinfo"),
        .ai_family = own_family(hints->apple_ai_family),
        .ai_socktype = hints->apple_ai_socktype,
        .ai_protocol = hints->apple_ai_protocol};
  int status = getaddrinfo(host, service, hints ? &wanted : NULL, &found);
  if (status != 0) return TO_MAC(kAddressErrors, status, apple_EAI_FAIL);
  size_t count = 0;
  for (struct addrinfo* at = found; at; at = at->ai_next) count++;
  Entry *all = calloc(count, sizeof *all), *to = all;
  for (struct addrinfo* at = found; all && at; at = at->ai_next, to++) {
    memcpy(&to->address, at->ai_addr, at->ai_addrlen);
    to_mac_address(&to->address, at->ai_addrlen);
    to->info = (struct apple_addrinfo){
        .apple_ai_family = to->address.apple_ss_family,
        .apple_ai_socktype = at->ai_socktype,
        .apple_ai_protocol = at->ai_protocol,
        .apple_ai_addrlen = at->ai_addrlen,
        .apple_ai_addr = (void*)&to->address,
        .apple_ai_next = at->ai_next ? &to[1].info : NULL};
  }
  freeaddrinfo(found);
  *result = (struct apple_addrinfo*)all;
  return all ? 0 : apple_EAI_MEMORY;
}
