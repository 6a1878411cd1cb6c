"""A server that reads a connection, and says when it has begun."""

import socket
import sys

from mlx_safe.server.request_file import RequestFile

connection = socket.socket(fileno=int(sys.argv[1]))
file = RequestFile(int(sys.argv[2]))
buffer = memoryview(bytearray(1 << 20))
print(flush=True)
while file.receive(connection, buffer):
    pass
