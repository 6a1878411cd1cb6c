"""A server that is given a connection and ends.

Its files are closed a while before, as those of a large process are on macOS. The next
one answers what it is given.
"""

import socket
import sys
import time
from pathlib import Path
from socket import socket as Socket

from mlx_safe.server.handover import Handover, Message

parent = Handover.of_environment()
given: list[Socket] = []
lived = Path(sys.argv[1])
is_first = not lived.exists()
lived.touch()
parent.tell(Message.LISTENS)
parent.take_over(lambda connection, held: given.append(connection))
end = time.monotonic() + 30
while not given and time.monotonic() < end:
    time.sleep(0.01)
if is_first:
    assert parent._channel is not None
    parent._channel.shutdown(socket.SHUT_RDWR)
    time.sleep(4)
    sys.exit(1)
for connection in given:
    connection.sendall(b"answer")
