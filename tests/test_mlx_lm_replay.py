"""`mlx_safe.mlx_lm.protect`: mlx-lm's batch generator begins again after a fault."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import math
import random
import time
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import mlx_safe
import mlx_safe.mlx_lm
from mlx_safe import testing
from mlx_safe.mlx_lm import callables
from support.batches import LENGTHS, PROMPTS, attached_model, protected_batches  # noqa: F401

generate = pytest.importorskip("mlx_lm.generate")

Tokens = dict[int, list[int]]


def notes_of(exc: BaseException) -> str:
    """What was added to it (Python 3.11 and later)."""
    return "".join(vars(exc)["__notes__"])


def steps(generator: Any, told: Tokens, ends: dict[int, str]) -> bool:
    """One step; what it tells is added. Whether it told anything."""
    prompts, answers = generator.next()
    for answer in answers:
        assert answer.uid not in ends, "something was told after the end"
        told.setdefault(answer.uid, []).append(answer.token)
        if answer.finish_reason is not None:
            ends[answer.uid] = answer.finish_reason
    return bool(prompts or answers)


def run(generator: Any, uids: list[int]) -> list[list[int]]:
    told: Tokens = {}
    ends: dict[int, str] = {}
    while ends.keys() != set(uids):
        assert steps(generator, told, ends), "it has nothing to tell, and has not ended"
    return [told[uid] for uid in uids]


def answers_of(model: Any, **more: Any) -> list[list[int]]:
    generator = generate.BatchGenerator(model, prefill_step_size=16)
    return run(generator, generator.insert(PROMPTS, LENGTHS, **more))


@pytest.fixture(scope="module")
def right(model: Any) -> list[list[int]]:
    found = answers_of(model)
    assert [len(tokens) for tokens in found] == LENGTHS
    return found


@pytest.mark.parametrize("action", ["raise", "record"])
@pytest.mark.parametrize(
    ("phase", "step"),
    [("prefill", 1), ("prefill", 2), ("decode", 1), ("decode", 2), ("decode", 9)],
)
def test_a_fault_changes_no_answer(
    model: Any,
    right: list[list[int]],
    protected: None,
    phase: str,
    step: int,
    action: str,
) -> None:
    with testing.inject(phase, step, 8, action=action) as plan:
        assert answers_of(model) == right
        assert plan.fired == 1


def test_without_a_fault_nothing_changes(
    model: Any, right: list[list[int]], protected: None
) -> None:
    assert answers_of(model) == right


def test_several_faults_one_after_another(
    model: Any, right: list[list[int]], protected: None
) -> None:
    with testing.inject("decode", 3, 2), testing.inject("decode", 12, 5) as last:
        assert answers_of(model) == right
        assert last.fired == 1


def test_one_that_is_taken_out_between_stays_out(
    model: Any, right: list[list[int]], protected: None
) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert(PROMPTS, LENGTHS)
    told: Tokens = {}
    ends: dict[int, str] = {}
    while len(told.get(uids[1], [])) < 3:
        steps(generator, told, ends)
    generator.remove([uids[1]])
    with testing.inject("decode", 2, 8) as plan:
        while len(ends) < 2:
            assert steps(generator, told, ends)
        assert plan.fired == 1
    assert told[uids[1]] == right[1][:3]
    assert [told[uids[0]], told[uids[2]]] == [right[0], right[2]]


def test_one_that_comes_later_is_answered_too(
    model: Any, right: list[list[int]], protected: None
) -> None:
    generator = generate.BatchGenerator(model)
    first = generator.insert(PROMPTS[:2], LENGTHS[:2])
    told: Tokens = {}
    ends: dict[int, str] = {}
    for _ in range(4):
        steps(generator, told, ends)
    with testing.inject("any", 2, 8):
        (last,) = generator.insert([PROMPTS[2]], [LENGTHS[2]])
        while len(ends) < 3:
            assert steps(generator, told, ends)
    assert [told[uid] for uid in [*first, last]] == right


def test_stop_words_are_found_across_a_fault(
    model: Any, right: list[list[int]], protected: None
) -> None:
    word = right[1][5:8]

    def ended() -> tuple[list[int], dict[int, str]]:
        generator = generate.BatchGenerator(model, stop_tokens=[word])
        (uid,) = generator.insert([PROMPTS[1]], [LENGTHS[1]])
        told: Tokens = {}
        ends: dict[int, str] = {}
        while not ends:
            steps(generator, told, ends)
        return told[uid], ends

    without = ended()
    assert without[1] and "stop" in without[1].values()
    for step in range(5, 10):  # before, within and behind the word
        with testing.inject("decode", step, 8):
            assert ended() == without


def test_penalties_go_on_where_they_were(model: Any, protected: None) -> None:
    from mlx_lm.sample_utils import make_logits_processors

    def penalised() -> list[list[int]]:
        made = make_logits_processors(repetition_penalty=1.7, logit_bias={7: 2.0})
        return answers_of(model, logits_processors=[made, made, []])

    right = penalised()
    with testing.inject("decode", 7, 8) as plan:
        assert penalised() == right
        assert plan.fired == 1


def test_segments_end_once(model: Any, protected: None) -> None:
    segments = [[[5, 9, 100, 7], [30] * 20, [8, 9, 10]]]

    def ends_of_segments() -> list[tuple[Any, bool, bool]]:
        generator = generate.BatchGenerator(model, prefill_step_size=8)
        generator.insert_segments(segments, [4])
        found, left = [], 4
        while left:
            prompts, answers = generator.next()
            found += [(p.progress, p.end_of_segment, p.end_of_prompt) for p in prompts]
            left -= len(answers)
        return found

    def told(found: list[tuple[Any, bool, bool]]) -> list[tuple[Any, bool, bool]]:
        return [x for x in found if x[1] or x[2]]

    without = ends_of_segments()
    for step in (1, 2, 3):
        with testing.inject("prefill", step, 8):
            found = ends_of_segments()
        assert told(found) == told(without)
        done = [progress[0] for progress, _, _ in found]
        assert done == sorted(done)
    with testing.inject("decode", 3, 8):
        assert told(ends_of_segments()) == told(without)


# -- faults that do not pass ----------------------------------------------------------


def test_a_lasting_fault_is_told_after_the_attempts(
    model: Any, protected: None
) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert(PROMPTS, LENGTHS)
    with testing.inject("decode", 3, 8, persistent=True) as plan:
        with pytest.raises(mlx_safe.OutOfMemoryError) as caught:
            run(generator, uids)
        # All twice, and then one by one; the first that fails alone goes last.
        assert 3 <= plan.fired <= 5
        assert "not done again" in notes_of(caught.value)
        # Nobody gets a token of it until the server has done something.
        with pytest.raises(mlx_safe.OutOfMemoryError):
            generator.next()
    generator.remove(uids)
    assert run(generator, generator.insert([PROMPTS[0]], [4]))


def test_one_that_always_fails_does_not_take_others_along(
    model: Any, right: list[list[int]], protected: None
) -> None:
    def fails(tokens: mx.array, logits: mx.array) -> mx.array:
        raise RuntimeError(testing.metal_message(8))

    generator = generate.BatchGenerator(model)
    bad, *good = generator.insert(
        [[9, 9], *PROMPTS],
        [5, *LENGTHS],
        logits_processors=[[mlx_safe.mlx_lm.replayable(fails)], [], [], []],
    )
    told: Tokens = {}
    ends: dict[int, str] = {}
    with pytest.raises(mlx_safe.OutOfMemoryError):
        while True:
            steps(generator, told, ends)
    assert [told.get(uid) for uid in good] == right
    assert bad not in told


def test_sizes_are_what_they_were_afterwards(model: Any, protected: None) -> None:
    generator = generate.BatchGenerator(model, prefill_step_size=512)
    names = ("prefill_batch_size", "completion_batch_size", "prefill_step_size")
    before = [getattr(generator, name) for name in names]
    uids = generator.insert(PROMPTS, LENGTHS)
    during = []
    with testing.inject("decode", 2, 8), testing.inject("decode", 5, 8):
        told: Tokens = {}
        ends: dict[int, str] = {}
        while len(ends) < len(uids):
            steps(generator, told, ends)
            during.append([getattr(generator, name) for name in names])
    assert [1, 1, 64] in during
    assert [getattr(generator, name) for name in names] == before
    assert generator._prompt_batch.prefill_step_size == before[2]


@pytest.mark.parametrize("code", [9, 0xB, 4])
def test_what_must_not_be_tried_again_is_told_at_once(
    model: Any, protected: None, code: int
) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert(PROMPTS, LENGTHS)
    with testing.inject("decode", 3, code) as plan:
        with pytest.raises(mlx_safe.MetalError) as caught:
            run(generator, uids)
        assert (plan.fired, caught.value.code) == (1, code)


def test_what_is_no_fault_passes_as_it_is(model: Any, protected: None) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert(PROMPTS, LENGTHS)
    with testing.inject("decode", 3, action="bug"), pytest.raises(ValueError):
        run(generator, uids)


def test_too_little_memory_is_tried_again(
    model: Any, right: list[list[int]], protected: None
) -> None:
    failing = iter([True])

    def allocates(tokens: mx.array, logits: mx.array) -> mx.array:
        if next(failing, False):
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return logits

    made = [[mlx_safe.mlx_lm.replayable(allocates)], [], []]
    assert answers_of(model, logits_processors=made) == right


# -- what cannot be exact -------------------------------------------------------------


def refuses(generator: Any, uids: list[int], why: str) -> None:
    with testing.inject("decode", 2, 8) as plan:
        with pytest.raises(mlx_safe.OutOfMemoryError) as caught:
            run(generator, uids)
        assert plan.fired == 1
    assert why in notes_of(caught.value)


class Counts:
    """A sampler, or a processor, that has a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *given: mx.array) -> mx.array:
        self.calls += 1
        return given[1] if len(given) > 1 else mx.argmax(given[0], axis=-1)


