"""A request as mlx-lm has it: in the place of the queue that it answers on.

mlx-lm gives each request a queue, on which its generation thread puts a
``GenerationContext``. Then come any number of (done, total) progress tuples and
``Response`` objects, and at the end None or an exception. An `InFlight` stands in for
that queue, so it sees all of it without a look into mlx-lm's frames: on the batched and
the sequential path, in every supported version. It passes it on to the scheduler. So
the scheduler knows which tokens the client has, and the request can be run again from
there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

from .asked import wants_logprobs
from .handover import Held
from .mlx_lm.protocols.opaque import (
    Array,
    Item,
    ModelKey,
)
from .mlx_lm.protocols.requests import (
    AnsweredContext,
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Taken,
)
from .mlx_lm.protocols.text import Tokenizer
from .recorder import Place, inherited
from .request import Request
from .scheduler import Scheduler

__all__ = ["InFlight", "request_of"]

_ATTRIBUTE = "_mlx_safe_request"


def request_of(work: CompletionRequest) -> InFlight:
    """What mlx-lm's request ``work``, made by `InFlight.work`, stands for."""
    found: InFlight = getattr(work, _ATTRIBUTE)
    return found


class InFlight(Request):
    """One request in flight; has the ``put`` of the queue it stands for.

    Made by the thread of its handler; ``put``, `taken` and `work` are called by the
    generation thread only, `fail` and `disconnect` by any.

    Args:
        taken: mlx-lm's queue, request and arguments.
        before_put, on_error: called with it and what is put, before that or instead.
        may_stop_alone: mlx-lm's sequential path may be stopped. With more than one
            rank it fails on that (NotImplementedError, 0.31 to 0.32), and on the
            first rank only.

    Attributes:
        context: mlx-lm's, of this run; the first goes to the client's handler.
        headers: HTTP headers that go with the answer.
        prompt_key: (model, tokens), as the prompt cache knows its prompt.
        tokenizer: that its prompt was read with; its handler has it with the context.
        wants_logprobs: its client asked for log-probabilities.
        logprob: that of one of its tokens, which `Numbers` looks at; None: of none.
        held: its connection, as a supervisor keeps it; None: it is another rank's.
    """

    _first: GenerationContext | None = None  # the context that its handler has
    _prompt_tokens: int | None = None
    held: Held | None = None

    def __init__(
        self,
        scheduler: Scheduler[InFlight],
        taken: Taken,
        before_put: Callable[[InFlight, Item], None],
        on_error: Callable[[InFlight, Exception], None],
        may_stop_alone: bool = True,
    ) -> None:
        self._queue, self._request, self._args = taken
        super().__init__(inherited(self._request))
        self._scheduler = scheduler
        self._before_put = before_put
        self._on_error = on_error
        self._may_stop_alone = may_stop_alone
        self.context: GenerationContext | None = None
        self.headers: dict[str, str] = {}
        self.prompt_key: tuple[ModelKey, list[int]] | None = None
        self.tokenizer: Tokenizer | None = None
        self.wants_logprobs = wants_logprobs(self._args)
        self.logprob: Array | None = None
        self._place = Place(self._request)
        self.id, self.path = self._place.id, self._place.path

    @property
    def prompt_tokens(self) -> int | None:  # type: ignore[override]
        """Tokens of its prompt; None: they are not known yet."""
        return self._prompt_tokens

    @property
    def cached_tokens(self) -> int | None:  # type: ignore[override]
        """Of them, those that the prompt cache had; None: it was not asked yet."""
        # mlx-lm's sequential path knows it later; until then it is -1.
        count = -1 if self._first is None else self._first.prompt_cache_count
        if count is None or count < 0 or self._prompt_tokens is None:
            return None
        return min(int(count), self._prompt_tokens)

    @property
    def max_tokens(self) -> int:
        """How many its answer may have."""
        return int(self._args.max_tokens)

    @property
    def deaths(self) -> int:  # type: ignore[override]
        """How many processes died while they worked on it."""
        return 0 if self.held is None else self.held.deaths

    def taken(self) -> bool:
        """The generation thread has it; whether mlx-lm gets it now."""
        is_next = self._scheduler.take(self)
        if not self.is_ended:
            self._place.taken()
        return is_next

    def as_it_came(self) -> CompletionRequest:
        """A copy of mlx-lm's request, to be read once.

        mlx-lm changes the messages while it reads them: it parses the arguments of
        calls, which 0.31.3 cannot do twice.
        """
        return copy.deepcopy(self._request)

    def work(self) -> tuple[InFlight, CompletionRequest, GenerationArguments]:
        """What mlx-lm is to do: the request, or the rest of it."""
        request = self.as_it_came()
        setattr(request, _ATTRIBUTE, self)
        left = self._args.max_tokens - len(self.produced)
        args = dataclasses.replace(self._args, max_tokens=left)  # type: ignore[type-var]
        return self, request, args

    def put(self, item: Item) -> None:
        """Passes ``item`` on, unless a fault has made it worthless.

        Raises:
            GPUError: there was a fault since the last reset: what this step
                computed may be garbage.
            Disconnected: nobody waits for it any more (sequential path only).
        """
        if hasattr(item, "token"):  # as most have
            self._before_put(self, item)
            is_last = item.finish_reason is not None
            if self._scheduler.token(self, item.token, is_last):
                self._place.produced(len(self.produced))
                self._queue.put(item)
            return
        if isinstance(item, Exception):
            # mlx-lm has ended the request with it.
            self._on_error(self, item)
            return
        self._before_put(self, item)
        if item is None:
            self._scheduler.complete(self)
        elif isinstance(item, tuple):
            self.read(*item)
        else:
            self._begin(item)

    def read(self, done: int, total: int) -> None:
        """So many tokens of what is to be read of the prompt have been read."""
        self._place.prefilled(done, total)
        self._scheduler.progress(self, done, total)
        self.send((done, total))

    def _begin(self, context: AnsweredContext) -> None:
        """A handler that is done, or whose client left, stops its context."""
        self.context = context
        self._place.begun(len(context.prompt))
        if self.is_ended:  # its client left while the prompt was tokenized
            self.stop_run()
        if not self._scheduler.begin(self):
            return
        self._first = context
        # With speculative decoding and a seed it is made again, and not read.
        of_answer = 0 if self.run.repeated else self.inherited
        self._prompt_tokens = len(context.prompt) - of_answer
        assert self.tokenizer is not None
        context.stop = lambda: self._scheduler.cancel(self)  # type: ignore[method-assign]
        context.tokenizer = self.tokenizer
        self.send(context)

    def begin_again(self) -> None:
        """This run makes the answer from its first token, the client's included."""
        self._scheduler.repeat(self)

    def fail(self, exc: Exception) -> bool:
        """Ends the request with ``exc``; False when it had ended already."""
        return self._scheduler.fail(self, exc)

    def disconnect(self) -> None:
        """Its client has closed the connection: ends the request."""
        self._scheduler.disconnect(self)

    def send(self, item: Item) -> None:
        self._queue.put(item)

    def stop_run(self) -> None:
        context = self.context
        if context is not None and (self._may_stop_alone or not self.run.alone):
            type(context).stop(context)

    def note_work(self, does: bool) -> None:
        if self.held is not None:
            self.held.works(self.id, does)

    def note_end(self, how: str) -> None:
        self._place.ended(len(self.produced), how)
