"""`mlx_safe.mlx_lm.protect`: an answer is exact, or there is the typed error."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from numpy import random as numpy_random

import mlx_safe
import mlx_safe.mlx_lm
from mlx_safe import testing
from mlx_safe.mlx_lm import callables
from support.batches import LENGTHS, PROMPTS, attached_model, protected_batches  # noqa: F401

generate = pytest.importorskip("mlx_lm.generate")


def run(generator: Any, uids: list[int]) -> list[list[int]]:
    told: dict[int, list[int]] = {uid: [] for uid in uids}
    ended: set[int] = set()
    while ended != set(uids):
        prompts, answers = generator.next()
        assert prompts or answers, "it has nothing to tell, and has not ended"
        for answer in answers:
            assert answer.uid not in ended, "something was told after the end"
            told[answer.uid].append(answer.token)
            if answer.finish_reason is not None:
                ended.add(answer.uid)
    return [told[uid] for uid in uids]


def answers_of(model: Any, **more: Any) -> list[list[int]]:
    generator = generate.BatchGenerator(model, prefill_step_size=16)
    return run(generator, generator.insert(PROMPTS, LENGTHS, **more))


def least_likely(logprobs: mx.array) -> mx.array:
    return mx.argmin(logprobs, axis=-1)


def penalties() -> Any:
    from mlx_lm.sample_utils import make_logits_processors

    return make_logits_processors(presence_penalty=1.3, repetition_penalty=1.7)


# -- whose sampler and whose penalties ------------------------------------------------


def of_some() -> dict[str, Any]:
    return {
        "logits_processors": [penalties(), [], penalties()],
        "samplers": [None, least_likely, None],
    }


def test_each_keeps_its_own_sampler_and_penalties(model: Any, protected: None) -> None:
    """Also where some have none (mlx-lm 0.31.3 mixes them up then)."""
    right = []
    for i, prompt in enumerate(PROMPTS):
        generator = generate.BatchGenerator(model, prefill_step_size=16)
        own = {name: [values[i]] for name, values in of_some().items()}
        right += run(generator, generator.insert([prompt], [LENGTHS[i]], **own))
    assert answers_of(model, **of_some()) == right
    for phase, step in [
        ("prefill", 1),
        ("prefill", 3),
        *(("decode", n) for n in (1, 2, 6, 13)),
    ]:
        with testing.inject(phase, step, 8) as plan:
            assert answers_of(model, **of_some()) == right, (phase, step)
            assert plan.fired == 1


def test_one_that_comes_after_plain_ones_has_its_own(
    model: Any, protected: None
) -> None:
    def last(generator: Any) -> list[int]:
        own = {"samplers": [least_likely], "logits_processors": [penalties()]}
        return run(generator, generator.insert([PROMPTS[1]], [12], **own))[0]

    right = last(generate.BatchGenerator(model))
    generator = generate.BatchGenerator(model)
    run(generator, generator.insert(PROMPTS, LENGTHS))
    assert last(generator) == right


# -- seeds ----------------------------------------------------------------------------


def gumbel(logprobs: mx.array) -> mx.array:
    """Draws, though its last word is `argmax`."""
    return mx.argmax(logprobs + mx.random.gumbel(logprobs.shape), axis=-1)


def refused(generator: Any, uids: list[int]) -> str:
    """Why it is not begun again."""
    with testing.inject("decode", 4, 8) as plan:
        with pytest.raises(mlx_safe.OutOfMemoryError) as caught:
            run(generator, uids)
        assert plan.fired == 1
    return "".join(vars(caught.value)["__notes__"])


def drawn() -> Any:
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(temp=1.0)


@pytest.mark.parametrize("when", ["before", "after", "others between", "gumbel"])
def test_a_draw_that_was_seeded_is_not_made_again(
    model: Any, protected: None, when: str
) -> None:
    sampler = gumbel if when == "gumbel" else drawn()
    generator = generate.BatchGenerator(model, sampler=sampler)
    other = generate.BatchGenerator(model)
    if when != "after":
        mx.random.seed(7)
    if when == "others between":
        other.insert([PROMPTS[1]], [3])
    uids = generator.insert([PROMPTS[0]], [12])
    if when == "after":
        mx.random.seed(7)
    assert "MLX was seeded" in refused(generator, uids)


def test_our_new_seed_is_no_seed_of_another_request(
    model: Any, protected: None
) -> None:
    first = generate.BatchGenerator(model, sampler=drawn())
    run(first, first.insert([[9, 9]], [1]))  # meets what was seeded before
    second = generate.BatchGenerator(model, sampler=drawn())
    later = second.insert([PROMPTS[1]], [12])
    with testing.inject("decode", 1, 8) as plan:
        assert len(run(first, first.insert([PROMPTS[0]], [12]))[0]) == 12
        assert plan.fired == 1
    with testing.inject("decode", 3, 8) as plan:
        assert len(run(second, later)[0]) == 12
        assert plan.fired == 1


# -- what was there before ------------------------------------------------------------


def test_what_was_queued_before_is_not_lost_in_silence(model: Any) -> None:
    generator = generate.BatchGenerator(model, completion_batch_size=1)
    uids = generator.insert([PROMPTS[0], PROMPTS[1]], [12, 12])
    while not generator.next()[1]:
        pass
    generator.remove([uids[0]])
    mlx_safe.mlx_lm.protect()
    try:
        uids = [uids[1], *generator.insert([PROMPTS[2]], [12])]
        assert "inserted before" in refused(generator, uids)
    finally:
        mlx_safe.mlx_lm.unprotect()


# -- what may have a state ------------------------------------------------------------

KEPT = mx.zeros((8,))


def add_in_place(counts: mx.array) -> None:
    counts[0] += 1


def counts_in_a_helper(tokens: mx.array, logits: mx.array) -> mx.array:
    add_in_place(KEPT)
    return logits - KEPT[0]


def counts_by_another_name(tokens: mx.array, logits: mx.array) -> mx.array:
    counts = KEPT
    counts += 1
    return logits - KEPT[0]


def counts_among_globals(logits: mx.array) -> mx.array:
    globals()["CALLS"] = globals().get("CALLS", 0) + 1
    return logits * float(globals()["CALLS"])


def draws_from_numpy(logits: mx.array) -> mx.array:
    import numpy as np

    return logits * float(np.random.rand())


def draws_from_its_module(logits: mx.array) -> mx.array:
    from numpy.random import rand

    return logits * float(rand())


def draws_from_a_part(logits: mx.array) -> mx.array:
    return logits * float(numpy_random.rand())


def reads_a_file(logits: mx.array) -> mx.array:
    return logits * len(open(0).read())


def helper() -> None: ...


helper.calls = []  # type: ignore[attr-defined]


def counts_on_a_helper(logits: mx.array) -> mx.array:
    helper.calls.append(1)  # type: ignore[attr-defined]
    return logits * float(len(helper.calls))  # type: ignore[attr-defined,no-any-return]


def looks_like(known: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(known)
    def wrapper(*given: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        return given[-1] * calls

    return wrapper


def not_there_yet() -> Callable[[mx.array], mx.array]:
    later: Callable[[mx.array], mx.array]

    def sampler(logits: mx.array) -> mx.array:
        return later(logits)

    if logging.root is None:
        later = mx.argmax
    return sampler


def test_what_hides_its_state_has_one() -> None:
    from mlx_lm.sample_utils import make_sampler

    found: list[Any] = [
        counts_in_a_helper,
        counts_by_another_name,
        counts_among_globals,
        draws_from_numpy,
        draws_from_its_module,
        draws_from_a_part,
        reads_a_file,
        counts_on_a_helper,
        looks_like(make_sampler(temp=0.7)),
        looks_like(mlx_safe.mlx_lm.replayable(lambda x: x)),
        not_there_yet(),
    ]
    assert [f for f in found if not callables.has_state(f)] == []
    assert callables.draws(gumbel)
    assert not callables.draws(lambda x: mx.argmax(x, axis=-1))


class Wraps:
    """As vmlx has its samplers."""

    def __init__(self, sampler: Callable[..., Any]) -> None:
        self._sampler = sampler
        self.temp = 0.7

    def __call__(self, logits: mx.array) -> Any:
        return self._sampler(logits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


class Remembers(Wraps):
    def __init__(self) -> None:
        super().__init__(mx.argmax)
        self.seen: list[Any] = []

    def note(self, token: int) -> None:
        self.seen.append(token)


class Masks(Wraps):
    """Its server tells it which tokens came."""

    def __init__(self) -> None:
        super().__init__(mx.argmax)
        self.mask = mx.zeros((8,))

    def accept(self, token: int) -> None:
        self.mask[token] = 1


class Moves(Wraps):
    def accept(self, token: int) -> None:
        self.temp = 0.1


def filtered(filters: list[Any], temp: float = 0.7) -> Any:
    """As omlx and fusion-mlx have their samplers."""

    def sampler(logits: mx.array) -> mx.array:
        for one in filters:
            logits = one(logits)
        return mx.random.categorical(logits * (1 / temp))

    sampler.temp = temp  # type: ignore[attr-defined]
    return sampler


def grows() -> Any:
    kept: list[Any] = []

    def sampler(logits: mx.array) -> mx.array:
        kept.append(mx.argmax)
        return mx.argmax(logits) + len(kept)

    return sampler


def counts_in_its_attributes() -> Any:
    def sampler(logits: mx.array) -> mx.array:
        sampler.__dict__["n"] = sampler.n + 1  # type: ignore[attr-defined]
        return mx.argmax(logits) + sampler.n  # type: ignore[attr-defined,no-any-return]

    sampler.n = 0  # type: ignore[attr-defined]
    return sampler


def test_samplers_of_other_servers_depend_on_their_arguments() -> None:
    drawn = [lambda x: x * 2.0, functools.partial(mx.multiply, 2.0)]
    for sampler in (
        filtered([]),
        filtered(drawn),
        Wraps(mx.argmax),
        Wraps(filtered([])),
    ):
        assert not callables.has_state(sampler), sampler
        assert callables.draws(sampler)
    greedy = lambda x: mx.argmax(x, axis=-1)  # noqa: E731
    greedy.temp = 0.0  # type: ignore[attr-defined]
    assert not callables.has_state(greedy)
    assert not callables.draws(greedy)


def test_what_looks_like_them_and_has_a_state() -> None:
    found = [
        *(Remembers(), Masks(), Moves(mx.argmax), grows(), counts_in_its_attributes()),
        *(
            Wraps(Remembers()),
            Wraps(Wraps),
            filtered([grows()]),
            Wraps(iter([]).__next__),
        ),
    ]
    assert [f for f in found if not callables.has_state(f)] == []


@pytest.mark.parametrize("what", ["temp", "filters"])
def test_a_sampler_that_its_server_changes_is_noticed(
    model: Any, protected: None, what: str
) -> None:
    filters: list[Any] = [lambda x: x * 2.0]
    sampler = filtered(filters)
    generator = generate.BatchGenerator(model)
    uids = generator.insert([PROMPTS[0]], [12], samplers=[sampler])
    while not generator.next()[1]:
        pass
    if what == "temp":
        sampler.temp = 0.1
    else:
        filters[0] = lambda x: x * 3.0
    assert "has changed" in refused(generator, uids)


def test_a_flag_that_another_function_changes_is_noticed(
    model: Any, protected: None
) -> None:
    def made() -> tuple[Callable[..., mx.array], Callable[[], None]]:
        scale = 1.0

        def processor(tokens: mx.array, logits: mx.array) -> mx.array:
            return logits * scale

        def turn() -> None:
            nonlocal scale
            scale = -1.0

        return processor, turn

    generator = generate.BatchGenerator(model)
    processor, turn = made()
    uids = generator.insert([PROMPTS[0]], [12], logits_processors=[[processor]])
    while not generator.next()[1]:
        pass
    turn()
    assert "has changed" in refused(generator, uids)
