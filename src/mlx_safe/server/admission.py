"""Who may run, and with how much: the budget of `mlx_safe.memory` at work.

Asked at two points, the same on the batched and on the sequential path: when a
request has been tokenized (`Admission.admit`), and before each step of the model
(`Admission.before_step`). The decision is `memory.budget.decide`; here it is
carried out. With more than one rank all is admitted: the ranks must agree on what
they run, and each has a memory of its own.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..memory.budget import Decision, Option, Situation, decide
from ..memory.demand import Demand, Row
from ..memory.estimate import CacheCost, Transients, calibrate
from ..memory.machine import usage
from ..memory.sizes import format_size
from ..memory.sizing import Sizing, format_tokens, sizing
from .limits import Limits
from .mlx_lm import compat
from .mlx_lm.prompt_cache import PromptCache
from .model_limits import context_of
from .observer import Observer
from .prefill import PrefillStep
from .recorder import breadcrumb
from .replies import ContextTooLong, NotEnoughMemory, is_of_all
from .tickets import Claim, Flight, Ticket

__all__ = ["Admission", "Held", "MemoryFlags", "NoRoom"]

log = logging.getLogger("mlx_safe.server")

# How long a request that had begun may wait to go on, whatever --memory-wait says.
BEGUN_WAIT_S = 60.0


class Held(Exception):
    """The request waits for memory; it will be tokenized again."""


class NoRoom(ValueError):
    """The user's flags leave no room for the model, or do not suit it."""


@dataclass(frozen=True)
class MemoryFlags:
    """The server's flags. Bytes; seconds. None: no limit of the user's."""

    max_active_kv: int | None = None
    max_active_memory: int | None = None
    wait_s: float = 60.0


def _measure(provider: Any, transients: Transients) -> CacheCost:
    layers: tuple[Any, ...] = ()
    quantization = compat.kv_quantization(provider.cli_args)
    for model in filter(None, (provider.model, provider.draft_model)):
        make_cache = partial(compat.make_cache, model)
        try:
            compat.try_quantization(make_cache(), quantization)
            cost = calibrate(model, make_cache, transients, **quantization)
        except (ValueError, NotImplementedError) as e:
            if isinstance(e, ValueError) and not str(e).startswith("[quantize]"):
                raise
            # Each prompt beyond --quantized-kv-start would fail on it.
            flags = "--kv-bits {kv_bits} --kv-group-size {kv_group_size}"
            raise NoRoom(f"{flags.format(**quantization)}: {e}") from e
        layers += cost.layers
    return CacheCost(layers)


