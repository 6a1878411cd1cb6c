"""How much memory is left for requests, and what is done to have more of it.

`Headroom` looks at MLX, the prompt cache and the ceiling, has `admission` decide, and
carries the decision out. With more than one rank all is admitted: the ranks must agree
on what they run, and each has a memory of its own.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx

from ..memory.budget import Decision, Situation
from ..memory.demand import Demand, Row
from ..memory.estimate import CacheCost, Transients
from ..memory.machine import others_hold, usage
from ..memory.sizes import format_size
from ..memory.sizing import Sizing, format_tokens, sizing
from . import admission
from .admission import Ask, Load, SingleStep
from .limits import Limits
from .mlx_lm import compat
from .mlx_lm.prompt_cache import PromptCache
from .mlx_lm.protocols.generation import BatchGenerator
from .mlx_lm.protocols.models import ModelProvider
from .mlx_lm.protocols.opaque import ModelKey
from .model_demand import NoRoom, demand_of
from .model_limits import context_of
from .observer import Observer
from .prefill import PrefillStep
from .recorder import breadcrumb
from .replies import ContextTooLong, NotEnoughMemory

__all__ = ["Headroom", "MemoryFlags"]

log = logging.getLogger("mlx_safe.server")

# Of a batch that only writes, which needs a few bytes for each token: what other
# programs take is seen that much later. On a GPU they are a tenth of a second.
STEPS_MAX = 16

# Looks at a card, before a request ends or is held, and seconds between them.
LOOKS = 3
LOOK_AGAIN_S = 0.001

EVERYTHING_FITS = Decision(
    free_pool=False, evict=0, take_over=False, step=0, verdict="admit"
)


@dataclass(frozen=True)
class MemoryFlags:
    """The server's flags. Bytes; seconds. None: no limit of the user's."""

    max_active_kv: int | None = None
    max_active_memory: int | None = None
    wait_s: float = 60.0


class Headroom:
    """The memory of one server. Used by the generation thread only.

    Attributes of other threads' interest, read without a lock: ``sizing`` and
    ``limits``.
    """

    def __init__(
        self,
        flags: MemoryFlags,
        prompt_cache: PromptCache,
        prefill: PrefillStep,
        enabled: bool = True,
    ) -> None:
        self._flags = flags
        self._prompt_cache = prompt_cache
        self._user_limit = prompt_cache.max_bytes if prompt_cache.is_limited else None
        self._prefill = prefill
        self._enabled = enabled
        self.limits = Limits(flags.max_active_memory)
        self._measured: object = None
        self._baseline = 0
        self._demand = Demand(CacheCost(), Transients())
        # mlx-lm's batch generator; not kept alive by us.
        self._batch_ref: weakref.ref[BatchGenerator] | None = None
        # Of the prompts that the step that comes next reads: tokens of the longest.
        self._longest = 0
        self.observer = Observer(self._demand.transients)
        self.sizing: Sizing | None = None
        self._context: int | None = None

    # -- the model ---------------------------------------------------------------

    def model_loaded(self, provider: ModelProvider) -> None:
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
        demand = demand_of(provider, self.limits.holds_mlx_back)
        self._measured = key
        assert provider.model is not None
        self._context = context_of(provider.model, provider.tokenizer)
        self._demand = demand
        self.observer = Observer(
            demand.transients,
            self.observer.peak,
            learns=not self.limits.holds_mlx_back,
        )
        self._baseline = self._settled() - int(self._prompt_cache.nbytes)
        self._size_up()

    def _settled(self) -> int:
        """Bytes that are active when nothing runs; see `_decided`."""
        active = int(mx.get_active_memory())
        for _ in range(LOOKS if self.limits.holds_mlx_back else 0):
            mx.synchronize()
            time.sleep(LOOK_AGAIN_S)
            active = min(active, int(mx.get_active_memory()))
        return active

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
        log.info("%s; the ceiling is %s", self.sizing, ceiling.reason.source)
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

    def _decided(self, decide: Callable[[Situation], Decision]) -> Decision:
        """What ``decide`` makes of how things stand, for what ends or holds a request.

        On a card a thread of MLX's gives back what a step has used, a moment after
        it has ended (0.32): with caches that were just copied, that is all of them.
        """
        found = decide(self._situation())
        for _ in range(LOOKS if self.limits.holds_mlx_back else 0):
            if found.verdict not in ("refuse", "never"):
                break
            mx.synchronize()
            time.sleep(LOOK_AGAIN_S)
            found = decide(self._situation())
        return found

    def _situation(self) -> Situation:
        return Situation(
            ceiling=self.limits.now().size,
            later=self.limits.static().size,
            active=int(mx.get_active_memory()),
            pool=int(mx.get_cache_memory()),
            evictable=max(0, int(self._prompt_cache.nbytes)),
            baseline=self._baseline,
            may_wait=False,
            kv_limit=self._flags.max_active_kv,
        )

    def watch(self, batch: BatchGenerator) -> BatchGenerator:
        """Remembers mlx-lm's batch generator; returns it."""
        self._batch_ref = weakref.ref(batch)
        return batch

    def _with_caches(self, load: Load) -> Load:
        """``load``, with what the caches of its requests hold."""
        batch = self._batch_ref() if self._batch_ref is not None else None
        if batch is None:
            return replace(load, held=self._demand.cost.at_least(load.length))
        nbytes, waiting = compat.batch_caches(batch)
        # Those that mlx-lm has not begun with have at most what they took over.
        owned = sum(load.owned.get(uid, 0) for uid in waiting)
        # Not `replace`, which takes longer than all the rest of this.
        return Load(load.rows, load.owned, load.length, nbytes + owned)

    def out_of_memory(self) -> None:
        """A fault or an allocation failure: lowers the ceiling below what was there.

        Of a card that is known. A step that reads prompts has taken all of it at least,
        whatever was estimated, which decides on the size of the next.
        """
        tokens = self._prefill.lacked_memory()
        there = self.limits.out_of_memory(self.observer.recent_peak(), self._baseline)
        if there is not None and tokens:
            self.observer.failed(tokens, self._longest, there)

    def gauges(self) -> dict[str, float]:
        """Bytes, by name: what there is of memory, and what may be. Any thread."""
        now = usage()
        found = {
            "active": now.active,
            "peak": max(self.observer.peak, now.peak),
            "pool": now.pool,
            "ceiling": self.limits.now().size,
            "ceiling_static": self.limits.static().size,
            "model": self._baseline,
            "prompt_cache": max(0, int(self._prompt_cache.nbytes)),
            "prompt_cache_limit": self._prompt_cache.max_bytes,
        }
        if now.footprint is not None:
            found["footprint"] = now.footprint
        if now.available is not None:
            found["available"] = now.available
        machine = self.limits.machine
        found["total"] = machine.card or machine.total
        other = others_hold(machine, now)
        if other is not None:
            found["other"] = other
        return {name: float(value) for name, value in found.items()}

    def figures(self) -> dict[str, int]:
        """What crash reports tell besides MLX's and the system's. Any thread."""
        return {"peak": self.observer.peak, "ceiling": self.limits.now().size}

    # -- what the scheduler asks ------------------------------------------------------

    def admits(self, ask: Ask, load: Load) -> Decision:
        """Whether a request may run beside ``load``. Changes nothing."""
        if not self._enabled:
            return EVERYTHING_FITS
        held = self._with_caches(load)
        found = self._decided(
            lambda now: admission.for_request(
                self._demand, now, held, ask, self._prefill.sizes, self._room_tokens
            )
        )
        if found.verdict == "admit":
            # The sequential path begins with it at once.
            self._note_step(load, found.step, Row(ask.prompt, ask.total))
        return found

    def steps_with_room(self, load: Load) -> int:
        """Makes room for the next steps of a batch; how many fit, 0: not one.

        They are those in which nothing else happens, and none reads a prompt.
        """
        if not self._enabled:
            return STEPS_MAX
        held = self._with_caches(load)
        found = self._decided(
            lambda now: admission.for_step(self._demand, now, held, self._prefill.sizes)
        )
        if not self._carried_out(found):
            return 0
        self._note_step(load, self._prefill.size)
        if self._longest:
            return 1
        return min(max(found.times, 1), STEPS_MAX)

    def single_step(self, load: Load) -> SingleStep:
        """The same for the sequential path."""
        if not self._enabled:
            return "fits"
        size, held = self._prefill.size, self._with_caches(load)
        found = self._decided(
            lambda now: admission.for_single_step(
                self._demand, now, held, size, self._prefill.sizes
            )
        )
        if not self._carried_out(found):
            return "none"
        self._note_step(load, self._prefill.size)
        return "smaller" if found.step < size else "fits"

    def _note_step(self, load: Load, size: int, *more: Row) -> None:
        prompts = [row.prompt for row in (*load.rows, *more) if row.is_reading]
        self._longest = max(prompts, default=0)
        self._prefill.reads(len(prompts) * min(size, self._longest))

    @property
    def step_size(self) -> int:
        """Tokens of a prompt that are read in one step."""
        return self._prefill.size

    # -- what the generator asks ------------------------------------------------------

    def reusable(self, model: ModelKey, tokens: list[int]) -> int:
        """Bytes of the prompt-cache entry that this prompt would begin from."""
        return self._prompt_cache.reusable_bytes(model, tokens)

    def make_room(self, found: Decision, model: ModelKey, tokens: list[int]) -> None:
        """Carries out the admission of a request with this prompt."""
        with self._prompt_cache.protecting(model, tokens):
            self._carry_out(found)

    def refusal(self, found: Decision, prompt: int, total: int) -> Exception:
        """The error of a request that may not run. Sizes in tokens."""
        if found.verdict == "refuse":
            why = self.limits.lowered
            return NotEnoughMemory(
                "There is not enough memory for this request at the moment: "
                f"{format_size(found.missing)} are missing for its "
                f"{prompt} tokens and {total - prompt} more"
                f"{f' ({why})' if why else ''}."
            )
        return ContextTooLong(
            f"The request needs memory for {total} tokens "
            f"({prompt} of the prompt, {total - prompt} to "
            "generate); this server has room for "
            f"{format_tokens(self._room_tokens)}."
        )

    @contextmanager
    def observing_step(self, before: int, after: int) -> Iterator[None]:
        """Held between two steps of the sequential path, while room is made.

        Args:
            before, after: tokens in its caches, before the step that has ended and
                after it; 0 before the first.
        """
        if before:
            self.observer.end(after - before, after)
        yield
        self.observer.begin()

    def may_store(self, size: int, given: int, load: Load) -> bool:
        """Whether the prompt cache may have so many bytes; evicts for them.

        Args:
            given: bytes of its entries that go for it in any case.
        """
        if not self._enabled:
            return True
        found = admission.for_store(
            self._demand,
            self._situation(),
            self._with_caches(load),
            self._prefill.size,
            size,
            given,
        )
        return self._carried_out(found)

    def _carried_out(self, found: Decision) -> bool:
        if found.verdict == "admit":
            self._carry_out(found)
        return found.verdict == "admit"

    def _carry_out(self, found: Decision) -> None:
        if not self._enabled:
            return
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
