"""The choices of one answer (``n``), each a request of its own to the generator."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from socket import socket
from typing import Protocol

from .asked import Asked
from .begun import Begun
from .disconnects import Watch
from .handover import Held
from .in_flight import InFlight
from .mlx_lm.protocols.opaque import Item, Progress
from .mlx_lm.protocols.requests import GenerationContext
from .recorder import inherit, name_request
from .service import Service

__all__ = ["Choices", "Connected", "GenerationEnded"]


class GenerationEnded(Exception):
    """The generator ended a request with ``error``, which it has logged."""

    def __init__(self, error: Exception) -> None:
        super().__init__(type(error).__name__)
        self.error = error


class Connected(Protocol):
    """The handler of a request, as far as its choices need it."""

    response_generator: Service
    connection: socket
    held: Held
    request_id: str
    path: str


class Choices:
    """What the generator says of each choice; to be iterated once, in its ``with``.

    Iterating gives ``(index, item)``. Of each choice come, in this order, mlx-lm's
    ``GenerationContext``, its ``Response`` objects, and None. When the block is left,
    what is not done is cancelled.

    The choices have ids of their own, the first that of the answer: faults,
    admission, replay and clients that leave are dealt with one by one. Choice ``i``
    has the seed ``seed + i``, so that each is another text and can be had again.

    Args:
        handler: of the answer; its connection is watched.
        begun: what an earlier server had sent: each choice goes on from there, and
            of those that had ended nothing comes.
    """

    def __init__(
        self, handler: Connected, asked: Asked, count: int, begun: Begun | None = None
    ) -> None:
        self._generator = handler.response_generator
        self._connection, self._held = handler.connection, handler.held
        self._progress = asked.progress or (lambda done, total: None)
        self._asked = {
            i: _of_choice(asked, handler.request_id, handler.path, i, begun)
            for i in range(count)
            if begun is None or not begun.has_ended(i)
        }
        self._stack = contextlib.ExitStack()
        self._watches: list[Watch] = []
        self._lock = threading.Lock()
        self._contexts: list[GenerationContext] = []
        self._is_over = False

    def __enter__(self) -> Choices:
        disconnects = self._generator.disconnects
        for name, _ in self._asked.values():
            watching = disconnects.watching(name, self._connection, self._held)
            self._watches.append(self._stack.enter_context(watching))
        return self

    def requests(self) -> list[InFlight]:
        """What the generator has, or had, of the choices."""
        return [w.request for w in self._watches if w.request is not None]

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._is_over = True
            contexts = list(self._contexts)
        for name, _ in self._asked.values() if len(self._asked) > 1 else ():
            # Its thread may wait for the next word of it.
            request = self._generator.disconnects.request(name)
            if request is not None:
                request.disconnect()
        for context in contexts:
            context.stop()
        self._stack.close()

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        if len(self._asked) == 1:
            (index,) = self._asked
            responses = self._generate(index, self._progress)
            yield from zip(itertools.repeat(index), responses)
        else:
            yield from self._merged()

    def _generate(self, index: int, progress: Progress) -> Iterator[Item]:
        _, asked = self._asked[index]
        try:
            context, responses = self._generator.answer(
                asked.request, asked.arguments, progress
            )
            self._note(context)
            yield context
            yield from responses
        except Exception as e:
            raise GenerationEnded(e) from e
        yield None

    def _note(self, context: GenerationContext) -> None:
        with self._lock:
            self._contexts.append(context)
            is_over = self._is_over
        if is_over:
            context.stop()
            raise ConnectionAbortedError("nobody waits for this choice any more")

    def _merged(self) -> Iterator[tuple[int, Item]]:
        """All of them, each from a thread of its own, as they come."""
        come: SimpleQueue[tuple[int, Item]] = SimpleQueue()

        def run(index: int) -> None:
            def progress(*done: int) -> None:
                come.put((index, done))

            try:
                for item in self._generate(index, progress):
                    come.put((index, item))
            except Exception as e:
                come.put((index, e))

        for i in self._asked:
            threading.Thread(
                target=run, args=(i,), name="mlx-safe-choice", daemon=True
            ).start()
        missing = len(self._asked)
        while missing:
            index, item = come.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, tuple):
                self._progress(*item)
                continue
            missing -= item is None
            yield index, item


def _of_choice(
    asked: Asked, name: str, path: str, index: int, begun: Begun | None
) -> tuple[str, Asked]:
    """(its id, what it asks for)."""
    name = f"{name}-{index}" if index else name
    request = copy.copy(asked.request)
    name_request(request, name, path)
    if begun is not None:
        inherit(request, [said.token for said in begun.tokens(index)])
    args = asked.arguments
    if index and args.seed is not None:
        seed = (args.seed + index) % 2**64
        args = dataclasses.replace(args, seed=seed)  # type: ignore[type-var]
    return name, Asked(request, args, asked.progress)
