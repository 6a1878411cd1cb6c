"""One request over HTTP and its answer: how it ended, logged once and counted once.

The handler notes what happens to it; what became of the generation it reads from the
requests of the state machine (`request`). The line in the log and the counts of
``/metrics`` are both made of it, when the last byte of the answer is sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .access import STATUS
from .logs import fields
from .replies import EXPECTED, BodyCut, Unavailable, reply_for

if TYPE_CHECKING:
    from .request import Request

__all__ = ["DISCONNECTED", "QUIET_PATHS", "Exchange"]

log = logging.getLogger("mlx_safe.server")

# What a read or a write ends with when its client has left, or reads no further
# (`Responses.timeout`).
DISCONNECTED = (ConnectionError, TimeoutError)

# Asked every few seconds: neither logged nor counted, unless they are refused.
QUIET_PATHS = ("/health", "/metrics", *STATUS)


class Exchange:
    """Used by the thread of its handler, from the first byte of a request on.

    Attributes:
        requests: what was generated for it, one for each choice.
        error: what it ended with. is_handed_over: the next server answers.
        is_error_event: its stream ended with an event that says why.
        client: the address, of one that may not ask.
    """

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.id = "-"
        self.method = "-"
        self.path = "-"
        self.requests: Sequence[Request] = ()
        self.error: BaseException | None = None
        self.is_handed_over = False
        self.is_error_event = False
        self.client: str | None = None
        self.status: int | None = None
        self.end = "unsent"
        self.duration = 0.0

    def close(self, status: int | None, is_whole: bool) -> None:
        """The answer has ended.

        Args:
            status: that was sent; None: no byte was.
            is_whole: with all that was to come, an error event among it.
        """
        self.status = status
        self.duration = time.monotonic() - self.began_at
        if status is None:
            self.end = "unsent"
        elif self.is_handed_over:
            self.end = "handed_over"
        elif not is_whole:
            self.end = "cut"
            self.error = self.error or ConnectionAbortedError()
        else:
            self.end = "error_event" if self.is_error_event else "whole"

    @property
    def is_quiet(self) -> bool:
        """Neither logged nor counted."""
        return self.path.partition("?")[0] in QUIET_PATHS and not self.code

    @property
    def outcome(self) -> str:
        """``ok``, ``refused``, ``failed``, ``client_left`` or ``handed_over``.

        Refused: nothing was wrong but the request or the moment, and nothing of it had
        been begun. Failed: it had been, or the server is at fault.
        """
        if self.is_handed_over:
            return "handed_over"
        if self.error is None:
            return "ok"
        if isinstance(self.error, (*DISCONNECTED, BodyCut)):
            return "client_left"
        has_begun = any(request.has_begun for request in self.requests)
        is_refusal = isinstance(self.error, (*EXPECTED, Unavailable))
        return "refused" if is_refusal and not has_begun else "failed"

    @property
    def code(self) -> str:
        """That of the error response; "" without one."""
        if self.error is None or self.outcome not in ("refused", "failed"):
            return ""
        return reply_for(self.error).code

    @property
    def replays(self) -> int:
        """How often its requests were run again."""
        return sum(request.times_replayed for request in self.requests)

    @property
    def prompt_tokens(self) -> int | None:
        """As in its usage: those of one choice. None: it was not read."""
        return self.requests[0].prompt_tokens if self.requests else None

    @property
    def cached_tokens(self) -> int | None:
        """Of those, what was in the prompt cache."""
        return self.requests[0].cached_tokens if self.requests else None

    @property
    def tokens(self) -> int | None:
        """Tokens of all its choices; None: nothing was to be generated."""
        if not self.requests:
            return None
        return sum(len(request.produced) for request in self.requests)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request to its first token; None: there was none here.

        Of a stream that goes on, an earlier process has sent it.
        """
        if any(request.inherited for request in self.requests):
            return None
        times = [r.first_token_at for r in self.requests]
        first = min((t for t in times if t is not None), default=None)
        return None if first is None else max(0.0, first - self.began_at)

    @property
    def token_s(self) -> float | None:
        """Seconds from one token to the next, on average over a choice; None: unknown.

        Replays and waits for memory are in it: it is what the client saw.
        """
        spans = [
            ((r.ended_at or time.monotonic()) - r.first_token_at, r.tokens - 1)
            for r in self.requests
            if r.first_token_at is not None and r.tokens > 1
        ]
        tokens = sum(n for _, n in spans)
        return sum(s for s, _ in spans) / tokens if tokens else None

    def log(self) -> None:
        """Its line."""
        param = getattr(self.error, "param", None)
        token_s = self.token_s
        log.info(
            "request",
            extra=fields(
                id=self.id,
                method=self.method,
                path=self.path.partition("?")[0][:200],
                outcome=self.outcome,
                code=self.code or None,
                param=str(param)[:100] if param and self.code else None,
                client=self.client,
                status=self.status if self.status is not None else "none",
                end=self.end,
                replays=self.replays or None,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
                tokens=self.tokens,
                first_token_s=self.first_token_s,
                duration_s=self.duration,
                tokens_per_s=1 / token_s if token_s else None,
            ),
        )


def ids(requests: Sequence[Request]) -> list[str] | None:
    """Who they are, for a line of the log; None: nobody."""
    return [str(request.id) for request in requests] or None
