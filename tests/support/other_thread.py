"""Another thread that comes in between, always at the same place."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Other"]

TIMEOUT_S = 30.0


class Other:
    """Another thread, which does ``what`` once when it is called.

    The call returns when that is done, or waits for ``lock``.
    """

    def __init__(self) -> None:
        self.what: Callable[[], object] | None = None
        self.lock = NotedLock(self)
        self.stands = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        what, self.what = self.what, None
        if what is None:
            return

        def run() -> None:
            try:
                what()
            finally:
                self.stands.set()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self.stands.wait(TIMEOUT_S)

    def end(self) -> None:
        assert self.thread is not None, "there was no such moment"
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()


class NotedLock:
    """A lock that tells when the other thread has to wait for it."""

    def __init__(self, other: Other) -> None:
        self._other = other
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._other.stands.set()
            assert self._lock.acquire(timeout=TIMEOUT_S)

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