class Admission:
    """The budget of one server. Used by the generation thread only.

    Attributes of other threads' interest, read without a lock: ``sizing``,
    ``limits``, ``held`` and ``events``. ``last_admitted``: the request that was
    admitted last, which mlx-lm starts next.
    """

    def __init__(
        self,
        flight: Flight,
        flags: MemoryFlags,
        prompt_cache: PromptCache,
        prefill: PrefillStep,
        enabled: bool = True,
    ) -> None:
        self._flight = flight
        self._flags = flags
        self._prompt_cache = prompt_cache
        self._user_limit = prompt_cache.max_bytes if prompt_cache.is_limited else None
        self._prefill = prefill
        self._enabled = enabled
        self.limits = Limits(flags.max_active_memory)
        self._measured: Any = None
        self._baseline = 0
        self._demand = Demand(CacheCost(), Transients())
        self.last_admitted: Ticket | None = None
        # What mlx-lm's sequential path has read and produced.
        self._single_length = 0
        # mlx-lm's batch generator; not kept alive by us.
        self._batch_ref: weakref.ref[Any] | None = None
        self.observer = Observer(self._demand.transients)
        self.sizing: Sizing | None = None
        self._context: int | None = None
        self.held: list[Ticket] = []
        self.events: Counter[str] = Counter()
        prompt_cache.may_store = self._may_store

    # -- the model ---------------------------------------------------------------

    def model_loaded(self, provider: Any) -> None:
        """Measures the model that ``provider`` has just loaded.

        Raises:
            RuntimeError: MLX failed while it did, as any step can.
            NoRoom: nothing could be served with it, and a flag is why.
        """
        if not self._enabled:
            return
        key = provider.model_key
        if key == self._measured:
            return
        transients = Transients()
        cost = CacheCost()
        try:
            cost = _measure(provider, transients)
        except NoRoom:
            raise
        except Exception as e:
            if is_of_all(e):
                raise
            # Only what is active can be looked at then, not what will be.
            log.warning("this model cannot be measured, requests are not: %r", e)
        self._measured = key
        self._context = context_of(provider.model, provider.tokenizer)
        self._demand = Demand(cost, transients)
        self.observer = Observer(transients, self.observer.peak)
        self._baseline = int(mx.get_active_memory()) - int(self._prompt_cache.nbytes)
        self._size_up()

    def _size_up(self) -> None:
        ceiling = self.limits.present()
        self._prefill.settle(None)
        self.sizing = sizing(
            model=self._baseline,
            ceiling=ceiling.size,
            demand=self._demand,
            steps=self._prefill.sizes,
            prompt_cache=self._user_limit,
            kv_limit=self._flags.max_active_kv,
            context=self._context,
        )
        self._prompt_cache.limit_bytes(self.sizing.prompt_cache)
        # A larger step would cost more prompt-cache entries than it is worth.
        self._prefill.settle(self.sizing.step)
        log.info("%s (%s)", self.sizing, ceiling.reason.source)
        breadcrumb("ceiling", ceiling.reason.source, bytes=ceiling.size)
        if self.sizing.room_tokens > 0:
            return
        flag = self._flag_without_room()
        if flag is not None:
            self._measured = None
            raise NoRoom(flag)
        log.error(
            "the model leaves no room below the ceiling, and nothing can be served: "
            "take a smaller model, or set --max-active-memory-bytes"
        )

    def _flag_without_room(self) -> str | None:
        """Which flag leaves no room for even one token, and what it would have to."""
        least = self._demand.option([Row(1, 1)], 0, self._prefill.sizes()[-1])
        kv, memory = self._flags.max_active_kv, self._flags.max_active_memory
        if kv is not None and kv < least.kv:
            return (
                f"--max-active-kv-bytes {kv}: the cache of the shortest prompt needs "
                f"{format_size(least.kv)}"
            )
        if memory is None:
            return None
        needed = format_size(self._baseline + least.growth)
        return (
            f"--max-active-memory-bytes {memory}: the model and one step of a prompt "
            f"need {needed}"
        )

    @property
    def _room_tokens(self) -> int:
        return 0 if self.sizing is None else self.sizing.room_tokens

    # -- the situation -------------------------------------------------------------

    def _situation(
        self,
        reusable: int = 0,
        running: int = 0,
        may_wait: bool = False,
        promised: bool = False,
        alone: bool = False,
    ) -> Situation:
        return Situation(
            ceiling=self.limits.now().size,
            later=self.limits.static().size,
            active=int(mx.get_active_memory()),
            pool=int(mx.get_cache_memory()),
            evictable=max(0, int(self._prompt_cache.nbytes) - reusable),
            reusable=reusable,
            baseline=self._baseline,
            running=running,
            promised=promised,
            alone=alone,
            may_wait=may_wait,
            kv_limit=self._flags.max_active_kv,
        )

    @property
    def _batch(self) -> Any:
        return self._batch_ref() if self._batch_ref is not None else None

    def watch(self, batch: Any) -> Any:
        """Remembers mlx-lm's batch generator; returns it."""
        self._batch_ref = weakref.ref(batch)
        return batch

    def inserted(self, uids: Any) -> Ticket | None:
        """mlx-lm has put the request that was admitted last into its batch."""
        if self.last_admitted is not None:
            (self.last_admitted.uid,) = uids
        return self.last_admitted

    def _running(self) -> list[Ticket]:
        return [t for t in self._flight.running() if t.claim is not None]

    def _rows(self) -> list[Row]:
        claims = [(t.claim, t.is_reading) for t in self._running()]
        return [Row(c.prompt, c.total, reading) for c, reading in claims if c]

    def _held_nbytes(self) -> int:
        """What the caches of the requests that run hold."""
        if self._batch is None:
            # What the last one had is counted no more when it has ended.
            length = self._single_length if self._running() else 0
            return self._demand.cost.at_least(length)
        nbytes, waiting = compat.batch_caches(self._batch)
        # Those that mlx-lm has not begun with have at most what they took over.
        owned = {t.uid: t.owned for t in self._running()}
        return nbytes + sum(owned.get(uid, 0) for uid in waiting)

    def lengths(self) -> dict[Any, int]:
        """Tokens of the prompt of each request that runs, by mlx-lm's uid."""
        return {t.uid: t.claim.prompt for t in self._running() if t.claim is not None}

    def out_of_memory(self) -> None:
        """A fault or an allocation failure: lowers the ceiling below what is active."""
        self.limits.out_of_memory(int(mx.get_active_memory()), self._baseline)

    def gauges(self) -> dict[str, float]:
        """What `metrics.MEMORY_GAUGES` shows. Any thread."""
        now = usage()
        found = {
            "active": now.active,
            "peak": max(self.observer.peak, now.peak),
            "pool": now.pool,
            "ceiling": self.limits.now().size,
            "ceiling_static": self.limits.static().size,
            "model": self._baseline,
            "prompt_cache_limit": self._prompt_cache.max_bytes,
            "held": len(self.held),
            "running": len(self._running()),
        }
        if now.footprint is not None:
            found["footprint"] = now.footprint
        return {name: float(value) for name, value in found.items()}

    def figures(self) -> dict[str, int]:
        """What crash reports tell besides MLX's and the system's. Any thread."""
        return {"peak": self.observer.peak, "ceiling": self.limits.now().size}

    # -- requests that come in -------------------------------------------------------

    def admit(
        self, ticket: Ticket, model: Any, tokens: list[int], max_tokens: int
    ) -> None:
        """Lets the request run, or raises.

        Args:
            model, tokens: as the prompt cache will be asked for them.

        Raises:
            Held: it waits; `next_held` gives it out again.
            NotEnoughMemory: it has waited long enough.
            ContextTooLong: it can never run.
        """
        if not self._enabled:
            return
        before = ticket.claim
        claim = Claim(
            prompt=len(tokens),
            total=len(tokens) + max_tokens,
            produced=len(ticket.produced),
            deadline=time.monotonic() + self._patience(ticket),
        )
        if before is not None and ticket.held:
            claim.deadline = before.deadline
        ticket.claim = None  # not among those that run
        reusable = self._prompt_cache.reusable_bytes(model, tokens)
        found = self._decide_for(ticket, claim, reusable)
        ticket.claim = claim
        earlier = self.held and self.held[0] is not ticket
        if found.verdict == "admit" and earlier and time.monotonic() < claim.deadline:
            raise Held  # those that came first go first
        self._conclude(found, claim)
        with self._prompt_cache.protecting(model, tokens):
            self._carry_out(found)
        self._prompt_cache.gives_away = found.take_over
        ticket.owned = reusable if found.take_over else 0
        self.last_admitted = ticket
        self._single_length = 0
        if ticket in self.held:
            self.held.remove(ticket)
        ticket.held = False
        ticket.uid = None

    def _patience(self, ticket: Ticket) -> float:
        """Seconds that it may wait: what was begun is not given up for a short flag."""
        begun = ticket.context is not None
        return max(self._flags.wait_s, BEGUN_WAIT_S if begun else 0.0)

    def _decide_for(self, ticket: Ticket, claim: Claim, reusable: int = 0) -> Decision:
        running = self._running()
        step_max = ticket.step_max

        def sizes(rows: int) -> list[int]:
            found = self._prefill.sizes(rows)
            return [n for n in found if step_max is None or n <= step_max] or found[-1:]

        rows = [*self._rows(), Row(claim.prompt, claim.total)]
        options = self._demand.to_the_end(rows, self._held_nbytes(), sizes)
        may_wait = time.monotonic() < claim.deadline
        # Those that are held come before this one, and will run before it.
        ahead = len(running) + len(self.held)
        # What had begun, and what the log said there is room for.
        promised = ticket.context is not None or claim.total <= self._room_tokens
        now = self._situation(reusable, ahead, may_wait, promised, not running)
        return decide(now, options)

    def _conclude(self, found: Decision, claim: Claim) -> None:
        """Raises what a verdict other than an admission means."""
        if found.verdict == "wait":
            raise Held
        if found.verdict == "refuse":
            self.events["refused"] += 1
            why = self.limits.lowered
            raise NotEnoughMemory(
                "There is not enough memory for this request at the moment: "
                f"{format_size(found.missing)} are missing for its "
                f"{claim.prompt} tokens and {claim.total - claim.prompt} more"
                f"{f' ({why})' if why else ''}."
            )
        if found.verdict == "never":
            self.events["too_long"] += 1
            raise ContextTooLong(
                f"The request needs memory for {claim.total} tokens "
                f"({claim.prompt} of the prompt, {claim.total - claim.prompt} to "
                "generate); this server has room for "
                f"{format_tokens(self._room_tokens)}."
            )

    def hold(self, ticket: Ticket) -> None:
        """``ticket`` waits until `next_held` gives it out."""
        if not ticket.held:
            ticket.held = True
            self.held.append(ticket)
            self.events["held"] += 1
            log.info("a request waits for memory; %d wait", len(self.held))

    def next_held(self) -> Ticket | None:
        """The request whose turn it is: it fits now, or has waited long enough."""
        self.held = [t for t in self.held if not t.stopped and t.claim is not None]
        now = time.monotonic()
        for ticket in self.held:
            assert ticket.claim is not None
            if now >= ticket.claim.deadline:
                return ticket
        if not self.held:
            return None
        first = self.held[0]
        assert first.claim is not None
        # What it would reuse is not known here; as if it were to be evicted.
        claim, first.claim = first.claim, None
        found = self._decide_for(first, claim)
        first.claim = claim
        return None if found.verdict == "wait" else first

    # -- steps ---------------------------------------------------------------------

    def before_step(self) -> list[Ticket]:
        """Makes room for the next step of the batch.

        Returns the requests that must leave the batch for it: they wait, or have
        been answered.
        """
        running = self._running() if self._enabled else []
        if not running or self._make_room(self._prefill.sizes, len(running) == 1):
            return []
        # The one that came last goes first; what it has so far is not lost. Its
        # memory is free only when mlx-lm has dropped it, so it is one at a time.
        last = running[-1]
        if len(running) > 1:
            self._preempt(last)
        else:
            self._end(last)
        return [last]

    def between_single_steps(self, ticket: Ticket, item: Any) -> None:
        """The sequential path has done a step and puts ``item`` for the client.

        Raises:
            Held: it goes on with smaller steps; mlx-lm has fixed their size.
            NotEnoughMemory: it cannot go on; the client has been told.
        """
        if ticket.claim is None or not self._enabled:
            return
        before = self._single_length
        if isinstance(item, tuple):
            done, total = item
            self._single_length = ticket.claim.prompt - total + done
        elif hasattr(item, "token"):
            self._single_length = ticket.length + 1
        else:
            return
        if before:
            self.observer.end(self._single_length - before, self._single_length)
        size = self._prefill.size
        if not self._make_room(lambda rows: [size]):
            # Only of a prompt: an answer has steps of one token.
            smaller = [n for n in self._prefill.sizes() if n < size]
            smaller = smaller if ticket.is_reading else []
            if not self._make_room(lambda rows: smaller or [size], alone=True):
                self._end(ticket)
                raise NotEnoughMemory("there is no memory for the next step")
            if smaller:
                ticket.step_max = self._prefill.size
                raise Held
        self.observer.begin()

    def _make_room(
        self, sizes: Callable[[int], list[int]], alone: bool = False
    ) -> bool:
        """Whether the next step fits, with prompts read in one of these sizes.

        Args:
            alone: one request runs. It was let in, and goes on as long as there is
                room for what it holds; an estimate does not end it.
        """
        options = self._demand.next_step(self._rows(), self._held_nbytes(), sizes)
        found = decide(self._situation(promised=alone, alone=alone), options)
        if found.verdict == "admit":
            self._carry_out(found)
        return found.verdict == "admit"

    def _preempt(self, ticket: Ticket) -> None:
        assert ticket.claim is not None
        ticket.claim.deadline = time.monotonic() + self._patience(ticket)
        self.events["preempted"] += 1
        ticket.interrupt()
        self.hold(ticket)

    def _end(self, ticket: Ticket) -> None:
        self.events["refused"] += 1
        log.warning("a request alone does not fit any more and is ended")
        ticket.interrupt()
        ticket.fail(
            NotEnoughMemory("There is not enough memory to go on with this request.")
        )

    def _carry_out(self, found: Decision) -> None:
        # A pool in use saves allocations; it goes only when it is in the way.
        if found.free_pool and mx.get_cache_memory() > 0:
            mx.clear_cache()
        evicted = 0
        while evicted < found.evict:
            size = self._prompt_cache.evict_oldest()
            if size == 0:
                break
            evicted += size
        if evicted:
            mx.clear_cache()
        self._prefill.limit("memory", found.step)

    def _may_store(self, size: int, given: int) -> bool:
        """Whether the prompt cache may have so many bytes; evicts for them.

        Args:
            given: bytes of its entries that go for it in any case.
        """
        if not self._enabled:
            return True
        (step,) = self._demand.next_step(
            self._rows(), self._held_nbytes(), lambda rows: [self._prefill.size]
        )
        wanted = Option(step.step, step.growth + size, alone=0)
        now = self._situation()
        now = replace(
            now, active=now.active - given, evictable=max(0, now.evictable - given)
        )
        found = decide(now, [wanted])
        if found.verdict == "admit":
            self._carry_out(found)
        return found.verdict == "admit"
