"""mlx-lm's `BatchGenerator`, which begins again after a fault.

Used by the thread that generates. All of mlx-lm that is touched here (0.31.3 to 0.32):

- ``BatchGenerator``: ``__init__``, ``insert_segments``, ``remove``, ``extract_cache``,
  ``close`` and ``_next`` (what ``next`` and ``next_generated`` call) are wrapped;
  ``_unprocessed_sequences`` has tuples of eight, which `sequences` reads and makes;
  ``_currently_processing``, ``prefill_batch_size``, ``completion_batch_size`` and
  ``prefill_step_size``.
- its ``_prompt_batch`` and ``_generation_batch``: ``filter([])`` empties them, so that
  what a server has hung on to them stays; `places` mends what 0.31.3 leaves behind.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from .. import errors
from .._failures import (
    Failure,
    FaultWatch,
    at_once,
    care_level,
    is_out_of_memory,
    what_it_means,
)
from .._thread_state import drop_failed, make_sound
from ..memory.demand import STEP_MIN
from .births import are_younger_than_faults, note_births
from .callables import draws, has_state, may_draw
from .places import keep_places
from .sequences import Kept, leaves

__all__ = ["protect", "unprotect"]

log = logging.getLogger("mlx_safe")

_ATTRIBUTE = "_mlx_safe_replay"
_WRAPPED = ("__init__", "insert_segments", "remove", "extract_cache", "close", "_next")
_SIZES = ("prefill_batch_size", "completion_batch_size", "prefill_step_size")


class _Seeds:
    """How often ``mx.random.seed`` was called. Any thread.

    A server that seeds for a request does so before or after it is inserted, and may
    insert others in between, into other generators.

    Attributes:
        calls: so far. taken: of them, those that an insert into any generator has met.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.taken = 0
        self.seed: Callable[..., Any] = mx.random.seed

    def watch(self) -> None:
        def seed(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.seed(*args, **kwargs)

        if mx.random.seed is self.seed:
            mx.random.seed = seed


_seeds = _Seeds()


class _Protection:
    """What is the same of all generators of one class."""

    def __init__(self, cls: Any, attempts: int, keep_caches: bool) -> None:
        self.plain = {name: getattr(cls, name) for name in _WRAPPED}
        self.attempts = attempts
        self.keep_caches = keep_caches


def protect(cls: Any, attempts: int, keep_caches: bool) -> None:
    """As `mlx_safe.mlx_lm.protect`."""
    # A subclass of one that is protected has what that has.
    found = getattr(cls, _ATTRIBUTE, None)
    if found is not None:
        found.attempts, found.keep_caches = attempts, keep_caches
        return
    below = next(filter(_is_protected, _below(cls)), None)
    if below is not None:
        raise TypeError(
            f"{below.__module__}.{below.__name__} is protected, a subclass of "
            f"{cls.__module__}.{cls.__name__}: protect that first, or unprotect this"
        )
    missing = [name for name in _WRAPPED if not callable(getattr(cls, name, None))]
    if missing:
        raise TypeError(
            f"{cls.__module__}.{cls.__name__} is not mlx-lm's BatchGenerator of 0.31.3 "
            f"to 0.32: it has no {', '.join(missing)}"
        )
    _seeds.watch()
    note_births()
    protection = _Protection(cls, attempts, keep_caches)
    setattr(cls, _ATTRIBUTE, protection)
    for name, wrapped in _wrapped(protection).items():
        setattr(cls, name, wrapped)


def _below(cls: Any) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _below(one)


def _is_protected(cls: Any) -> bool:
    return _ATTRIBUTE in vars(cls)


def unprotect(cls: Any) -> None:
    """As `mlx_safe.mlx_lm.unprotect`."""
    found = cls.__dict__.get(_ATTRIBUTE)
    if found is not None:
        for name, plain in found.plain.items():
            setattr(cls, name, plain)
        delattr(cls, _ATTRIBUTE)


def _wrapped(protection: _Protection) -> dict[str, Any]:
    plain = protection.plain
    plain_next = plain["_next"]

    def replay_of(generator: Any) -> _Replay:
        found: _Replay | None = generator.__dict__.get(_ATTRIBUTE)
        if found is None:  # it was made before the class was protected
            found = generator.__dict__[_ATTRIBUTE] = _Replay(protection, generator)
        return found

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain["__init__"](self, *args, **kwargs)
        self.__dict__[_ATTRIBUTE] = _Replay(protection, self)

    def insert_segments(self: Any, *args: Any, **kwargs: Any) -> Any:
        uids = plain["insert_segments"](self, *args, **kwargs)
        replay_of(self).inserted(uids)
        return uids

    def remove(self: Any, uids: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return replay_of(self).removed(
            uids, lambda: plain["remove"](self, uids, *args, **kwargs)
        )

    def extract_cache(self: Any, uids: Sequence[Any]) -> Any:
        return replay_of(self).computed(plain["extract_cache"](self, uids))

    def close(self: Any) -> None:
        self.__dict__.pop(_ATTRIBUTE, None)
        plain["close"](self)

    def _next(self: Any) -> Any:
        replay = self.__dict__.get(_ATTRIBUTE)
        if replay is None or not replay.kept:
            return plain_next(self)
        return replay.step()

    return {
        function.__name__: function
        for function in (__init__, insert_segments, remove, extract_cache, close, _next)
    }


class _Replay:
    """What one generator was given and has produced.

    Attributes:
        kept: the requests in it, by uid; those that came first come first.
    """

    def __init__(self, protection: _Protection, generator: Any) -> None:
        self._protection = protection
        # No more than that: its caches are to go when its server lets go of it.
        self._ref = weakref.ref(generator)
        self._plain_next = protection.plain["_next"]
        self.kept: dict[Any, Kept] = {}
        self._faults = FaultWatch()
        # Failures since a token was returned.
        self._in_vain = 0
        # Of the calls of `mx.random.seed`, those that an insert here has met.
        self._seeds_met = _seeds.taken
        keep_places(type(generator._generation_batch))
        # What failed while a cache was computed for the server.
        self._doubt: Exception | None = None
        # What `next` raises until the server has done something about it.
        self._refused: Exception | None = None
        # mlx-lm's sizes, while those that failed are tried with care; and who that is.
        self._sizes: tuple[int, ...] = ()
        self._careful: set[Any] = set()

    @property
    def _generator(self) -> Any:
        generator = self._ref()
        assert generator is not None  # it calls
        return generator

    # -- what the server does --------------------------------------------------------

    def inserted(self, uids: Sequence[Any]) -> None:
        """Keeps what ``insert_segments`` has put at the end of the queue.

        A fault since the last step may be of the caches that came with them, unless
        they were made after it. The next step deals with it: servers have a way out
        there, and some have none here (flyto-mlx 0.7 loses the request, and its client
        waits for ever).
        """
        if self._refused is not None:
            self._forget_all()
        queue = self._generator._unprocessed_sequences
        entries = [queue[i - len(uids)] for i in range(len(uids))]
        filled = [list(filter(_is_filled, leaves(entry[3]))) for entry in entries]
        given = [caches for caches in filled if caches]
        failed = None
        try:
            if given:
                mx.eval([cache.state for caches in given for cache in caches])
                if not all(map(are_younger_than_faults, given)):
                    self._faults.check()
                elif not self.kept:  # what failed is not in here
                    self._doubt = self._faults.settle()
        except Exception as e:
            if self._faults.behind(e) is None and not errors.is_allocation_failure(e):
                self._protection.plain["remove"](self._generator, uids)
                raise
            self._doubt = self._doubt or e
            failed = e
        seeded = self._seeds_met < _seeds.calls
        self._seeds_met = _seeds.taken = _seeds.calls
        for entry in entries:
            self.kept[entry[0]] = kept = Kept(entry)
            kept.seeded = seeded
            self._judge(kept, entry)
            if failed is not None and any(map(_is_filled, leaves(kept.cache))):
                kept.why_not = "its cache may be of failed work"

    def _pass(self, exc: Exception) -> None:
        """A failure that no step has met: the next step does, if there is work."""
        if self.kept:
            self._doubt = self._doubt or exc
        else:
            self._faults.settle()

    def _judge(self, kept: Kept, entry: Sequence[Any]) -> None:
        """What ``kept`` begins from when it begins again, or why it cannot."""
        _, _, _, cache, _, sampler, processors, _ = entry
        sampler = sampler or self._generator.sampler
        kept.is_drawn = draws(sampler) or any(map(may_draw, processors or ()))
        if has_state(sampler):
            kept.why_not = "its sampler may have a state"
        elif any(has_state(processor) for processor in processors or ()):
            kept.why_not = "a logits processor of it may have a state"
        elif not all(map(_is_of_mlx_lm, leaves(cache))):
            kept.why_not = "it came with a cache of a kind that mlx-lm does not have"
        elif not any(_is_filled(leaf) for leaf in leaves(cache)):
            # mlx-lm merges it into a batch's; vmlx (1.6) fills it.
            kept.keep_cache()
        elif kept.is_explained and _kinds(fresh := self._fresh()) == _kinds(cache):
            kept.forget_cache(fresh)
        elif self._protection.keep_caches:
            kept.keep_cache()
        else:
            kept.why_not = "its tokens do not explain the cache that it came with"

    def _fresh(self) -> Any:
        """Empty caches, as the generator makes them."""
        make = getattr(self._generator, "_make_new_cache", None)  # 0.31
        if make is not None:
            return make()
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self._generator.model, self._generator.max_kv_size)

    def removed(self, uids: Sequence[Any], remove: Callable[[], Any]) -> Any:
        """Has ``remove`` take them out, whose caches it may return."""
        for uid in uids:
            self.kept.pop(uid, None)
        if self._refused is not None:
            self._forget_all()
        return self.computed(remove())

    def computed(self, caches: Any) -> Any:
        """``caches`` of `extract_cache`, whose arrays are there now.

        Raises:
            GPUError: they are of failed work.
        """
        if not caches:
            return caches
        try:
            for cache in caches.values():
                _compute(cache[0])
            self._faults.check()
        except Exception as e:
            fault = self._faults.behind(e)
            self._pass(e)
            raise fault or e from None
        return caches

    def _forget_all(self) -> None:
        self.kept.clear()
        self._refused = self._doubt = None
        self._faults.settle()
        self._end_care()

    # -- steps -----------------------------------------------------------------------

    def step(self) -> Any:
        """A step of the generator: what ``_next`` returns.

        Raises:
            GPUError: it failed, and cannot be done again.
        """
        if self._refused is not None:
            raise self._refused.with_traceback(None)
        while True:
            try:
                if self._doubt is not None:
                    doubt, self._doubt = self._doubt, None
                    raise doubt
                # Of what the step before has left to be computed.
                self._faults.check()
                prompts, answers = self._plain_next(self._ref())
                for answer in answers:
                    if answer.finish_reason is not None and answer.prompt_cache:
                        _compute(answer.prompt_cache)
                self._faults.check()
            except Exception as e:
                failed = e
            else:
                self._tell(prompts, answers)
                return prompts, answers
            self._begin_again(failed)

    def _tell(self, prompts: Sequence[Any], answers: Sequence[Any]) -> None:
        kept = self.kept
        if answers:
            self._in_vain = 0
        for answer in answers:
            found = kept.get(answer.uid)
            if found is None:
                continue
            if answer.finish_reason is None:
                found.produced.append(answer.token)
                found.made += 1
            else:
                del kept[answer.uid]
        for prompt in prompts:
            found = kept.get(prompt.uid)
            if found is not None:
                found.tell_read(prompt)
        if self._careful and not self._careful & kept.keys():
            self._end_care()

    # -- failures --------------------------------------------------------------------

    def _begin_again(self, exc: Exception) -> None:
        """After a step that has failed.

        Raises:
            Exception: ``exc``, or the fault that it stands for: it stays failed.
        """
        fault = self._faults.behind(exc)
        if fault is None and not errors.is_allocation_failure(exc):
            raise exc
        self._faults.report(fault)
        what = what_it_means(fault, exc)
        queued = {entry[0] for entry in self._generator._unprocessed_sequences}
        ran = [kept for uid, kept in self.kept.items() if uid not in queued]
        why_not = self._why_not(what, ran or list(self.kept.values()))
        out_of_memory = is_out_of_memory(fault, exc)
        cause = fault or exc
        self._in_vain += 1
        self._reset(exc)
        late = self._faults.settle()
        if late is not None and not (fault is not None and fault.fatal):
            cause, why_not = late, "the process must be replaced"
        if why_not is not None:
            self._refuse(cause, why_not)
        for kept in ran:
            kept.attempts += 1
        self._take_care(Failure.TOO_MUCH if out_of_memory else what)
        queue = self._generator._unprocessed_sequences
        queue.extend(kept.entry() for kept in self.kept.values())
        log.warning("%s; requests begun again: %d", cause, len(self.kept))

    def _why_not(self, what: Failure, ran: list[Kept]) -> str | None:
        if what is Failure.FINAL:
            return "another try makes no sense, or the process must be replaced"
        worst = [kept for kept in ran if kept.attempts >= self._protection.attempts]
        # When another has failed alone just before, it is neither's fault.
        in_vain = self._in_vain > self._protection.attempts
        if worst and (in_vain or not self._is_put_last(worst)):
            return f"it has failed {worst[0].attempts + 1} times"
        reasons = [kept.why_not for kept in self.kept.values()]
        reasons += [self._why_not_as_it_is(kept) for kept in self.kept.values()]
        reasons.append(self._why_not_of_batch())
        return next((reason for reason in reasons if reason is not None), None)

    def _why_not_as_it_is(self, kept: Kept) -> str | None:
        # After it was inserted, perhaps.
        if kept.is_drawn and (kept.seeded or self._seeds_met < _seeds.calls):
            return "MLX was seeded for an answer that is drawn"
        if kept.has_changed():
            return "what its sampler or logits processor reads has changed"
        return None

    def _why_not_of_batch(self) -> str | None:
        """Whether the batch is not what passed by here."""
        prompts = self._generator._prompt_batch
        answers = self._generator._generation_batch
        queued = {entry[0] for entry in self._generator._unprocessed_sequences}
        if not self.kept.keys() >= {*prompts.uids, *answers.uids, *queued}:
            return "requests were inserted before `protect`, or in another way"
        for uid, made in zip(answers.uids, answers._num_tokens, strict=False):
            # One more where the step that made it returned nothing.
            if made - self.kept[uid].made not in (0, 1):
                return "tokens came that did not pass by the generator"
        return None

    def _is_put_last(self, worst: list[Kept]) -> bool:
        """One that fails alone goes behind the others; False: there are none."""
        if len(worst) != 1 or len(self._careful) < 2 or len(self.kept) < 2:
            return False
        (kept,) = worst
        if kept.attempts > self._protection.attempts:
            return False
        self.kept[kept.uid] = self.kept.pop(kept.uid)
        return True

    def _refuse(self, cause: Exception, why: str) -> None:
        if hasattr(cause, "add_note"):
            cause.add_note(f"mlx_safe.mlx_lm: not done again: {why}")
        log.error("%s; not done again: %s", cause, why)
        self._refused = cause
        raise cause

    def _reset(self, exc: Exception) -> None:
        """Drops what the step may have left unwritten, and MLX's own errors of it."""
        drop_failed(exc)
        generator = self._generator
        generator._prompt_batch.filter([])
        answers = generator._generation_batch
        answers.filter([])
        answers._current_tokens, answers._current_logprobs = None, []
        generator._unprocessed_sequences.clear()
        generator._currently_processing.clear()
        draws = any(kept.is_drawn for kept in self.kept.values())
        called = _seeds.calls
        make_sound(generator._stream, draws=draws)
        _seeds.calls = called  # the new seed is for nobody

    def _take_care(self, what: Failure) -> None:
        """Sets how many run at a time, and in which steps prompts are read."""
        level = max((kept.attempts for kept in self.kept.values()), default=0)
        if not level:
            return
        generator = self._generator
        if not self._sizes:
            self._sizes = tuple(getattr(generator, name) for name in _SIZES)
        limit = at_once(what, len(self.kept), level, self._protection.attempts)
        care = care_level(what, level, self._protection.attempts)
        if limit is not None:
            generator.prefill_batch_size = min(limit, self._sizes[0])
            generator.completion_batch_size = min(limit, self._sizes[1])
        if care:
            size = min(self._sizes[2], max(STEP_MIN, self._sizes[2] // 4**care))
            _set_step_size(generator, size)
        self._careful = set(self.kept)

    def _end_care(self) -> None:
        """Those that failed have ended: sizes are what they were."""
        if self._sizes:
            generator = self._generator
            generator.prefill_batch_size, generator.completion_batch_size, size = (
                self._sizes
            )
            _set_step_size(generator, size)
        self._sizes, self._careful = (), set()


def _set_step_size(generator: Any, size: int) -> None:
    # The part that reads prompts cuts them once more (0.31 to 0.32).
    generator.prefill_step_size = generator._prompt_batch.prefill_step_size = size


def _compute(caches: Any) -> None:
    mx.eval([cache.state for cache in leaves(caches) if _is_filled(cache)])


def _is_filled(cache: Any) -> bool:
    empty = getattr(cache, "empty", None)
    return empty is None or not empty()


def _is_of_mlx_lm(cache: Any) -> bool:
    """Else what is in it may depend on how it was filled, as a quantised one's does."""
    return "mlx_lm.models." in type(cache).__module__


def _kinds(caches: Any) -> list[str]:
    return [type(cache).__name__ for cache in leaves(caches)]
