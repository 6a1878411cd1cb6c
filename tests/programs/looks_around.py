"""What a Python finds as it begins."""

import json
import os
import signal
import sys
import threading

ours = ("mlx", "mlx_lm", "mlx_safe", "pytest")
numbers = sorted(set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP})
print(
    json.dumps(
        {
            "imported": sorted(
                name for name in sys.modules if name.split(".")[0] in ours
            ),
            "arguments": [sys.argv, sys.orig_argv, sys.path],
            "name": __name__,
            "parent": os.getppid(),
            "group": [os.getpgid(0), os.getsid(0)],
            "directory": os.getcwd(),
            "environment": dict(os.environ),
            "threads": [threading.active_count(), threading.current_thread().name],
            "signals": [str(signal.getsignal(number)) for number in numbers],
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "open": [n for n in range(3, 100) if os.path.exists(f"/proc/self/fd/{n}")],
        }
    )
)
sys.exit(7)
