"""The generation thread that outlives its failures.

`ProtectedResponseGenerator` runs mlx-lm's own ``_generate`` again after an
exception has left it, on the same thread: a new thread could not use the
arrays of the old one's stream ("There is no Stream(cpu, 0) in current thread",
MLX 0.32).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial
from queue import Queue
from typing import Any, NoReturn

import mlx.core as mx

from .. import _core, _reports, errors
from .._command import in_one_line
from .asked import Asked
from .disconnects import Disconnects
from .headroom import Headroom, MemoryFlags
from .health import EXIT_REPLACE, Health
from .in_flight import InFlight
from .metrics import Metrics
from .mlx_lm import compat
from .mlx_lm.bases import ResponseGenerator
from .mlx_lm.batches import watched
from .mlx_lm.kv_tier import KVTier
from .mlx_lm.prompt_cache import PromptCache
from .mlx_lm.protocols import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Json,
    ModelKey,
    ModelProvider,
    Processor,
    Progress,
    Response,
    Sampler,
    Tokenizer,
)
from .model_names import ModelNames
from .overflow import Overflow
from .own_failures import OwnFailures
from .prefill import PrefillStep
from .prompts import Held, Prompts
from .ranks import AllStop, Home
from .recorder import request_id
from .recovery import Recovery, portable
from .replay import Resumed
from .replies import (
    EXPECTED,
    BadRequest,
    ModelNotFound,
    Unavailable,
    is_allocation_failure,
    is_of_all,
    reply_for,
)
from .request import RUNNING, Disconnected, RequestState
from .scheduler import Scheduler
from .sequential import Sequential
from .served_model import ServedModel, where
from .watchdog import Watchdog

__all__ = ["ProtectedResponseGenerator"]

log = logging.getLogger("mlx_safe.server")

STOP_TIMEOUT_S = 3.0
# With more than one rank: until all have met once more, when the slowest comes.
# One that is left without it ends as after a failure.
STOP_TIMEOUT_OF_RANKS_S = 8.0

# mlx-lm's loop that fails so often before it asks for work will not get further.
STARTS_WITHOUT_WORK_MAX = 20


class ProtectedResponseGenerator(ResponseGenerator):
    """mlx-lm's generator with an end to every request and none to the thread."""

    def __init__(
        self,
        model_provider: ModelProvider,
        prompt_cache: PromptCache,
        health: Health,
        replay_attempts: int,
        stall_timeout_s: float,
        overflow: Overflow,
        memory: MemoryFlags,
        names: ModelNames,
        max_kv_size: int | None = None,
        hold_s: float | None = None,
        home: Home | None = None,
    ) -> None:
        self.health = health
        self._home = home
        self.names = names
        self._hold_s = hold_s
        self._overflow = overflow
        # With more than one rank all must take the same steps, and only the first
        # has clients (`ranks`): nothing is run again, a failure ends the process.
        self._one_rank = mx.distributed.init().size() == 1
        prefill = PrefillStep(model_provider.cli_args)
        self.headroom = Headroom(memory, prompt_cache, prefill, self._one_rank)
        self.scheduler: Scheduler[InFlight] = Scheduler(
            self.headroom,
            replay_attempts if self._one_rank else 0,
            memory.wait_s,
            prefill.be_careful,
        )
        prompt_cache.may_store = self._may_store
        prompt_cache.gives_away = self._gives_away
        self._disk: KVTier | None = prompt_cache.disk
        if self._disk is not None:
            self._disk.current = lambda: self.scheduler.current
        self._prefill = prefill
        self._resumed = Resumed()
        self.disconnects = Disconnects()
        self.watchdog = Watchdog(
            stall_timeout_s,
            self._is_working,
            lambda why: self.recovery.give_up(
                Unavailable(f"The server restarts: {why}.", restarts=True),
                reported=True,
            ),
        )
        self.metrics = Metrics(
            lambda: len(self.scheduler), lambda: float(health.state == "ok")
        )
        self.metrics.watch_prompt_cache(prompt_cache)
        if self._disk is not None:
            self.metrics.watch_kv_disk(self._disk.store, self._disk.writer)
        self.metrics.watch_memory(lambda: self.scheduler.events, self._memory_gauges)
        self.recovery = Recovery(
            lambda: self.requests,
            self.scheduler,
            health,
            self.headroom,
            prompt_cache,
            self.metrics,
            one_rank=self._one_rank,
        )
        self._own = OwnFailures(self._current, self.recovery.end_alone)
        # An error that mlx-lm caught itself, until the thread gets round to it.
        self._caught: Exception | None = None
        # How often mlx-lm's loop has failed before it asked for work.
        self._starts_without_work = 0
        self._model = ServedModel(
            model_provider,
            names,
            self.headroom,
            overflow,
            self._resumed,
            is_first=lambda: health.state == "loading",
            detokenizer=self._own.detokenizer,
            max_kv_size=max_kv_size,
            disk=self._disk,
        )
        share = None if self._one_rank else self._share_object
        self._sequential = Sequential(self.scheduler, self.headroom, share)
        self._prompts = Prompts(
            self._model,
            overflow,
            self.scheduler,
            self.headroom,
            self._resumed,
            self.metrics,
            self._one_rank,
        )
        if home is not None and home.lifeline is not None:
            home.lifeline.watch(self._rank_is_gone)
        # Starts the thread.
        super().__init__(model_provider, prompt_cache)

    # -- called by handler threads -----------------------------------------

    def generate(
        self,
        request: CompletionRequest,
        args: GenerationArguments,
        progress_callback: Progress | None = None,
    ) -> NoReturn:
        """Raises `Asked`: what mlx-lm's handler would do with an answer is ours."""
        raise Asked(request, args, progress_callback)

    def answer(
        self,
        request: CompletionRequest,
        args: GenerationArguments,
        progress: Progress,
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """As mlx-lm's ``generate``: a context, and an iterator of its responses.

        Raises:
            Unavailable: no work is taken now.
            ModelNotFound: it names one that is not known.
            BadRequest, ContextTooLong: the loaded model cannot do it.
            Exception: it could not be begun. The iterator raises as well.
        """
        if not self.health.wait_loaded(self._hold_s):
            raise Unavailable("The model is being loaded.", restarts=True)
        if self.health.state in ("failed", "refusing"):
            restarts = self.health.restarts
            raise Unavailable(self.health.reason, restarts=restarts)
        self._check_at_the_door(request, args)
        return super().generate(request, args, progress)

    def _check_at_the_door(
        self, request: CompletionRequest, args: GenerationArguments
    ) -> None:
        """What needs no turn in the queue; names become those that mlx-lm loads."""
        named = self.names.find(args.model.model, args.model.adapter, args.model.draft)
        args.model = type(args.model)(**named._asdict())
        key, limits = self._model.loaded
        if key == named:  # else it will be checked when its model is loaded
            limits.check(args)
            limits.check_length(request, self._overflow.refuses_over(limits.context))
        elif named.draft is not None and key is not None and key[:2] == named[:2]:
            limits.check_draft()  # the model that is loaded, with another draft model

    @property
    def width(self) -> int | None:
        """The width of the loaded model's logits; None: not known. Any thread."""
        return self._model.limits.facts.width

    # -- the generation thread ----------------------------------------------

    def _generate(self) -> None:
        """Called on mlx-lm's thread; with more than one rank ours waits for theirs."""
        if self._home is None:
            self._generate_here()
        else:
            self._home.run(self._generate_here)

    def _generate_here(self) -> None:
        _core.signals_cover_this_thread()
        self.recovery.begin()
        compat.sample_with_this_thread()
        if not self._load_first_model():
            return
        # mlx-lm loads it each time that it begins; here it may be another by now.
        self.model_provider.load_default = lambda: None  # type: ignore[method-assign]
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
            passing = passing or (
                fault is not None and (fault.retryable or fault.fatal)
            )
            status = EXIT_REPLACE if passing else 2
            place = "" if passing else where(self.cli_args)
            why = in_one_line(cause)
            log.error("the model cannot be loaded: %s%s", place, why)
            self.health.restarts = status == EXIT_REPLACE
            self.health.enter("failed", "the model cannot be loaded")
            error = Unavailable("The model cannot be loaded.", restarts=True)
            self.health.leave(status, lambda: self.recovery.fail_everyone(error))
            return False
        self.health.enter("ok")
        log.info("ready: %s", _status_line())
        return True

    def _is_batchable(self, args: GenerationArguments) -> bool:
        """mlx-lm asks of the model that is loaded, before it loads the one named.

        One that names another is served alone, which any model can be.
        """
        named = self._model.is_named(args.model)
        return named and bool(super()._is_batchable(args))

    def _tokenize(
        self,
        tokenizer: Tokenizer,
        request: CompletionRequest,
        args: GenerationArguments,
    ) -> tuple[Any, ...]:
        tokenize = super()._tokenize
        return self._prompts.read(
            request, args, tokenizer, lambda request: tokenize(tokenizer, request, args)
        )

    def _may_store(self, size: int, given: int) -> bool:
        return self.headroom.may_store(size, given, self.scheduler.load())

    def _gives_away(self) -> bool:
        """Whether the request that is about to start takes its entry over."""
        current = self.scheduler.current
        return current is not None and current.run.takes_over

    def _memory_gauges(self) -> dict[str, float]:
        return {
            **self.headroom.gauges(),
            "held": len(self.scheduler.requests(RequestState.HELD)),
            "running": len(self.scheduler.requests(*RUNNING)),
        }

    def make_batch(self, cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``mlx_lm.server.BatchGenerator``, which is ``cls``."""
        if self._one_rank:  # or each would see other requests to leave
            cls = watched(
                cls,
                self.scheduler,
                lambda: self.headroom.observer,
                self._own,
                self._prefill.went_well,
                self._disk,
            )
        batch = cls(*args, **kwargs)
        return self.headroom.watch(self._prefill.watch(batch))

    def _make_state_machine(
        self,
        model_key: ModelKey,
        tokenizer: Tokenizer,
        stop_words: list[str],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        make = super()._make_state_machine
        made = self._own.make(
            lambda: make(model_key, tokenizer, stop_words, *args, **kwargs),
            lambda: make(model_key, tokenizer, [], *args, **kwargs),
        )
        stops, *rest = self._resumed.state_machine(made)
        return (self._own.stops(stops), *rest)

    def resume_sampler(
        self,
        make: Callable[[GenerationArguments, Tokenizer], Sampler],
        args: GenerationArguments,
        tokenizer: Tokenizer,
    ) -> Sampler:
        """Stands for ``mlx_lm.server._make_sampler``, which is ``make``."""
        made = self._own.make(
            lambda: self._resumed.sampler(make(args, tokenizer), args, tokenizer),
            lambda: partial(mx.argmax, axis=-1),
        )
        guarded: Sampler = self._own.sampler(made)
        return guarded

    def resume_processors(
        self,
        make: Callable[[GenerationArguments], list[Processor]],
        args: GenerationArguments,
    ) -> list[Processor]:
        """Stands for ``mlx_lm.server._make_logits_processors``, which is ``make``."""
        made = self._own.make(lambda: make(args), list)
        current = self.scheduler.current
        if current is not None and current.run.alone:
            made = self._resumed.processors(made)
        return [self._own.processor(processor) for processor in made]

    def top_logprobs(
        self, make: Callable[..., tuple[Json, ...]], *args: Any
    ) -> tuple[Json, ...]:
        """Stands for ``mlx_lm.server._format_top_logprobs``, as ``make`` does."""
        found: tuple[Json, ...] = self._own.top_logprobs(lambda: make(*args))
        return found

    def _current(self) -> InFlight | None:
        """The request that mlx-lm is about to start.

        With more than one rank a failure is nobody's own: what is mended on each of
        them would differ from then on, such as what they draw.
        """
        return self.scheduler.current if self._one_rank else None

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
            raise caught  # a batch that mlx-lm has goes with its frames
        self.recovery.hold()
        self.recovery.check_epoch()
        if self._disk is not None:
            self._disk.confirm()
        request = self.scheduler.next()
        if request is None and self.scheduler.takes_new():
            request = self._take_new(timeout)
        return None if request is None else request.work()

    def _take_new(self, timeout: float | None) -> InFlight | None:
        """One that has come in since; waits for it as mlx-lm does."""
        taken = super()._next_request(timeout)
        if taken is None:
            return None
        if isinstance(taken[1], AllStop):
            self._stop = True
            if self._home is not None:
                self._home.end()
            return None
        try:
            request = InFlight(
                self.scheduler, taken, self._before_put, self._on_caught, self._one_rank
            )
        except RecursionError:
            taken[0].put(BadRequest("The request is nested too deeply."))
            return None
        except MemoryError as e:
            # Nothing knows of it yet: it would wait for ever.
            taken[0].put(portable(e))
            return None
        if self._rank == 0:  # elsewhere nobody waits for the answer
            self.scheduler.arrive(request)
            self.disconnects.bind(request_id(taken[1]), request)
        return request

    def _serve_single(self, request: Any, *args: Any) -> None:
        self.scheduler.serve_alone(request[0])
        super()._serve_single(request, *args)

    def _before_put(self, request: InFlight, item: Any) -> None:
        self.watchdog.moved()
        _reports.sample_memory()
        self.recovery.check_epoch()
        if self._disk is not None:
            self._keep_on_disk(self._disk, request, item)
        if request.run.alone:
            self._sequential.before_put(request, item)

    def _keep_on_disk(self, disk: KVTier, request: InFlight, item: Any) -> None:
        if hasattr(item, "token"):
            disk.first_token(request)
        elif request.run.alone and isinstance(item, tuple):
            disk.confirm()  # what was taken at the step before
            disk.checkpoint_alone()

    def _is_working(self) -> bool:
        # mlx-lm's loop comes by `_next_request` every tenth of a second when there is
        # nothing to do, so a thread that does not move is in a step that hangs; also
        # when its clients have left, and those that come later wait in the queue.
        # With more than one rank the step may be the meeting in such a turn.
        return self.health.state not in ("loading", "failed")

    def _on_caught(self, request: InFlight, exc: Exception) -> None:
        """mlx-lm has caught ``exc`` and ended the request with it.

        Before the context was sent it is about this request alone (its model,
        its prompt); afterwards a generation step has failed.
        """
        if isinstance(exc, Held):
            return
        if isinstance(exc, Disconnected):
            self.scheduler.cancel(request)  # other ranks learn it here
            return
        if isinstance(exc, EXPECTED):  # of this request; no failure of the server
            log.info("a request is refused: %s", exc)
            request.fail(exc)
            return
        if not request.has_context and not is_of_all(exc):
            log.error("a request could not be begun", exc_info=exc)
            self.metrics.failures.labels(reply_for(exc).code).inc()
            request.fail(portable(exc))
        else:
            self.scheduler.not_begun(request)
            self._caught = exc

    def _rank_is_gone(self, rank: int) -> None:
        """On the lifeline's thread: this one may wait for that rank for ever."""
        if self.health.state == "failed":
            return  # it has been answered already, or all end
        why = f"The server restarts: rank {rank} has ended."
        self.recovery.give_up(Unavailable(why, restarts=True), reported=True)

    def stop(self) -> None:
        """Answers everyone 503, then ends the process with status 0."""
        why = Unavailable("The server is stopping.", restarts=True)
        self.health.enter("failed", "the server is stopping")
        self.recovery.fail_everyone(why)
        if self._one_rank:
            self._stop = True
        else:
            self.requests.put((Queue(), AllStop(), None))
        # A step that is under way may take its time, or never end.
        self._generation_thread.join(
            STOP_TIMEOUT_S if self._one_rank else STOP_TIMEOUT_OF_RANKS_S
        )
        if self._disk is not None:
            self._disk.close()
        self.health.leave(0, lambda: self.recovery.fail_everyone(why))


def _status_line() -> str:
    from .. import status

    found = status()
    if found.verified:
        return f"{found.mode}, Metal is hooked and the hooks are verified"
    return "; ".join(found.reasons)
