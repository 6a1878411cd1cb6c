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

static const Pair kFamilies[] = {ADDRESS_FAMILIES(PAIR)};
static const Pair kOptions[] = {SOCKET_OPTIONS(PAIR)};
static const Pair kTcpOptions[] = {
    TCP_OPTIONS(PAIR){kMac_TCP_KEEPALIVE, TCP_KEEPIDLE}};
static const Pair kMessageFlags[] = {MESSAGE_FLAGS(PAIR)};
static const Pair kAddressFlags[] = {ADDRESS_FLAGS(PAIR)};
static const Pair kAddressErrors[] = {ADDRESS_ERRORS(PAIR)};

// Linux says that it does not know a family of which it has no number.
static int own_family(int family) { return TO_OWN(kFamilies, family, -1); }

// An address of macOS for a call, or of a call for macOS.
static struct sockaddr* own_address(const MacSockaddr* from, socklen_t size,
                                    struct sockaddr_storage* to) {
  memcpy(to, from, size < sizeof *to ? size : sizeof *to);
  to->ss_family = (sa_family_t)own_family(from->family);
  return (struct sockaddr*)to;
}
static void to_mac_address(MacSockaddr* address, socklen_t size) {
  int family = ((struct sockaddr*)address)->sa_family;
  address->len = (uint8_t)size;
  address->family = (uint8_t)TO_MAC(kFamilies, family, family);
}
int mac_socket(int family, int type, int protocol) {
  return socket(own_family(family), type, protocol);
}
int mac_bind(int fd, const MacSockaddr* address, socklen_t size) {
  struct sockaddr_storage own;
  return bind(fd, own_address(address, size, &own), size);
}
int mac_connect(int fd, const MacSockaddr* address, socklen_t size) {
  struct sockaddr_storage own;
  return connect(fd, own_address(address, size, &own), size);
}
int mac_accept(int fd, MacSockaddr* address, socklen_t* size) {
  int made = accept(fd, (struct sockaddr*)address, size);
  if (made >= 0 && address != NULL && *size >= 2)
    to_mac_address(address, *size);
  // On macOS it inherits this.
  if (made >= 0)
    fcntl(made, F_SETFL, fcntl(made, F_GETFL) | (fcntl(fd, F_GETFL) & O_NONBLOCK));
  return made;
}
int mac_setsockopt(int fd, int level, int name, const void* value,
                   socklen_t size) {
  int own = -1;
  if (level == IPPROTO_TCP) own = TO_OWN(kTcpOptions, name, -1);
  if (level == kMac_SOL_SOCKET) own = TO_OWN(kOptions, name, -1);
  // `send` never raises the signal.
  if (level == kMac_SOL_SOCKET && name == kMac_SO_NOSIGPIPE) return 0;
  if (own < 0)
    refuse(NULL, "setsockopt of level %#x with the unknown option %#x", level,
           name);
  return setsockopt(fd, level == kMac_SOL_SOCKET ? SOL_SOCKET : level, own,
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
  MacAddrinfo info;
  MacSockaddr address;
} Entry;
int mac_getaddrinfo(const char* host, const char* service,
                    const MacAddrinfo* hints, MacAddrinfo** result) {
  struct addrinfo wanted = {0}, *found;
  if (hints != NULL)
    wanted = (struct addrinfo){
        .ai_flags = FLAGS_TO_OWN(kAddressFlags, hints->flags, "getaddrinfo"),
        .ai_family = own_family(hints->family),
        .ai_socktype = hints->socktype,
        .ai_protocol = hints->protocol};
  int status = getaddrinfo(host, service, hints ? &wanted : NULL, &found);
  if (status != 0) return TO_MAC(kAddressErrors, status, kMac_EAI_FAIL);
  size_t count = 0;
  for (struct addrinfo* at = found; at; at = at->ai_next) count++;
  Entry *all = calloc(count, sizeof *all), *to = all;
  for (struct addrinfo* at = found; all && at; at = at->ai_next, to++) {
    memcpy(&to->address, at->ai_addr, at->ai_addrlen);
    to_mac_address(&to->address, at->ai_addrlen);
    to->info = (MacAddrinfo){.family = to->address.family,
                             .socktype = at->ai_socktype,
                             .protocol = at->ai_protocol,
                             .addrlen = at->ai_addrlen,
                             .addr = &to->address,
                             .next = at->ai_next ? &to[1].info : NULL};
  }
  freeaddrinfo(found);
  *result = (MacAddrinfo*)all;
  return all ? 0 : kMac_EAI_MEMORY;
}
