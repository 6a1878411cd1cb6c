"""What a test and a client's driver say to each other: JSON, a line each.

The test writes a task. The driver does it with its client, as it comes, and writes
``{"begun": true}`` when the first text has come and then one line with an `Outcome`.
A driver lives through many tasks, so its client is imported once, and what it pools
it keeps.

Knows nothing of mlx-safe: it runs where only the clients are installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "-"  # clients want one; the server does not ask for it
MODEL = "default_model"
TOOL = {
    "name": "look",
    "description": "Looks.",
    "parameters": {
        "type": "object",
        "properties": {"what": {"type": "string"}},
        "required": ["what"],
    },
}


@dataclass
class Task:
    """What a client is to do.

    Attributes:
        base_url: with ``/v1``.
        prompt: the only message of the user.
        leave: it goes away when the first text has come.
        tool: it offers `TOOL`.
        logit_bias: sent as it is, unless it is empty.
        retries: its own, as many as it has by default; False for none.
        times: how often curl is to ask in one run.
    """

    base_url: str
    prompt: str
    max_tokens: int
    stream: bool = True
    leave: bool = False
    tool: bool = False
    logit_bias: dict[str, float] = field(default_factory=dict)
    retries: bool = True
    times: int = 1


@dataclass
class Outcome:
    """What the program that uses the client gets to know.

    Attributes:
        finish: the finish reason, as the client has it.
        calls: [name, arguments as text] of each tool call.
        error: the class of what was raised or told, with what caused it.
        status: the HTTP status that the client gives with it.
        code: the error object's ``code``, where the client gives it.
        told: how the error came: "raised"; "told" by a callback, a status or an
            exit code; "" without one.
        left: it went away, as the task says.
    """

    text: str = ""
    finish: str | None = None
    calls: list[list[str]] = field(default_factory=list)
    error: str = ""
    status: int | None = None
    code: str | None = None
    told: str = ""
    message: str = ""
    left: bool = False
    seconds: float = 0.0

    @property
    def finish_is_good(self) -> bool:
        """It passes for a whole answer."""
        return self.finish in ("stop", "length", "tool_calls")


def begun() -> None:
    """Tells that the first text has come."""
    _write({"begun": True})


class Left(Exception):
    """The client has gone away, as the task says."""


def failed(outcome: Outcome, error: BaseException) -> Outcome:
    """Puts an exception into the outcome: all that a program could look at."""
    outcome.told = "raised"
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = [type(e).__name__ for e in chain]
    outcome.error = names[0]
    outcome.message = f"{' <- '.join(names)}: {error}"[:400]
    for e in chain:
        outcome.status = outcome.status or getattr(e, "status_code", None)
        body = getattr(e, "body", None)
        body = body.get("error", body) if isinstance(body, dict) else {}
        outcome.code = outcome.code or getattr(e, "code", None) or body.get("code")
    return outcome


Ask = Callable[[Task, Outcome], Any]


def serve(ask: Ask) -> None:
    """Does tasks until there are no more. ``ask`` fills in the outcome, or raises."""
    asyncio.run(serve_async(_of(ask)))


def _of(ask: Ask) -> Callable[[Task, Outcome], Awaitable[None]]:
    async def asked(task: Task, outcome: Outcome) -> None:
        ask(task, outcome)

    return asked


async def serve_async(ask: Callable[[Task, Outcome], Awaitable[None]]) -> None:
    """`serve` for a client that is asynchronous: its pool lives in one loop."""
    warnings.simplefilter("ignore")
    _write({"ready": True})
    while line := await asyncio.to_thread(sys.stdin.readline):
        task, outcome = Task(**json.loads(line)), Outcome()
        started = time.monotonic()
        try:
            await ask(task, outcome)
        except Left:
            outcome.left = True
        except Exception as e:  # whatever it is: it is what is measured
            failed(outcome, e)
        outcome.seconds = time.monotonic() - started
        _write(asdict(outcome))


def piece(task: Task, outcome: Outcome, text: str | None) -> None:
    """Some text has come.

    Raises:
        Left: the client is to go.
    """
    if not text:
        return
    first = not outcome.text
    outcome.text += text
    if first:
        begun()
        if task.leave:
            raise Left


_out = os.dup(1)
os.dup2(2, 1)  # what a client prints is no part of this


def _write(what: dict[str, Any]) -> None:
    os.write(_out, json.dumps(what).encode() + b"\n")
