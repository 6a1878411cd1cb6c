"""The generation thread that outlives its failures.

`ProtectedResponseGenerator` runs mlx-lm's own ``_generate`` again after an
exception has left it, on the same thread: a new thread could not use the
arrays of the old one's stream ("There is no Stream(cpu, 0) in current thread",
MLX 0.32).
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import mlx.core as mx
from jinja2.exceptions import TemplateError
from mlx_lm.server import ResponseGenerator

from .. import _core, _reports, errors, testing
from .._command import in_one_line
from .admission import Admission, Held, MemoryFlags, NoRoom
from .condition import EXIT_REPLACE, Condition
from .departures import Departures
from .metrics import Metrics
from .mlx_lm import compat, kv_window
from .mlx_lm.batches import watched
from .mlx_lm.model_loading import replace_model
from .model_limits import ModelLimits, prompt_field
from .model_names import DEFAULT, ModelNames
from .overflow import Cut, Overflow
from .own_failures import OwnFailures
from .prefill import PrefillStep
from .ranks import AllStop
from .recorder import request_id
from .recovery import Recovery, one_line, portable
from .replay import Replays, Resumed
from .replies import (
    EXPECTED,
    BadRequest,
    ModelNotFound,
    Unavailable,
    is_allocation_failure,
    is_of_all,
    reply_for,
)
from .tickets import ClientLeft, Flight, Ticket, ticket_of
from .watchdog import Watchdog

__all__ = ["Asked", "ProtectedResponseGenerator"]

log = logging.getLogger("mlx_safe.server")

STOP_TIMEOUT_S = 3.0
# With more than one rank: until all have met once more, when the slowest comes.
# One that is left without it ends as after a failure.
STOP_TIMEOUT_OF_RANKS_S = 8.0

# mlx-lm's loop that fails so often before it asks for work will not get further.
STARTS_WITHOUT_WORK_MAX = 20

# Not the reason, which tells of files and hosts; it is in the log.
CANNOT_BE_LOADED = "The model that the request names cannot be loaded."

# How often ranks agree whether the client of the sequential path is still there.
SHARE_EVERY_TOKENS = 16


class Asked(BaseException):
    """What mlx-lm's handler wants to have generated; raised past its own way of
    answering, ``except Exception`` included.

    Attributes:
        request, arguments, progress: what it calls `ResponseGenerator.generate` with.
    """

    def __init__(self, request: Any, arguments: Any, progress: Any) -> None:
        super().__init__("to be answered by `answers.Answer`")
        self.request = request
        self.arguments = arguments
        self.progress = progress


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
        names: ModelNames,
        max_kv_size: int | None = None,
        injections: bool = False,
        hold_s: float | None = None,
    ) -> None:
        self.condition = condition
        self.names = names
        # Which model is loaded, and what it can be asked for.
        self._loaded: tuple[Any, ModelLimits] = (None, ModelLimits())
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
        self._own = OwnFailures(self._current, self.recovery.end_alone)
        # An error that mlx-lm caught itself, until the thread gets round to it.
        self._caught: Exception | None = None
        # How often mlx-lm's loop has failed before it asked for work.
        self._starts_without_work = 0
        self._wrap_load(model_provider, injections)
        # Starts the thread.
        super().__init__(model_provider, prompt_cache)

    # -- called by handler threads -----------------------------------------

    def generate(self, request: Any, args: Any, progress_callback: Any = None) -> Any:
        """Raises `Asked`: what mlx-lm's handler would do with an answer is ours."""
        raise Asked(request, args, progress_callback)

    def answer(self, request: Any, args: Any, progress: Any) -> tuple[Any, Any]:
        """As mlx-lm's ``generate``: a context, and an iterator of its responses.

        Raises:
            Unavailable: no work is taken now.
            ModelNotFound: it names one that is not known.
            BadRequest, ContextTooLong: the loaded model cannot do it.
            Exception: it could not be begun. The iterator raises as well.
        """
        if not self.condition.wait_loaded(self._hold_s):
            raise Unavailable("The model is being loaded.", restarts=True)
        if self.condition.state in ("failed", "refusing"):
            restarts = self.condition.restarts
            raise Unavailable(self.condition.reason, restarts=restarts)
        self._check_at_the_door(request, args)
        made: tuple[Any, Any] = super().generate(request, args, progress)
        return made

    def _check_at_the_door(self, request: Any, args: Any) -> None:
        """What needs no turn in the queue; names become those that mlx-lm loads."""
        named = self.names.find(args.model.model, args.model.adapter, args.model.draft)
        args.model = type(args.model)(**named._asdict())
        key, limits = self._loaded
        if key == named:  # else it will be checked when its model is loaded
            limits.check(args)
            limits.check_length(request, self._overflow.refuses_over(limits.context))

    @property
    def width(self) -> int | None:
        """The width of the loaded model's logits; None: not known. Any thread."""
        return self._loaded[1].facts.width

    # -- the generation thread ----------------------------------------------

    def _generate(self) -> None:
        _core.signals_cover_this_thread()
        self.recovery.begin()
        compat.sample_with_this_thread()
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
            lost = errors.from_exception(e)
            if lost is None:
                log.exception("there is no recovery from this")
            self.recovery.give_up(lost or portable(e))

    def _load_first_model(self) -> bool:
        try:
            self.model_provider.load_default()
        except Exception as e:
            # Of `load_or_say_why`, whose own text is cut.
            cause = e.__cause__ or e if isinstance(e, ModelNotFound) else e
            # What died here before may not have given its memory back yet.
            fault = errors.from_exception(cause)
            passing = is_allocation_failure(cause)
            passing = passing or (fault is not None and (fault.retryable or fault.fatal))
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
        load = provider.load

        def load_anew(*named: Any) -> None:
            ceiling = self.admission.limits.static
            facts = replace_model(provider, named, lambda: ceiling().size)
            limits = ModelLimits.of(provider.model, provider.tokenizer, facts)
            self._overflow.compare(limits.context)
            self._loaded = (provider.model_key, limits)
            self._resumed.width = facts.width

        provider._load = load_anew

        def load_or_say_why(*named: Any) -> Any:
            # mlx-lm 0.31.3 forgets the adapters of its command line.
            named = self.names.default if named[0] == DEFAULT else named
            try:
                model, tokenizer = load(*named)
            except Exception as e:
                if is_of_all(e):
                    raise  # it may pass
                if self.condition.state != "loading":
                    log.info("a model cannot be loaded: %s", one_line(e))
                if isinstance(e, EXPECTED):
                    raise
                raise ModelNotFound(CANNOT_BE_LOADED, "model") from e
            if self._max_kv_size and provider.draft_model is None:
                kv_window.limit(model, self._max_kv_size)
            self._measure(provider)
            if injections:
                width = provider.cli_args.num_draft_tokens + 1
                testing.attach(model, decode_width=width if provider.draft_model else 1)
            self._resumed.watch(tokenizer, self._own.detokenizer)
            return model, tokenizer

        provider.load = load_or_say_why

    def _is_batchable(self, args: Any) -> bool:
        """mlx-lm asks of the model that is loaded, before it loads the one named.

        One that names another is served alone, which any model can be.
        """
        loaded = self.model_provider.model_key
        named = (args.model.model, args.model.adapter, args.model.draft)
        return named == loaded and bool(super()._is_batchable(args))

    def _measure(self, provider: Any) -> None:
        try:
            self.admission.model_loaded(provider)
        except NoRoom as e:
            if self.condition.state == "loading":
                raise
            # Not the one that the server was started with.
            log.warning("a model cannot be served: %s", e)
            raise ModelNotFound(CANNOT_BE_LOADED, "model") from e

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        limits = self._loaded[1]
        # Once more: another model may have been asked for when it came.
        limits.check(args)
        limit = self._overflow.refuses_over(limits.context)
        limits.check_length(request, limit)
        try:
            limits.count(request, limit, tokenizer.encode)
            read = super()._tokenize
            found, cut = self._overflow.fit(
                request,
                lambda request: read(tokenizer, request, args),
                tokenizer.encode,
                limits.context,
            )
        except EXPECTED:
            raise
        except Exception as e:
            if is_of_all(e):
                raise  # not the prompt's own
            raise _unreadable(e, request) from e
        args.max_tokens = limits.answer_tokens(len(found[0]), args.max_tokens)
        if not found[0]:
            raise BadRequest("The prompt is empty.", prompt_field(request))
        limits.facts.check_prompt(found[0], args.logits, prompt_field(request))
        # Here, and not in the midst of a batch, where mlx-lm does it: what makes it
        # fail is this request's own.
        for word in args.stop_words:
            tokenizer.encode(word, add_special_tokens=False)
        ticket = ticket_of(request)
        if ticket is not None:
            ticket.tokenizer = tokenizer
        if cut is not None and ticket is not None:
            self._note_cut(cut, ticket)
        drafts = self.model_provider.draft_model is not None
        found = self._resumed.prompt(found, ticket, args, drafts)
        if ticket is not None:
            keys = compat.cache_keys(found)
            model = self.model_provider.model_key
            ticket.prompt_key = (model, keys)
            self.admission.admit(ticket, model, keys, args.max_tokens)
        return found

    def _note_cut(self, cut: Cut, ticket: Ticket) -> None:
        if "X-Prompt-Truncated" not in ticket.headers:  # it may be tokenized again
            log.info("a prompt was %s (--max-prompt-tokens)", cut)
            self.metrics.truncations.inc()
            ticket.headers["X-Prompt-Truncated"] = str(cut)

    def make_batch(self, cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``mlx_lm.server.BatchGenerator``, which is ``cls``."""
        cls = watched(cls, self.admission, self._own)
        batch = cls(*args, **kwargs)
        return self.admission.watch(self._prefill.watch(batch))

    def _make_state_machine(
        self, model_key: Any, tokenizer: Any, stop_words: Any, *args: Any, **kwargs: Any
    ) -> Any:
        make = super()._make_state_machine
        made = self._own.make(
            lambda: make(model_key, tokenizer, stop_words, *args, **kwargs),
            lambda: make(model_key, tokenizer, [], *args, **kwargs),
        )
        stops, *rest = self._resumed.state_machine(made)
        return (self._own.stops(stops), *rest)

    def resume_sampler(self, make: Any, args: Any, tokenizer: Any) -> Any:
        """Stands for ``mlx_lm.server._make_sampler``, which is ``make``."""
        made = self._own.make(
            lambda: self._resumed.sampler(make(args, tokenizer), args, tokenizer),
            lambda: partial(mx.argmax, axis=-1),
        )
        return self._own.sampler(made)

    def resume_processors(self, make: Any, args: Any) -> list[Any]:
        """Stands for ``mlx_lm.server._make_logits_processors``, which is ``make``."""
        made = self._own.make(lambda: make(args), list)
        if self._alone is not None:
            made = self._resumed.processors(made)
        return [self._own.processor(processor) for processor in made]

    def top_logprobs(self, make: Any, *args: Any) -> Any:
        """Stands for ``mlx_lm.server._format_top_logprobs``, as ``make`` does."""
        return self._own.top_logprobs(lambda: make(*args))

    def _current(self) -> Ticket | None:
        """The request that mlx-lm is about to start.

        With more than one rank a failure is nobody's own: what is mended on each of
        them would differ from then on, such as what they draw.
        """
        if not self._one_rank:
            return None
        return self._alone or self.admission.last_admitted

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
        self.recovery.hold()
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
        except MemoryError as e:
            # Nothing knows of it yet: it would wait for ever.
            taken[0].put(portable(e))
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
        if isinstance(exc, EXPECTED):  # of this request; no failure of the server
            log.info("a request is refused: %s", exc)
            ticket.fail(exc)
            return
        if ticket.context is None and not is_of_all(exc):
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


def _unreadable(exc: Exception, request: Any) -> BadRequest:
    """What a client is told of ``exc``, with which mlx-lm failed to read a prompt."""
    if type(exc) is TemplateError:  # the template's own words: `raise_exception`
        why = f"The model's chat template refuses the messages: {one_line(exc)}"
    else:
        log.warning("a prompt cannot be read (%s)", type(exc).__name__)
        why = "The model's tokenizer and chat template cannot make a prompt of this."
    return BadRequest(why, prompt_field(request))


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
