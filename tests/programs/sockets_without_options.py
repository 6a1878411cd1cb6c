"""The protected server, whose sockets take no TCP option."""

import errno
import socket
import sys

from mlx_safe.cli import main


def refuse(self, level, *_):
    if level == socket.IPPROTO_TCP:
        raise OSError(errno.EINVAL, "Invalid argument")
    return set_option(self, level, *_)


set_option, socket.socket.setsockopt = socket.socket.setsockopt, refuse
sys.exit(main(["serve", *sys.argv[1:]]))
