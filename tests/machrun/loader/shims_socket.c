// Sockets: addresses have a length byte, and the numbers differ. MLX's ring of
// machines uses them; nothing under test does.
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "shims.h"

static int linux_family(int family) {
  return family == kMac_AF_INET6 ? AF_INET6
                                 : family;  // the others are the same
}
static int mac_family(int family) {
  return family == AF_INET6 ? kMac_AF_INET6 : family;
}
static const struct sockaddr* linux_address(const MacSockaddr* from,
                                            socklen_t size,
                                            struct sockaddr_storage* to) {
  if (size > sizeof *to) size = sizeof *to;
  memcpy(to, from, size);
  to->ss_family = (sa_family_t)linux_family(from->family);
  return (struct sockaddr*)to;
}
static void to_mac_address(MacSockaddr* address, socklen_t size) {
  int family = ((struct sockaddr*)address)->sa_family;
  address->len = (uint8_t)size;
  address->family = (uint8_t)mac_family(family);
}
int mac_socket(int family, int type, int protocol) {
  return socket(linux_family(family), type, protocol);
}
int mac_bind(int fd, const MacSockaddr* address, socklen_t size) {
  struct sockaddr_storage own;
  return bind(fd, linux_address(address, size, &own), size);
}
int mac_connect(int fd, const MacSockaddr* address, socklen_t size) {
  struct sockaddr_storage own;
  return connect(fd, linux_address(address, size, &own), size);
}
int mac_accept(int fd, MacSockaddr* address, socklen_t* size) {
  int made = accept(fd, (struct sockaddr*)address, size);
  if (made >= 0 && address != NULL && *size >= 2)
    to_mac_address(address, *size);
  return made;
}
int mac_setsockopt(int fd, int level, int name, const void* value,
                   socklen_t size) {
  static const int kOptions[][2] = {{kMac_SO_REUSEADDR, SO_REUSEADDR},
                                    {kMac_SO_KEEPALIVE, SO_KEEPALIVE},
                                    {kMac_SO_REUSEPORT, SO_REUSEPORT},
                                    {kMac_SO_SNDBUF, SO_SNDBUF},
                                    {kMac_SO_RCVBUF, SO_RCVBUF}};
  if (level != kMac_SOL_SOCKET) return setsockopt(fd, level, name, value, size);
  for (size_t i = 0; i < sizeof kOptions / sizeof *kOptions; i++)
    if (kOptions[i][0] == name)
      return setsockopt(fd, SOL_SOCKET, kOptions[i][1], value, size);
  errno = EINVAL;
  return -1;
}
static int linux_flags(int flags) {
  int known = kMac_MSG_WAITALL | kMac_MSG_DONTWAIT | 0x3;
  if (flags & ~known)
    refuse(NULL, "a message with the unknown flags %#x", flags);
  return (flags & 3) | (flags & kMac_MSG_WAITALL ? MSG_WAITALL : 0) |
         (flags & kMac_MSG_DONTWAIT ? MSG_DONTWAIT : 0) | MSG_NOSIGNAL;
}
ssize_t mac_send(int fd, const void* data, size_t size, int flags) {
  return send(fd, data, size, linux_flags(flags));
}
ssize_t mac_recv(int fd, void* data, size_t size, int flags) {
  return recv(fd, data, size, linux_flags(flags) & ~MSG_NOSIGNAL);
}

// One block for all entries and their addresses, so that freeing is one call.
typedef struct {
  MacAddrinfo info;
  MacSockaddr address;
} Entry;
int mac_getaddrinfo(const char* host, const char* service,
                    const MacAddrinfo* hints, MacAddrinfo** result) {
  struct addrinfo wanted = {0}, *found;
  if (hints != NULL) {
    wanted.ai_flags = hints->flags & 7;  // these three are the same
    wanted.ai_family = linux_family(hints->family);
    wanted.ai_socktype = hints->socktype;
    wanted.ai_protocol = hints->protocol;
  }
  int status = getaddrinfo(host, service, hints ? &wanted : NULL, &found);
  if (status != 0) return 8;  // EAI_NONAME
  size_t count = 0;
  for (struct addrinfo* at = found; at; at = at->ai_next) count++;
  Entry* all = calloc(count, sizeof *all);
  Entry* entry = all;
  for (struct addrinfo* at = found; all && at; at = at->ai_next, entry++) {
    memcpy(&entry->address, at->ai_addr, at->ai_addrlen);
    to_mac_address(&entry->address, at->ai_addrlen);
    entry->info = (MacAddrinfo){0,
                                mac_family(at->ai_family),
                                at->ai_socktype,
                                at->ai_protocol,
                                at->ai_addrlen,
                                NULL,
                                &entry->address,
                                at->ai_next ? &entry[1].info : NULL};
  }
  freeaddrinfo(found);
  *result = (MacAddrinfo*)all;
  return 0;
}
void mac_freeaddrinfo(MacAddrinfo* all) { free(all); }
