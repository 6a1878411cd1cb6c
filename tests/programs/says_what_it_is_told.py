"""A server that says what it is told to, and dies.

Its arguments: a file that counts its lives, how many of them it has, what it says in
each.
"""

import sys
from pathlib import Path

from mlx_safe.server.handover import Handover, Message

path, lives, *said = sys.argv[1:]
with Path(path).open("a") as file:
    file.write("x")
parent = Handover.of_environment()
for name in said:
    parent.tell(Message[name])
sys.exit(0 if Path(path).stat().st_size >= int(lives) else 1)
