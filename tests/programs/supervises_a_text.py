"""The supervisor of servers whose program is PROGRAM, a text before this one."""

import os
import sys

PROGRAM: str
os.environ["MLX_SAFE_AUTOINSTALL"] = "0"

from mlx_safe.server import supervisor

kind = supervisor.Supervisor


def controlled(listener, command, *more, **named):
    command = [sys.executable, "-c", PROGRAM, *command[4:]]  # noqa: F821
    return kind(listener, command, *more, **named)


supervisor.Supervisor = controlled
sys.exit(supervisor.main(sys.argv[1:]))
