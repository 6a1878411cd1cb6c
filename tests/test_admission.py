"""What a server asks `memory.budget`, in numbers: a byte for each token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_safe.memory.budget import Situation
from mlx_safe.memory.demand import Demand, Row, step_sizes
from mlx_safe.memory.estimate import UNUSED, CacheCost, LayerCost, Transients
from mlx_safe.server import admission
from mlx_safe.server.admission import Ask, Load

DEMAND = Demand(CacheCost(((LayerCost(per_slot=1), 1),)), Transients())
CEILING = 10_000
STEP = 256
RUNS = Load(rows=(Row(100, 200, is_reading=False),), held=200)
# What one more token for each of some rows may take: a block.
BLOCK = 256


def steps(rows: int) -> list[int]:
    return step_sizes(STEP, rows)


def situation(active: int, evictable: int = 0, ceiling: int = CEILING) -> Situation:
    return Situation(ceiling=ceiling, later=CEILING, active=active, evictable=evictable)


sizes = st.integers(0, 6000)


@given(sizes, sizes, sizes, sizes)
def test_what_is_stored_leaves_room_for_the_next_step(
    runs: int, entries: int, size: int, given_up: int
) -> None:
    given_up = min(given_up, entries)
    now = situation(runs + entries, entries)
    found = admission.for_store(DEMAND, now, RUNS, STEP, size, given_up)
    (step,) = DEMAND.next_step(RUNS.rows, RUNS.held, lambda rows: [STEP])
    room = CEILING - runs - step.growth
    assert (found.verdict == "admit") == (size <= room)
    if found.verdict == "admit":
        # What it replaces is not evicted besides, and no more than is missing.
        left = entries - given_up - found.evict
        assert left >= 0 and runs + left + size + step.growth <= CEILING


@given(st.integers(1, 6000), st.integers(1, 6000), sizes, sizes, sizes)
def test_who_is_let_in_fits_with_the_others(
    prompt: int, answer: int, runs: int, entries: int, reusable: int
) -> None:
    reusable = min(reusable, entries)
    ask = Ask(prompt, prompt + answer, reusable, ahead=1)
    now = situation(runs + entries, entries)
    found = admission.for_request(DEMAND, now, RUNS, ask, steps, 0)
    rows = 2 * (max(200, ask.total) + UNUSED)  # padded to the longest
    least = rows - RUNS.held
    # What it reuses goes last, and is then its own.
    assert found.evict <= entries - reusable
    if found.verdict == "admit":
        given_back = found.evict + (reusable if found.take_over else 0)
        assert runs + entries - given_back + least <= CEILING
    else:
        assert runs + least > CEILING
    if found.take_over:
        assert runs + reusable + least > CEILING


def test_what_is_stored_finds_no_more_entries_than_there_are() -> None:
    (step,) = DEMAND.next_step(RUNS.rows, RUNS.held, lambda rows: [STEP])
    now = situation(2000, evictable=500)
    fits = CEILING - 1500 - step.growth
    for size, verdict in ((fits, "admit"), (fits + 1, "refuse")):
        found = admission.for_store(DEMAND, now, RUNS, STEP, size, given=500)
        assert found.verdict == verdict


def test_entries_make_way_for_a_request() -> None:
    ask = Ask(100, 200, reusable=1000, ahead=1)
    now = situation(9900, evictable=6000)
    found = admission.for_request(DEMAND, now, RUNS, ask, steps, 0)
    assert found.verdict == "admit" and 0 < found.evict <= 5000
    assert not found.take_over


def test_one_that_just_fits() -> None:
    ask = Ask(100, 200)
    growth = DEMAND.option([Row(100, 200)], 0, STEP).growth
    for free, step in ((growth, STEP), (growth - 1, 64)):
        now = situation(CEILING - free)
        found = admission.for_request(DEMAND, now, Load(), ask, steps, 0)
        assert (found.verdict, found.step) == ("admit", step)


@pytest.mark.parametrize(("step_max", "step"), [(None, STEP), (128, 128), (10, 64)])
def test_a_prompt_is_read_in_no_larger_steps_than_it_may(
    step_max: int | None, step: int
) -> None:
    ask = Ask(1000, 1100, step_max=step_max)
    found = admission.for_request(DEMAND, situation(0), Load(), ask, steps, 2000)
    assert (found.verdict, found.step) == ("admit", step)


@pytest.mark.parametrize(
    ("ask", "verdict"),
    [
        (Ask(1000, 2000, ahead=1), "wait"),
        (Ask(1000, 2000, ahead=1, may_wait=False), "refuse"),
        (Ask(1000, 2000), "refuse"),
        (Ask(1000, 20_000, ahead=1), "never"),
        (Ask(1000, 20_000, ahead=1, begun=True), "wait"),
    ],
    ids=str,
)
def test_what_does_not_fit_now(ask: Ask, verdict: str) -> None:
    now = situation(CEILING - 100)
    assert admission.for_request(DEMAND, now, RUNS, ask, steps, 0).verdict == verdict


def test_one_that_there_is_always_room_for_is_never_too_long() -> None:
    ask = Ask(1000, 20_000, ahead=1)
    for room, verdict in ((20_000, "wait"), (19_999, "never")):
        found = admission.for_request(
            DEMAND, situation(CEILING - 100), RUNS, ask, steps, room
        )
        assert found.verdict == verdict


def test_one_that_is_alone_is_tried_below_a_lowered_ceiling() -> None:
    ask = Ask(1000, 2000)
    now = situation(500, ceiling=100)
    alone = admission.for_request(DEMAND, now, Load(), ask, steps, 2000)
    assert (alone.verdict, alone.step) == ("admit", steps(1)[-1])
    assert not alone.take_over
    # With another it is not, however much there is room for.
    assert admission.for_request(DEMAND, now, RUNS, ask, steps, 0).verdict == "refuse"


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_of_one_alone_is_made_in_any_case(rows: int) -> None:
    load = Load(rows=rows * (Row(100, 200, is_reading=False),), held=rows * 200)
    now = situation(5000, ceiling=4000)
    found = admission.for_step(DEMAND, now, load, steps)
    assert (found.verdict == "admit") == (rows == 1)
    # Not beyond what the machine has.
    most = admission.for_step(DEMAND, situation(CEILING), load, steps)
    assert most.verdict != "admit"


@pytest.mark.parametrize("is_reading", [True, False])
def test_the_sequential_path_reads_in_smaller_steps_when_it_must(
    is_reading: bool,
) -> None:
    load = Load(rows=(Row(1000, 1100, is_reading),), length=100, held=100)
    chunk = STEP if is_reading else 1
    needs = min(chunk + BLOCK - 1, 1100 + UNUSED + chunk)
    fits = situation(CEILING - needs)
    found = admission.for_single_step(DEMAND, fits, load, STEP, steps)
    assert (found.verdict, found.step) == ("admit", STEP)
    short = situation(CEILING - needs + 1)
    found = admission.for_single_step(DEMAND, short, load, STEP, steps)
    if is_reading:
        assert (found.verdict, found.step) == ("admit", STEP // 2)
    else:
        assert found.verdict != "admit"
    # What it holds is below the machine's own ceiling, so it goes on.
    lowered = situation(CEILING - needs, ceiling=100)
    found = admission.for_single_step(DEMAND, lowered, load, STEP, steps)
    assert (found.verdict, found.step) == ("admit", 64 if is_reading else STEP)
