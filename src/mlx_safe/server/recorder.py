"""What of the server's work goes into crash reports: figures, never text.

The native side keeps it (`src/cpp/crash/breadcrumbs.h`, `report_context.h`), so that it
is still there when the process dies. Any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .. import _core, _reports

__all__ = [
    *("Place", "breadcrumb", "inherit", "inherited", "name_request", "request_id"),
    "start_sampler",
]

_NAME = "_mlx_safe_name"
_INHERITED = "_mlx_safe_inherited"
SAMPLE_EVERY_S = 1.0
TOKENS_PER_BREADCRUMB = 128


def breadcrumb(kind: str, text: str, **fields: str | int | float | bool | None) -> None:
    """Leaves a note of the server's own for crash reports."""
    _core.breadcrumb(kind, text, fields)


def name_request(request: object, request_id: str, path: str) -> None:
    """Notes on mlx-lm's request what its client knows it by."""
    setattr(request, _NAME, (request_id, path))


def inherit(request: object, tokens: list[int]) -> None:
    """Notes on mlx-lm's request the tokens that its client has of an earlier server."""
    setattr(request, _INHERITED, tokens)


def inherited(request: object) -> list[int]:
    """The tokens that were noted on mlx-lm's request."""
    return list(getattr(request, _INHERITED, ()))


def request_id(request: object) -> str:
    """The id that was noted on mlx-lm's request; kept when ranks share it."""
    return _name(request)[0]


def _name(request: object) -> tuple[str, str]:
    found: tuple[str, str] = getattr(request, _NAME, ("-", "-"))
    return found


class Place:
    """A request in the table of those in flight, which reports show.

    When all 64 places are taken it has none, and only leaves breadcrumbs.
    """

    def __init__(self, request: object) -> None:
        self.id, self.path = _name(request)
        self._place = -1
        self._prompt_tokens = -1
        self._prefilled = 0

    def taken(self) -> None:
        """The generation thread has it; until then a report names the others."""
        self._place = _core.request_begin(self.id, self.path)
        breadcrumb("request", "taken", id=self.id, path=self.path)

    def begun(self, prompt_tokens: int) -> None:
        """mlx-lm has read the prompt."""
        self._prompt_tokens = prompt_tokens
        _core.request_progress(self._place, prompt_tokens, self._prefilled, 0)
        breadcrumb("request", "begun", id=self.id, prompt_tokens=prompt_tokens)

    def prefilled(self, done: int, total: int) -> None:
        """So many tokens of what is to be read of the prompt have been read."""
        self._prefilled = done
        _core.request_progress(self._place, self._prompt_tokens, done, 0)
        breadcrumb("prefill", "prefill", id=self.id, done=done, total=total)

    def produced(self, tokens: int) -> None:
        """The client has so many tokens."""
        _core.request_progress(
            self._place, self._prompt_tokens, self._prefilled, tokens
        )
        if tokens % TOKENS_PER_BREADCRUMB == 0:
            breadcrumb("decode", "decode", id=self.id, tokens=tokens)

    def ended(self, tokens: int, how: str) -> None:
        """It is in flight no more."""
        _core.request_end(self._place)
        self._place = -1
        breadcrumb("request", how, id=self.id, tokens=tokens)


def start_sampler(
    memory_limits: Callable[[], dict[str, int]],
    server: Callable[[], dict[str, object]],
    also: Callable[[], None],
) -> None:
    """Samples memory now and once a second, and keeps the run file fresh.

    Args:
        memory_limits: arguments of `_reports.set_memory_limits`, read each time.
        server: what reports tell of the server, likewise.
        also: called each time as well.
    """

    def sample() -> None:
        _reports.set_memory_limits(**memory_limits())
        _reports.set_server(server())
        _reports.sample_memory(at_least_s=0.0)
        _reports.refresh_run_file()
        also()

    def run() -> None:
        while True:
            time.sleep(SAMPLE_EVERY_S)
            sample()

    sample()
    threading.Thread(target=run, name="mlx-safe-sampler", daemon=True).start()
