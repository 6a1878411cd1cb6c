"""What clients do not read is soon all that the system takes of an answer."""

import socket

create = socket.create_server


def narrow(*args, **more):
    made = create(*args, **more)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return made


socket.create_server = narrow
