"""The decision about one request, or one step: a pure function of numbers.

In this order: give the pool back; evict prompt-cache entries; take over the entry that
the request is about to reuse, instead of copying it. Then: read the prompt in smaller
steps; wait for those that run; refuse. So nothing is refused while the pool
or the prompt cache holds what is missing. The entry to be reused is never evicted:
taken over, its content lives on in the request.

What faults have taught, and estimates of what is active besides, decide on what runs
together. A request that is alone and not too long is tried in the smallest step in
any case, as long as its caches have room. Whether there is room for a step too, MLX
shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Decision", "Option", "Situation", "decide"]

Verdict = Literal["admit", "wait", "refuse", "never"]


@dataclass(frozen=True)
class Situation:
    """How things stand. Sizes in bytes.

    Attributes:
        ceiling: what may be active now.
        later: what may be again later (the
            ceiling without what was learned from faults).
        active: what is active.
        pool: what MLX keeps beside that.
        evictable: what the entries of the prompt cache hold that the request
            does not reuse.
        reusable: what the entry holds that it does.
        baseline: what is active when nothing runs and the prompt cache is empty.
        running: requests that will end and give memory back.
        promised: it is not too long, whatever an estimate says now.
        alone: nothing
            else runs.
        may_wait: the request has time left.
        kv_limit: what the caches of all running requests may hold
            (``--max-active-kv-bytes``); None: no limit.
    """

    ceiling: int
    later: int
    active: int
    pool: int = 0
    evictable: int = 0
    reusable: int = 0
    baseline: int = 0
    running: int = 0
    promised: bool = False
    alone: bool = False
    may_wait: bool = True
    kv_limit: int | None = None


@dataclass(frozen=True)
class Option:
    """What admitting the request would take with prompts read in steps of ``step``.

    Attributes:
        growth: bytes that all running requests, this one among them, will still
            grow by, with the transient of a step.
        alone: bytes that it would grow by if it ran alone, likewise.
        least: of
            them, what its caches take in any case.
        kv: bytes of the caches of all of them at the end.
        kv_alone: of its own.
    """

    step: int
    growth: int
    alone: int = 0
    least: int = 0
    kv: int = 0
    kv_alone: int = 0


@dataclass(frozen=True)
class Decision:
    """What to do, in the order of the attributes, and then the verdict.

    Attributes:
        free_pool: ``mx.clear_cache()``.
        evict: bytes of prompt-cache entries to
            evict, oldest first.
        take_over: the entry to be reused is not copied.
        step: the step to read prompts with.
        verdict: ``"admit"``; ``"wait"``; ``"refuse"``: it would fit later;
            ``"never"``: not even alone.
        missing: bytes that are not there even so; 0 when admitted.
        times: how often over what was asked for fits beside, without anything being
            thrown away; 0 where that is not known.
    """

    free_pool: bool
    evict: int
    take_over: bool
    step: int
    verdict: Verdict
    missing: int = 0
    times: int = 0


def decide(now: Situation, options: Iterable[Option]) -> Decision:
    """What to do about a request.

    Args:
        options: at least one; the largest step first. Those after the first that
            fits are not looked at.
    """
    for last in options:
        found = _admit(now, last)
        if found is not None:
            return found
    missing = now.active + last.growth - now.ceiling - now.evictable - now.reusable
    found = Decision(
        free_pool=now.pool > 0,
        evict=now.evictable,
        take_over=False,
        step=last.step,
        verdict="refuse",
        missing=max(1, missing),
    )
    too_much_kv = now.kv_limit is not None and last.kv_alone > now.kv_limit
    too_long = too_much_kv or now.baseline + last.alone > now.later
    if too_long and not now.promised:
        # No reason to throw anything away.
        return replace(found, verdict="never", free_pool=False, evict=0)
    given = now.evictable + now.reusable
    if now.alone and now.active + last.least <= now.later + given:
        take_over = now.reusable > 0
        return replace(found, verdict="admit", take_over=take_over, missing=0)
    if now.running > 0 and now.may_wait:
        # Entries stay while it waits: what runs may end and make room.
        return replace(found, verdict="wait", evict=0)
    return replace(found, evict=0)


def _admit(now: Situation, option: Option) -> Decision | None:
    """The admission with this option; None when it does not fit."""
    if now.kv_limit is not None and option.kv > now.kv_limit:
        return None
    missing = now.active + option.growth - now.ceiling
    if missing > now.evictable + now.reusable:
        return None
    left = -missing - now.pool
    return Decision(
        # What is evicted goes into the pool first.
        free_pool=left < 0,
        evict=min(max(0, missing), now.evictable),
        take_over=missing > now.evictable,
        step=option.step,
        verdict="admit",
        times=max(0, left // max(1, option.growth) + 1),
    )
