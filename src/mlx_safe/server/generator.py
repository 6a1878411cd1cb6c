"""The generation thread that outlives its failures.

`ProtectedResponseGenerator` runs mlx-lm's own ``_generate`` again after an exception
has left it, on the same thread. A new thread could not use the arrays of the old one's
stream ("There is no Stream(cpu, 0) in current thread", MLX 0.32).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from queue import Queue
from typing import NoReturn, cast

import mlx.core as mx

from .. import _core, _reports, errors
from .asked import Asked
from .disconnects import Disconnects
from .first_model import load_first_model, status_line
from .headroom import Headroom, MemoryFlags
from .health import Health
from .in_flight import InFlight, request_of
from .live import Live
from .logs import fields
from .metrics import Metrics
from .mlx_lm import compat
from .mlx_lm.bases import ResponseGenerator
from .mlx_lm.kv_tier import KVTier
from .mlx_lm.prompt_cache import PromptCache
from .mlx_lm.protocols.models import ModelProvider
from .mlx_lm.protocols.opaque import (
    Item,
    Json,
    ModelKey,
    Progress,
    Stops,
    Tokenized,
)
from .mlx_lm.protocols.requests import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
    Taken,
)
from .mlx_lm.protocols.text import Tokenizer
from .model_names import ModelNames
from .overflow import Overflow
from .parts import Parts
from .prefill import PrefillStep
from .prompts import Held, Prompts
from .ranks import AllStop, Home
from .recovery import Recovery, portable
from .replies import (
    EXPECTED,
    Unavailable,
    is_of_all,
    reply_for,
)
from .request import Disconnected, RequestState
from .scheduler import Scheduler
from .sequential import Sequential
from .served_model import ServedModel
from .status import Sources, Status, disk_of, versions
from .step import Step
from .watchdog import Watchdog

__all__ = ["ProtectedResponseGenerator"]

log = logging.getLogger("mlx_safe.server")

STOP_TIMEOUT_S = 3.0
# With more than one rank: until all have met once more, when the slowest comes.
# One that is left without it ends as after a failure.
STOP_TIMEOUT_OF_RANKS_S = 8.0

# mlx-lm's loop that fails so often before it asks for work will not get further.
STARTS_WITHOUT_WORK_MAX = 20


class Door(Queue[Taken]):
    """mlx-lm's queue: who comes in is in flight from then on."""

    def __init__(self, arrive: Callable[[Taken], Taken]) -> None:
        super().__init__()
        self._arrive = arrive

    def put(
        self, item: Taken, block: bool = True, timeout: float | None = None
    ) -> None:
        """Raises what ``arrive`` does: nothing is queued then."""
        super().put(self._arrive(item), block, timeout)


