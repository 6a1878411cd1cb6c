"""The generation thread that outlives its failures.

`ProtectedResponseGenerator` runs mlx-lm's own ``_generate`` again after an
exception has left it, on the same thread: a new thread could not use the
arrays of the old one's stream ("There is no Stream(cpu, 0) in current thread",
MLX 0.32).
"""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm.server import ResponseGenerator

from .. import _core, _reports, errors, testing
from .._command import in_one_line
from . import compat, kv_window
from .admission import Admission, Held, MemoryFlags, NoRoom
from .batches import watched
from .condition import EXIT_REPLACE, Condition
from .departures import Departures
from .metrics import Metrics
from .overflow import Cut, Overflow
from .prefill import PrefillStep
from .ranks import AllStop
from .recorder import request_id
from .recovery import Recovery, one_line, portable
from .replay import Replays, Resumed
from .replies import (
    EXPECTED,
    BadRequest,
    ContextTooLong,
    ModelNotFound,
    NotEnoughMemory,
    Unavailable,
    is_allocation_failure,
    reply_for,
)
from .tickets import ClientLeft, Flight, Ticket, ticket_of
from .watchdog import Watchdog

__all__ = ["Answered", "ProtectedResponseGenerator"]

log = logging.getLogger("mlx_safe.server")

STOP_TIMEOUT_S = 3.0
# With more than one rank: until all have met once more, when the slowest comes.
# One that is left without it ends as after a failure.
STOP_TIMEOUT_OF_RANKS_S = 8.0

# mlx-lm's loop that fails so often before it asks for work will not get further.
STARTS_WITHOUT_WORK_MAX = 20

# How often ranks agree whether the client of the sequential path is still there.
SHARE_EVERY_TOKENS = 16


