"""The protected server, whose connections have short timeouts and small buffers."""

import socket
import sys

from mlx_safe.cli import main
from mlx_safe.server import http_server

kind = http_server.Server


class Small(kind):
    def get_request(self):
        from mlx_safe.server.handler import ProtectedHandler

        ProtectedHandler.timeout = 1
        connection, address = super().get_request()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection, address


http_server.Server = Small
sys.exit(main(["serve", *sys.argv[1:]]))