def seeded(seed: int) -> Callable[[mx.array], mx.array]:
    key = mx.random.key(seed)

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs, key=now)

    return sampler


@pytest.mark.parametrize("sampler", [Counts(), seeded(1)], ids=["object", "closure"])
def test_a_sampler_with_a_state_is_not_called_again(
    model: Any, protected: None, sampler: Any
) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert([PROMPTS[0]], [8], samplers=[sampler])
    refuses(generator, uids, "its sampler may have a state")


def test_a_processor_with_a_state_is_not_called_again(
    model: Any, protected: None
) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert([PROMPTS[0]], [8], logits_processors=[[Counts()]])
    refuses(generator, uids, "a logits processor of it may have a state")


def test_an_array_that_is_changed_in_place_is_a_state(
    model: Any, protected: None
) -> None:
    generator = generate.BatchGenerator(model)
    processor = counts_in_place(mx.zeros((8,)))
    uids = generator.insert([PROMPTS[0]], [8], logits_processors=[[processor]])
    refuses(generator, uids, "a logits processor of it may have a state")


def test_a_processor_that_draws_from_a_seed_is_not_called_again(
    model: Any, protected: None
) -> None:
    def shakes(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits + mx.random.normal(logits.shape)

    mx.random.seed(7)
    generator = generate.BatchGenerator(model)
    uids = generator.insert([PROMPTS[0]], [8], logits_processors=[[shakes]])
    refuses(generator, uids, "MLX was seeded")


def test_a_subclass_is_protected_by_its_base_and_once(
    model: Any, right: list[list[int]], protected: None
) -> None:
    class Mine(generate.BatchGenerator):  # type: ignore[misc,name-defined]
        def _next(self) -> Any:
            return super()._next()

    mlx_safe.mlx_lm.protect(Mine)
    with testing.inject("decode", 5, 8) as plan:
        generator = Mine(model, prefill_step_size=16)
        assert run(generator, generator.insert(PROMPTS, LENGTHS)) == right
        assert plan.fired == 1
    mlx_safe.mlx_lm.unprotect()
    mlx_safe.mlx_lm.protect(Mine)
    try:
        with pytest.raises(TypeError, match="Mine is protected, a subclass of"):
            mlx_safe.mlx_lm.protect()
    finally:
        mlx_safe.mlx_lm.unprotect(Mine)


def test_a_draw_that_was_seeded_is_not_made_again(model: Any, protected: None) -> None:
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(7)
    generator = generate.BatchGenerator(model, sampler=make_sampler(temp=1.0))
    uids = generator.insert([PROMPTS[0]], [8])
    refuses(generator, uids, "MLX was seeded")
    generator = generate.BatchGenerator(model, sampler=make_sampler(temp=1.0))
    with testing.inject("decode", 3, 8) as plan:
        assert len(run(generator, generator.insert([PROMPTS[0]], [8]))[0]) == 8
        assert plan.fired == 1


def test_what_was_inserted_before_is_not_known(model: Any, protected: None) -> None:
    mlx_safe.mlx_lm.unprotect()
    generator = generate.BatchGenerator(model)
    uids = generator.insert([PROMPTS[0]], [30])
    mlx_safe.mlx_lm.protect()
    uids += generator.insert([PROMPTS[1]], [30])
    refuses(generator, uids, "inserted before")


def test_tokens_that_did_not_pass_by_are_noticed(model: Any, protected: None) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert([PROMPTS[0]], [30])
    told: Tokens = {}
    while not told:
        steps(generator, told, {})
    for _ in range(3):
        generator._generation_batch.next()
    refuses(generator, uids, "did not pass by")


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 9])
def test_drafts_are_exact_or_there_is_the_typed_error(
    model: Any,
    right: list[list[int]],
    protected: None,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """Speculative decoding of a server's own tells several tokens in one step."""
    cls = generate.GenerationBatch
    one = cls.next

    def two(self: Any) -> Any:
        answers = one(self)
        if len(self) and all(answer.finish_reason is None for answer in answers):
            answers += one(self)
        return answers

    monkeypatch.setattr(cls, "next", two)
    assert answers_of(model) == right
    with testing.inject("decode", step, 8) as plan:
        try:
            assert answers_of(model) == right
        except mlx_safe.OutOfMemoryError as e:  # within one, where none was told yet
            assert "did not pass by" in notes_of(e)
        assert plan.fired == 1


# -- caches ---------------------------------------------------------------------------


def read(model: Any, tokens: list[int]) -> Any:
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.array([tokens]), cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches


PREFIX = [60, 61, 62, 63, 64, 65, 66]


@pytest.mark.parametrize("explained", [True, False])
def test_one_that_comes_with_a_cache(
    model: Any, protected: None, explained: bool
) -> None:
    def answer() -> list[int]:
        generator = generate.BatchGenerator(model)
        more = {"all_tokens": [list(PREFIX)]} if explained else {}
        caches = [copy.deepcopy(cache) for cache in read(model, PREFIX)]
        uids = generator.insert([PROMPTS[0]], [12], caches=[caches], **more)
        return run(generator, uids)[0]

    right = answer()
    whole = generate.BatchGenerator(model)
    assert right == run(whole, whole.insert([PREFIX + PROMPTS[0]], [12]))[0]
    for phase, step in (("prefill", 2), ("decode", 1), ("decode", 6)):
        with testing.inject(phase, step, 8) as plan:
            assert answer() == right
            assert plan.fired == 1


def test_a_cache_that_is_not_explained_can_be_left(model: Any) -> None:
    mlx_safe.mlx_lm.protect(keep_caches=False)
    try:
        generator = generate.BatchGenerator(model)
        uids = generator.insert([PROMPTS[0]], [12], caches=[read(model, PREFIX)])
        refuses(generator, uids, "do not explain the cache")
    finally:
        mlx_safe.mlx_lm.unprotect()


def test_a_cache_of_failed_work_is_not_taken(model: Any, protected: None) -> None:
    generator = generate.BatchGenerator(model)
    caches = read(model, PREFIX)
    testing.record_fault(2)  # MLX has swallowed it
    uids = generator.insert([PROMPTS[0]], [12], caches=[caches])
    with pytest.raises(mlx_safe.MetalError) as caught:
        generator.next()
    assert "its cache may be of failed work" in notes_of(caught.value)
    generator.remove(uids)
    # Its server goes on without one.
    uids = generator.insert([PREFIX + PROMPTS[0]], [12])
    assert len(run(generator, uids)[0]) == 12


@pytest.mark.parametrize("code", [2, 9])
def test_a_fault_of_before_a_cache_was_made_is_not_of_it(
    model: Any, protected: None, code: int
) -> None:
    """Another's, whose prompt its server has read in vain."""
    generator = generate.BatchGenerator(model)
    testing.record_fault(code)
    caches = read(model, PREFIX)
    uids = generator.insert([PROMPTS[0]], [12], caches=[copy.deepcopy(caches)])
    whole = generate.BatchGenerator(model)
    expected = run(whole, whole.insert([PREFIX + PROMPTS[0]], [12]))
    assert run(generator, uids) == expected
    # As old as what it is a copy of.
    testing.record_fault(2)
    generator.insert([PROMPTS[0]], [12], caches=[copy.deepcopy(caches)])
    with pytest.raises(mlx_safe.MetalError):
        generator.next()


def test_what_a_cache_of_failed_work_held_is_read_again(
    model: Any, right: list[list[int]], protected: None
) -> None:
    """Where its tokens are known; one that runs beside it stays right as well."""
    generator = generate.BatchGenerator(model)
    uids = generator.insert([PROMPTS[1]], [LENGTHS[1]])
    told: Tokens = {}
    ends: dict[int, str] = {}
    while not told:
        steps(generator, told, ends)
    first, *rest = PROMPTS[0]
    spoilt = read(model, [first + 1, *PREFIX])
    testing.record_fault(2)
    more: dict[str, Any] = {"all_tokens": [[first, *PREFIX]], "caches": [spoilt]}
    uids += generator.insert([rest], [LENGTHS[0]], **more)
    progress = []
    while len(ends) < 2:
        prompts, answers = generator.next()
        progress += [p.progress for p in prompts if p.uid == uids[1]]
        for answer in answers:
            told.setdefault(answer.uid, []).append(answer.token)
            if answer.finish_reason is not None:
                ends[answer.uid] = answer.finish_reason
    whole = generate.BatchGenerator(model)
    expected = run(whole, whole.insert([[first, *PREFIX, *rest]], [LENGTHS[0]]))
    assert [told[uid] for uid in uids] == [right[1], *expected]
    assert {total for _, total in progress} == {len(rest)}


def test_no_cache_of_a_step_that_failed_is_handed_out(
    model: Any, right: list[list[int]], protected: None
) -> None:
    generator = generate.BatchGenerator(model)
    uids = generator.insert(PROMPTS, LENGTHS)
    told: Tokens = {}
    ends: dict[int, str] = {}
    while len(told) < 3:
        steps(generator, told, ends)
    testing.record_fault(8)  # the step that runs on behind the last one
    with pytest.raises(mlx_safe.OutOfMemoryError):
        generator.extract_cache([uids[0]])
    while len(ends) < 3:
        assert steps(generator, told, ends)
    assert [told[uid] for uid in uids] == right


def empty_caches(model: Any, window: int | None) -> Any:
    """As a server makes them; with a window some prompts and answers overrun it."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    def make() -> Any:
        return KVCache() if window is None else RotatingKVCache(window)

    return [[make() for _ in model.layers] for _ in PROMPTS]


def windowed(model: Any, window: int | None) -> list[list[int]]:
    return answers_of(model, caches=empty_caches(model, window))


@pytest.mark.parametrize(
    ("phase", "step"), [("prefill", 1), ("prefill", 3), ("decode", 2), ("decode", 14)]
)
def test_a_windowed_cache_is_begun_again(
    model: Any, protected: None, phase: str, step: int
) -> None:
    right = windowed(model, 16)
    assert right != windowed(model, None), "the window must make a difference"
    with testing.inject(phase, step, 8) as plan:
        assert windowed(model, 16) == right
        assert plan.fired == 1


def test_a_cache_of_another_kind_is_not_begun_again(
    model: Any, protected: None
) -> None:
    """As the quantised ones of fusion-mlx: its text would be another."""
    from mlx_lm.models.cache import KVCache

    class OfAnother(KVCache):  # type: ignore[misc]
        pass

    generator = generate.BatchGenerator(model)
    caches = [[OfAnother() for _ in model.layers]]
    uids = generator.insert([PROMPTS[0]], [30], caches=caches)
    refuses(generator, uids, "of a kind that mlx-lm does not have")


def test_an_empty_cache_that_its_server_fills_is_empty_again(
    model: Any, right: list[list[int]], protected: None
) -> None:
    """As vmlx does with the one that it has given."""
    generator = generate.BatchGenerator(model)
    caches = empty_caches(model, None)
    uids = generator.insert(PROMPTS, LENGTHS, caches=caches)
    told: Tokens = {}
    ends: dict[int, str] = {}
    while not told:
        steps(generator, told, ends)
    for cache in caches:
        model(mx.array([PREFIX]), cache=cache)
    with testing.inject("decode", 1, 5):
        while len(ends) < 3:
            assert steps(generator, told, ends)
    assert [told[uid] for uid in uids] == right


def test_a_cache_that_mlx_lm_cannot_batch_fails_as_without_us(model: Any) -> None:
    """Quantised ones have no `merge` (mlx-lm 0.31 to 0.32)."""
    from mlx_lm.models.cache import QuantizedKVCache

    def failure() -> tuple[type[Exception], str]:
        caches = [QuantizedKVCache() for _ in model.layers]
        generator = generate.BatchGenerator(model)
        with pytest.raises(Exception) as caught:
            run(generator, generator.insert([PROMPTS[0]], [12], caches=[caches]))
        return caught.type, str(caught.value)

    without = failure()
    mlx_safe.mlx_lm.protect()
    try:
        assert failure() == without
    finally:
        mlx_safe.mlx_lm.unprotect()


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("later", range(7))
def test_one_is_taken_out_in_the_midst_of_beginning_again(
    model: Any, protected: None, window: int | None, later: int
) -> None:
    """Its cache is what its tokens say, however much has been read again."""
    right = windowed(model, window)
    generator = generate.BatchGenerator(model, prefill_step_size=8)
    caches = empty_caches(model, window)
    uids = generator.insert(PROMPTS, LENGTHS, caches=caches)
    told: Tokens = {}
    ends: dict[int, str] = {}
    while len(told.get(uids[2], [])) < 3:
        steps(generator, told, ends)
    with testing.inject("decode", 1, 5) as plan:
        for _ in range(1 + later):
            steps(generator, told, ends)
        assert plan.fired == 1
    taken = generator.remove([uids[2]], return_prompt_caches=True)
    caches, tokens = taken[uids[2]]
    whole = PROMPTS[2] + told[uids[2]]
    assert tokens, "it has been read in part"
    assert list(tokens) == whole[: len(tokens)]
    assert {cache.offset for cache in caches} == {len(tokens)}
    while len(ends) < 2:
        assert steps(generator, told, ends)
    assert [told[uids[0]], told[uids[1]]] == right[:2]
    assert told[uids[2]] == right[2][: len(told[uids[2]])]


def test_a_generator_goes_with_its_last_owner(model: Any, protected: None) -> None:
    generator = generate.BatchGenerator(model)
    generator.insert(PROMPTS, LENGTHS)
    for _ in range(4):
        generator.next()
    seen = weakref.ref(generator)
    gc.disable()
    try:
        del generator
        assert seen() is None, "its caches stay until the collector comes by"
    finally:
        gc.enable()


# -- what can be called again ---------------------------------------------------------

STATE: list[int] = []
now = time.time


def draws_by_itself(logits: mx.array) -> int:
    from random import randrange

    return randrange(logits.size)


def masks(tokens: mx.array, logits: mx.array) -> mx.array:
    """In place, as many processors do: of what it is given."""
    logits[:, 3] = -float("inf")
    return logits


def counts_in_place(counts: mx.array) -> Callable[[mx.array, mx.array], mx.array]:
    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        counts[tokens[-1] % 8] += 1
        return logits - counts[0]

    return processor


def test_which_callables_depend_on_their_arguments_alone() -> None:
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    scale = 2.0
    array = mx.array([1.0])
    box = [0]
    pure: list[Any] = [
        mx.argmax,
        functools.partial(mx.argmax, axis=-1),
        lambda x: mx.argmax(x, axis=-1),
        lambda x: mx.argmax(x * scale + array, axis=-1),
        make_sampler(temp=0.0),
        make_sampler(temp=0.7, top_p=0.9, min_p=0.1, top_k=5),
        *make_logits_processors(logit_bias={1: 2.0}, repetition_penalty=1.1),
        mlx_safe.mlx_lm.replayable(Counts()),
        lambda x: mx.array([float(v) for v in range(3)]),
        masks,
        lambda x: x * math.sqrt(2.0),
    ]
    for function in pure:
        assert not callables.has_state(function), function
    changing: list[Any] = [
        Counts(),
        Counts().__call__,
        seeded(3),
        lambda x: x + box[0],
        lambda x: x + len(STATE),
        functools.partial(lambda kept, x: x, box),
        counts_in_place(mx.zeros((8,))),
        lambda x: x * random.random(),
        lambda x: x * time.time(),
        now,
        draws_by_itself,
        mx.compile(lambda x: x + 1),  # type: ignore[misc]
    ]
    for function in changing:
        assert callables.has_state(function), function


def test_another_class_is_refused_with_its_reason() -> None:
    class Other:
        pass

    with pytest.raises(TypeError, match=r"is not mlx-lm's BatchGenerator.*_next"):
        mlx_safe.mlx_lm.protect(Other)
    with pytest.raises(ValueError, match="attempts"):
        mlx_safe.mlx_lm.protect(attempts=-1)


def test_it_is_said_what_is_begun_again(
    model: Any, protected: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mlx_safe"), testing.inject("decode", 4, 2):
        answers_of(model)
    assert "requests begun again: 3" in caplog.text