class Answered(BaseException):
    """Carries an error past ``except Exception`` in mlx-lm's handler.

    That clause answers 404 to whatever `generate` raises. Only
    `handler.ProtectedHandler` catches this, around the same call.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class ProtectedResponseGenerator(ResponseGenerator):  # type: ignore[misc]
    """mlx-lm's generator with an end to every request and none to the thread."""

    def __init__(
        self,
        model_provider: Any,
        prompt_cache: Any,
        condition: Condition,
        replay_attempts: int,
        stall_timeout_s: float,
        overflow: Overflow,
        memory: MemoryFlags,
        max_kv_size: int | None = None,
        injections: bool = False,
        hold_s: float | None = None,
    ) -> None:
        self.condition = condition
        self._hold_s = hold_s
        self._overflow = overflow
        self._max_kv_size = max_kv_size
        self.flight = Flight()
        # With more than one rank all must take the same steps, and only the first
        # has clients (`ranks`): nothing is run again, a failure ends the process.
        self._one_rank = mx.distributed.init().size() == 1
        prefill = PrefillStep(model_provider.cli_args)
        self.replays = Replays(
            self.flight, replay_attempts if self._one_rank else 0, prefill
        )
        self.admission = Admission(
            self.flight, memory, prompt_cache, prefill, enabled=self._one_rank
        )
        self._prefill = prefill
        self._resumed = Resumed()
        self.departures = Departures()
        self.watchdog = Watchdog(
            stall_timeout_s,
            self._is_working,
            lambda why: self.recovery.give_up(
                Unavailable(f"The server restarts: {why}.", restarts=True),
                reported=True,
            ),
        )
        # The ticket that mlx-lm's sequential path works on.
        self._alone: Ticket | None = None
        self.metrics = Metrics(
            lambda: len(self.flight), lambda: float(condition.state == "ok")
        )
        self.metrics.watch_prompt_cache(prompt_cache)
        self.metrics.watch_memory(self.admission)
        self.recovery = Recovery(
            lambda: self.requests,
            self.flight,
            condition,
            self.replays,
            self.admission,
            prompt_cache,
            self.metrics,
            one_rank=self._one_rank,
        )
        # An error that mlx-lm caught itself, until the thread gets round to it.
        self._caught: Exception | None = None
        # How often mlx-lm's loop has failed before it asked for work.
        self._starts_without_work = 0
        self._wrap_load(model_provider, injections)
        # Starts the thread.
        super().__init__(model_provider, prompt_cache)

    # -- called by handler threads -----------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As mlx-lm's; errors are raised as `Answered`."""
        try:
            if not self.condition.wait_loaded(self._hold_s):
                raise Unavailable("The model is being loaded.", restarts=True)
            if self.condition.state in ("failed", "refusing"):
                restarts = self.condition.restarts
                raise Unavailable(self.condition.reason, restarts=restarts)
            context, responses = super().generate(*args, **kwargs)
        except Exception as e:
            raise Answered(e) from e
        return context, responses

    # -- the generation thread ----------------------------------------------

    def _generate(self) -> None:
        _core.signals_cover_this_thread()
        if not self._load_first_model():
            return
        # mlx-lm loads it each time that it begins; here it may be another by now.
        self.model_provider.load_default = lambda: None
        while not self._stop:
            self._starts_without_work += 1
            try:
                super()._generate()
            except Exception as e:
                self._recover_or_give_up(e)

    def _recover_or_give_up(self, exc: Exception) -> None:
        try:
            if self._starts_without_work > STARTS_WITHOUT_WORK_MAX:
                raise exc
            self.recovery.recover(exc)
        except Exception as e:
            log.exception("there is no recovery from this")
            self.recovery.give_up(portable(e))

    def _load_first_model(self) -> bool:
        try:
            self.model_provider.load_default()
        except Exception as e:
            # Of `load_or_say_why`, whose own text is cut.
            cause = e.__cause__ or e if isinstance(e, ModelNotFound) else e
            # What died here before may not have given its memory back yet.
            passing = errors.from_exception(cause) or is_allocation_failure(cause)
            status = EXIT_REPLACE if passing else 2
            where = "" if passing else _where(self.cli_args)
            told = in_one_line(cause)
            log.error("the model cannot be loaded: %s%s", where, told)
            self.condition.restarts = status == EXIT_REPLACE
            self.condition.enter("failed", "the model cannot be loaded")
            why = Unavailable("The model cannot be loaded.", restarts=True)
            self.condition.leave(status, lambda: self.recovery.fail_everyone(why))
            return False
        self.condition.enter("ok")
        log.info("ready: %s", _status_line())
        return True

    def _wrap_load(self, provider: Any, injections: bool) -> None:
        load, load_anew = provider.load, provider._load

        def unload_and_load(*args: Any, **kwargs: Any) -> Any:
            _unload(provider)
            return load_anew(*args, **kwargs)

        provider._load = unload_and_load

        def load_or_say_why(*args: Any, **kwargs: Any) -> Any:
            try:
                model, tokenizer = load(*args, **kwargs)
            except Exception as e:
                if errors.from_exception(e) or is_allocation_failure(e):
                    raise  # it may pass
                if self.condition.state != "loading":
                    log.info("a model cannot be loaded: %s", one_line(e))
                raise ModelNotFound(one_line(e)) from e
            if self._max_kv_size and provider.draft_model is None:
                kv_window.limit(model, self._max_kv_size)
            self._measure(provider)
            if injections:
                width = provider.cli_args.num_draft_tokens + 1
                testing.attach(model, decode_width=width if provider.draft_model else 1)
            self._resumed.watch(tokenizer)
            return model, tokenizer

        provider.load = load_or_say_why

    def _measure(self, provider: Any) -> None:
        try:
            self.admission.model_loaded(provider)
        except NoRoom as e:
            if self.condition.state == "loading":
                raise
            # Not the one that the server was started with.
            log.warning("a model cannot be served: %s", e)
            raise ModelNotFound(str(e)) from e

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        try:
            self._check_limits(request, args)
            read = super()._tokenize
            found, cut = self._overflow.fit(
                request,
                lambda request: read(tokenizer, request, args),
                tokenizer.encode,
            )
        except EXPECTED:
            raise
        except Exception as e:
            raise BadRequest(f"The prompt cannot be read: {one_line(e)}") from e
        if not found[0]:
            raise BadRequest("The prompt is empty.")
        # Here, and not in the midst of a batch, where mlx-lm does it: what makes it
        # fail is this request's own.
        for word in args.stop_words:
            tokenizer.encode(word, add_special_tokens=False)
        ticket = ticket_of(request)
        if cut is not None and ticket is not None:
            self._note_cut(cut, ticket)
        drafts = self.model_provider.draft_model is not None
        found = self._resumed.prompt(found, ticket, args, drafts)
        if ticket is not None:
            keys = compat.cache_keys(found)
            model = self.model_provider.model_key
            self.admission.admit(ticket, model, keys, args.max_tokens)
        return found

    def _note_cut(self, cut: Cut, ticket: Ticket) -> None:
        if "X-Prompt-Truncated" not in ticket.headers:  # it may be tokenized again
            log.info("a prompt was %s (--max-prompt-tokens)", cut)
            self.metrics.truncations.inc()
            ticket.headers["X-Prompt-Truncated"] = str(cut)

    def make_batch(self, cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``mlx_lm.server.BatchGenerator``, which is ``cls``."""
        batch = watched(cls, self.admission)(*args, **kwargs)
        return self.admission.watch(self._prefill.watch(batch))

    def _check_limits(self, request: Any, args: Any) -> None:
        """What mlx-lm takes without a look, and fails on in the midst of its work."""
        if request.request_type == "text" and not isinstance(request.prompt, str):
            raise BadRequest("The prompt must be one string.")
        if args.seed is not None and not 0 <= args.seed < 2**64:
            raise BadRequest("seed must be from 0 to 2**64 - 1.")
        # Its batches answer with one token then; its sequential path has none.
        args.max_tokens = max(1, args.max_tokens)
        # Biases that are out of bounds are written all the same.
        model = self.model_provider.model
        size = getattr(getattr(model, "args", None), "vocab_size", None)
        for token in args.logits.logit_bias or {}:
            if size is not None and not 0 <= token < size:
                raise BadRequest(f"logit_bias: there is no token {token}")

    def _make_state_machine(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._make_state_machine(*args, **kwargs)
        return self._resumed.state_machine(made)

    def resume_sampler(self, sampler: Any, args: Any, tokenizer: Any) -> Any:
        """Stands behind ``mlx_lm.server._make_sampler``."""
        return self._resumed.sampler(sampler, args, tokenizer)

    def resume_processors(self, made: list[Any]) -> list[Any]:
        """Stands behind ``mlx_lm.server._make_logits_processors``."""
        return made if self._alone is None else self._resumed.processors(made)

    def _share_request(self, request: Any) -> Any:
        """Where the first rank tells the others; they wait if that fails."""
        if request is not None and not self._one_rank:
            try:
                # Goes deeper into Python's stack than what is done with it later.
                copy.deepcopy(request[1:])
            except RecursionError:
                request[0].put(BadRequest("The request is nested too deeply."))
                request = None
        return super()._share_request(request)

    def _next_request(self, timeout: float | None = None) -> Any:
        # mlx-lm's loop comes by here between any two pieces of work.
        self._starts_without_work = 0
        self.watchdog.moved()
        _reports.sample_memory()
        caught, self._caught = self._caught, None
        if caught is not None:
            self.recovery.recover(caught)
        self.recovery.check_epoch()
        again = self.replays.next()
        if again is not None:
            return again.work()
        if not self.replays.may_take_new():
            return None
        held = self.admission.next_held()
        if held is not None:
            return held.work()
        taken = super()._next_request(timeout)
        if taken is not None and isinstance(taken[1], AllStop):
            self._stop = True
            return None
        if taken is None:
            return None
        try:
            ticket = Ticket(self.flight, taken, self._before_put, self._on_caught)
        except RecursionError:
            taken[0].put(BadRequest("The request is nested too deeply."))
            return None
        if self._rank == 0:  # elsewhere nobody waits for the answer
            self.flight.board(ticket)
            self.departures.bind(request_id(taken[1]), ticket)
        return ticket.work()

    def _serve_single(self, request: Any, *args: Any) -> None:
        self._alone = request[0]
        # There mlx-lm fails on a stopped context with more than one rank
        # (NotImplementedError, 0.31 to 0.32), and on the first rank only.
        request[0].may_be_stopped = self._one_rank
        try:
            super()._serve_single(request, *args)
        finally:
            self._alone = None

    def _before_put(self, ticket: Ticket, item: Any) -> None:
        self.watchdog.moved()
        _reports.sample_memory()
        self.recovery.check_epoch()
        # The sequential path looks for clients that left after a token only. The
        # batched one looks by itself, and an exception would end the batch.
        if ticket is self._alone:
            if self._has_left(ticket):
                raise ClientLeft("the client left during the step")
            self.admission.between_single_steps(ticket, item)

    def _has_left(self, ticket: Ticket) -> bool:
        """Whether the client is gone; with more than one rank, as all ranks see it.

        Only the first rank knows, and sharing waits for the step that is under way:
        it is done for each piece of the prompt, but not for each token.
        """
        if self._one_rank:
            return ticket.stopped
        if len(ticket.produced) % SHARE_EVERY_TOKENS:
            return False
        return bool(self._share_object(ticket.stopped or None))

    def _is_working(self) -> bool:
        # mlx-lm's loop comes by `_next_request` every tenth of a second when there is
        # nothing to do, so a thread that does not move is in a step that hangs; also
        # when its clients have left, and those that come later wait in the queue.
        # With more than one rank the step may be the meeting in such a turn.
        return self.condition.state not in ("loading", "failed")

    def _on_caught(self, ticket: Ticket, exc: Exception) -> None:
        """mlx-lm has caught ``exc`` and ended the request with it.

        Before the context was sent it is about this request alone (its model,
        its prompt); afterwards a generation step has failed.
        """
        if isinstance(exc, ClientLeft):
            return
        if isinstance(exc, Held):
            self.admission.hold(ticket)
            return
        if isinstance(exc, NotEnoughMemory | ContextTooLong):
            log.info("a request is refused: %s", exc)
            ticket.fail(exc)
            return
        passing = errors.from_exception(exc) or is_allocation_failure(exc)
        if ticket.context is None and not passing:
            if not isinstance(exc, EXPECTED):
                log.error("a request could not be begun", exc_info=exc)
            self.metrics.failures.labels(reply_for(exc).code).inc()
            ticket.fail(portable(exc))
        else:
            self._caught = exc

    def stop(self) -> None:
        """Answers everyone 503, then ends the process with status 0."""
        why = Unavailable("The server is stopping.", restarts=True)
        self.condition.enter("failed", "the server is stopping")
        self.recovery.fail_everyone(why)
        if self._one_rank:
            self._stop = True
        else:
            self.requests.put((Queue(), AllStop(), None))
        # A step that is under way may take its time, or never end.
        self._generation_thread.join(
            STOP_TIMEOUT_S if self._one_rank else STOP_TIMEOUT_OF_RANKS_S
        )
        self.condition.leave(0, lambda: self.recovery.fail_everyone(why))


def _unload(provider: Any) -> None:
    """Gives the memory of the model back that ``provider`` is about to replace.

    mlx-lm drops its own reference, but its loop's variables have another until the
    next model is there (0.31.3 and 0.32.2): both would have to fit.
    """
    for model in filter(None, (provider.model, provider.draft_model)):
        model.clear()  # a module is the dictionary of its parts
    gc.collect()
    mx.clear_cache()


def _where(cli_args: Any) -> str:
    """Names the flags' models: what cannot be loaded tells little without."""
    given = [
        (f"--{flag.replace('_', '-')}", name)
        for flag in ("model", "draft_model", "adapter_path")
        if (name := getattr(cli_args, flag))
    ]
    absent = [
        f"there is no directory {name} here ({flag}), "
        for flag, name in given
        if not Path(name).exists()
    ]
    if absent:
        return "".join([*absent, "and on the hub: "])
    return ", ".join(f"{flag} {name}" for flag, name in given) + ": "


def _status_line() -> str:
    from .. import status

    found = status()
    if found.verified:
        return f"{found.mode}, Metal is hooked and the hooks are verified"
    return "; ".join(found.reasons)
