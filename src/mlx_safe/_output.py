"""The standard streams, which may be closed, full, or read by nobody."""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["complain", "flush", "keep_numbers"]


def keep_numbers() -> None:
    """Opens ``/dev/null`` where descriptors 0 to 2 are closed.

    As with ``mlx-safe serve >&- 2>&-``. The next files would have these numbers, and
    what a library prints would be in a client's answer or a KV cache. For the process
    of a command, before it opens anything.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
            os.set_inheritable(fd, True)


def complain(line: str) -> None:
    """``line`` on stderr, if it can be written; nothing is raised."""
    if sys.stderr is not None:  # print would take stdout
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def flush() -> None:
    """Before `os._exit` or `os.execv`, which lose what is left; nothing is raised."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
