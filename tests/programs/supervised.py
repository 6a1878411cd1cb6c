"""The supervisor of a server that is given to it as a text."""

import sys

from mlx_safe.server import holding, supervisor

SERVER = ""
holding.ANSWER_TIMEOUT_S = 60.0
kind = supervisor.Supervisor
supervisor.Supervisor = lambda listener, command, hold_s, **more: kind(
    listener, [sys.executable, "-c", SERVER, *command[4:]], hold_s
)
sys.exit(supervisor.main(sys.argv[1:]))