class ProtectedResponseGenerator(ResponseGenerator):
    """mlx-lm's generator with an end to every request and none to the thread."""

    def __init__(
        self,
        model_provider: ModelProvider,
        prompt_cache: PromptCache,
        health: Health,
        replay_attempts: int,
        stall_timeout_s: float,
        step_seconds: float,
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
        share = None if self._one_rank else self._share_object
        prefill = PrefillStep(model_provider.cli_args, step_seconds)
        self.headroom = Headroom(memory, prompt_cache, prefill, self._one_rank)
        self.scheduler: Scheduler[InFlight] = Scheduler(
            self.headroom,
            replay_attempts if self._one_rank else 0,
            memory.wait_s,
            prefill.be_careful,
            one_rank=self._one_rank,
        )
        prompt_cache.may_store = self._may_store
        prompt_cache.gives_away = self._gives_away
        self._disk: KVTier | None = prompt_cache.disk
        if self._disk is not None:
            self._disk.current = lambda: self.scheduler.current
        self.disconnects = Disconnects()
        self.live = Live(self.scheduler, Step(), self.headroom.gauges)
        self.step = self.live.step
        self.watchdog = self._make_watchdog(stall_timeout_s)
        self.metrics = self._make_metrics(prompt_cache)
        self.recovery = self._make_recovery(prompt_cache)
        self.parts = self._make_parts(prefill, share)
        # An error that mlx-lm caught itself, until the thread gets round to it.
        self._caught: Exception | None = None
        # How often mlx-lm's loop has failed before it asked for work.
        self._starts_without_work = 0
        self._model = self._make_model(model_provider, prefill, max_kv_size)
        self._sequential = Sequential(
            self.scheduler, self.headroom, share, prefill, self.step
        )
        self._prompts = self._make_prompts()
        self.status = self._make_status(prompt_cache)
        if home is not None and home.lifeline is not None:
            home.lifeline.watch(self._rank_is_gone)
        # Starts the thread.
        super().__init__(model_provider, prompt_cache)

    def _make_parts(
        self, prefill: PrefillStep, share: Callable[[object], object] | None
    ) -> Parts:
        return Parts(
            self.scheduler,
            self.headroom,
            prefill,
            self.step,
            self.recovery.end_alone,
            self._disk,
            share,
            self._between_steps,
            # Queue's own deque: `empty` would take a lock before each step.
            lambda: bool(self._queue.queue) and self.scheduler.takes_new(),
        )

    def _make_recovery(self, prompt_cache: PromptCache) -> Recovery:
        return Recovery(
            self.scheduler,
            self.health,
            self.headroom,
            prompt_cache,
            self.metrics,
            one_rank=self._one_rank,
        )

    def _make_prompts(self) -> Prompts:
        return Prompts(
            self._model,
            self._overflow,
            self.scheduler,
            self.headroom,
            self.parts.resumed,
            self.metrics,
            self._one_rank,
        )

    def _make_model(
        self, provider: ModelProvider, prefill: PrefillStep, max_kv_size: int | None
    ) -> ServedModel:
        return ServedModel(
            provider,
            self.names,
            self.headroom,
            self._overflow,
            self.parts.resumed,
            is_first=lambda: self.health.state == "loading",
            on_load=self._loads,
            on_loaded=prefill.model_loaded,
            on_call=self.parts.model_called,
            detokenizer=self.parts.own.detokenizer,
            max_kv_size=max_kv_size,
            disk=self._disk,
        )

    def _loads(self) -> None:
        # `_next_request`, or the request's first step, ends it.
        self.step.begin("load")
        self.scheduler.works_on(*self.scheduler.requests(RequestState.WAITING))

    def _make_watchdog(self, stall_timeout_s: float) -> Watchdog:
        return Watchdog(
            stall_timeout_s,
            self._is_working,
            lambda: self.step.begun,
            self.live.doing,
            lambda why: self.recovery.give_up(
                Unavailable(f"The server restarts: {why}.", restarts=True),
                reported=True,
            ),
        )

    def _make_metrics(self, prompt_cache: PromptCache) -> Metrics:
        metrics = Metrics(
            self.live,
            lambda: self.scheduler.tokens,
            lambda: float(self.health.state == "ok"),
        )
        metrics.watch_prompt_cache(prompt_cache)
        if self._disk is not None:
            metrics.watch_kv_disk(self._disk.store, self._disk.writer)
        metrics.watch_memory(
            lambda: self.scheduler.events,
            self.headroom.gauges,
            lambda: self.headroom.observer.peak,
        )
        return metrics

    def _make_status(self, prompt_cache: PromptCache) -> Status:
        headroom = self.headroom
        return Status(
            Sources(
                health=self.health,
                requests=self.live.requests,
                memory=headroom.gauges,
                lowered=lambda: headroom.limits.lowered,
                prompt_cache=prompt_cache,
                metrics=self.metrics,
                events=lambda: self.scheduler.events,
                tokens=lambda: self.scheduler.tokens,
                model=lambda: next(iter(self.names.own), None),
                about={"protection": status_line(), **versions()},
                disk=lambda: disk_of(self._disk),
            )
        )

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
        self._model.check(request, args)
        return super().generate(request, args, progress)

    @property
    def width(self) -> int | None:
        """The width of the loaded model's logits; None: not known. Any thread."""
        return self._model.limits.facts.width

    def figures(self) -> Json:
        """What crash reports tell of this server. Any thread."""
        return {} if self._disk is None else {"kv_disk": self._disk.figures()}

    def _log_cache_stats(self) -> None:
        """mlx-lm calls it for each request; its own way takes four lines."""
        log.debug(
            "prompt cache",
            extra=fields(
                entries=len(self.prompt_cache), bytes=int(self.prompt_cache.nbytes)
            ),
        )

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
        loaded = load_first_model(
            self.model_provider, self.health, self.recovery.fail_everyone
        )
        if not loaded:
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
                log.exception("the recovery from a failure has failed")
            self.recovery.give_up(lost or portable(e))

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
    ) -> Tokenized:
        tokenize = super()._tokenize
        self.scheduler.works_on(request_of(request))
        return self._prompts.read(
            request, args, tokenizer, lambda request: tokenize(tokenizer, request, args)
        )

    def _may_store(self, size: int, given: int) -> bool:
        return self.headroom.may_store(size, given, self.scheduler.load())

    def _gives_away(self) -> bool:
        """Whether the request that is about to start takes its entry over."""
        current = self.scheduler.current
        return current is not None and current.run.takes_over

    def _make_state_machine(
        self,
        model_key: ModelKey,
        tokenizer: Tokenizer,
        stop_words: list[str],
        *args: object,
        **kwargs: object,
    ) -> Stops:
        make = super()._make_state_machine
        return self.parts.state_machine(
            lambda: make(model_key, tokenizer, [], *args, **kwargs), stop_words
        )

    def _next_request(self, timeout: float | None = None) -> Taken | None:
        # mlx-lm's loop comes by here between any two pieces of work.
        self._starts_without_work = 0
        self.step.end()
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
        # Where another rank has the clients, it comes as that rank got it.
        is_here = self._rank == 0
        request = cast(InFlight, taken[0]) if is_here else self._in_flight(taken)
        if not request.taken() and self._one_rank:
            return None
        return request  # of one whose client has left, too: the other ranks have it

    def _in_flight(self, asked: Taken) -> InFlight:
        return InFlight(
            self.scheduler, asked, self._before_put, self._on_caught, self._one_rank
        )

    def _arrive(self, asked: Taken) -> Taken:
        """What a handler puts into mlx-lm's queue, in flight from now on."""
        if isinstance(asked[1], AllStop):
            return asked
        request = self._in_flight(asked)
        self.scheduler.arrive(request)
        self.disconnects.bind(request.id, request)
        return request, asked[1], asked[2]

    @property
    def requests(self) -> Queue[Taken]:
        """mlx-lm's queue of what is to be generated."""
        return self._queue

    @requests.setter
    def requests(self, queue: Queue[Taken]) -> None:
        # mlx-lm makes it just before it starts the thread that reads it.
        self._queue = Door(self._arrive)

    def _serve_single(self, request: Taken, *args: object) -> None:
        self.scheduler.serve_alone(cast(InFlight, request[0]))
        self._sequential.begin()
        super()._serve_single(request, *args)

    def _before_put(self, request: InFlight, item: Item) -> None:
        self.recovery.check_epoch()
        if self._disk is not None:
            self._keep_on_disk(self._disk, request, item)
        if request.run.alone:
            _reports.sample_memory()
            self._sequential.before_put(request, item)

    def _between_steps(
        self, request: InFlight, done: int, total: int, by_target: bool
    ) -> None:
        """With a draft model, of which mlx-lm puts nothing before the first token."""
        self.watchdog.moved()
        _reports.sample_memory()
        self.recovery.check_epoch()
        if self._disk is not None:
            self._disk.checkpoint_alone(request, None)
            self._disk.confirm()
        self._sequential.between_steps(request, done, total, by_target)
        request.read(done, total)

    def _keep_on_disk(self, disk: KVTier, request: InFlight, item: Item) -> None:
        if hasattr(item, "token"):
            disk.first_token(request)
        elif request.run.alone and isinstance(item, tuple):
            disk.checkpoint_alone(request, item[0])
            disk.confirm()  # which synchronises: the step is done, and had no fault

    def _is_working(self) -> bool:
        # mlx-lm's loop comes by `_next_request` every tenth of a second when there is
        # nothing to do, so a thread that does not move is in a step that hangs. Its
        # clients may have left, and those that come later wait in the queue. With more
        # than one rank the step may be the meeting in such a turn.
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
            request.fail(exc)
            return
        if not request.has_context and not is_of_all(exc):
            log.error(
                "a request could not be begun",
                exc_info=exc,
                extra=fields(id=request.id),
            )
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
            self.requests.put(cast(Taken, (Queue(), AllStop(), None)))
        # A step that is under way may take its time, or never end.
        self._generation_thread.join(
            STOP_TIMEOUT_S if self._one_rank else STOP_TIMEOUT_OF_RANKS_S
        )
        if self._disk is not None:
            self._disk.close()
        self.health.leave(0, lambda: self.recovery.fail_everyone(why))
