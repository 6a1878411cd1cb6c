"""The memory room: sizes, ceilings, estimates against real caches, decisions."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as caches

from mlx_safe.memory.budget import Decision, Option, Situation, decide
from mlx_safe.memory.ceiling import LearnedCeiling, ceiling
from mlx_safe.memory.demand import Demand, Row, step_sizes
from mlx_safe.memory.estimate import (
    MARGIN,
    CacheCost,
    LayerCost,
    Transients,
    calibrate,
    measure,
)
from mlx_safe.memory.machine import Machine, read_machine, usage
from mlx_safe.memory.sizes import flag_size, format_size, parse_size
from mlx_safe.memory.sizing import sizing

GB = 10**9

# -- sizes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20G", 20 * GB),
        ("20GB", 20 * GB),
        ("1.5 gb", 1_500_000_000),
        ("512M", 512_000_000),
        ("36GiB", 36 * 2**30),
        ("1000000", 1_000_000),
        ("2T", 2 * 10**12),
        ("7b", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_sizes_are_those_of_mlx_lm() -> None:
    from mlx_lm.utils import _parse_size

    for text in ("20G", "1.5GB", "512M", "300 MB", "123"):
        assert parse_size(text) == _parse_size(text)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "20X", "G", "1e9", "20 G B", "nan", "∞", "٣", "9999999T"]
)
def test_bad_sizes_are_one_clear_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a size over zero such as 20G"):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_a_size_shown_is_the_size_meant(size: int) -> None:
    shown = parse_size(format_size(size))
    assert abs(shown - size) <= 0.05001 * 1000 ** (len(str(size)) // 3)


@given(st.integers(1, 10**13))
def test_a_flag_is_told_not_more_than_the_size_and_not_much_less(size: int) -> None:
    told = parse_size(flag_size(size))
    assert told <= size <= told + 0.1 * 10 ** (9 if size >= 10**9 else 6)


# -- machine and ceiling ---------------------------------------------------------


def mac(**values: int) -> Machine:
    """A Mac as it would answer."""
    answers = {"hw.memsize": 48 * 2**30, "iogpu.wired_limit_mb": 0, **values}
    info = {"device_name": "Apple M4 Pro", "max_recommended_working_set_size": 40 * GB}
    return read_machine(answers.get, lambda: info)


def test_ceiling_of_a_mac() -> None:
    found = ceiling(mac())
    assert found.size == 36 * GB
    assert found.reason.name == "device"
    assert "recommendedMaxWorkingSetSize" in found.reason.source


def test_the_smallest_limit_decides_and_each_says_its_source() -> None:
    machine = mac(**{"iogpu.wired_limit_mb": 30_000})
    assert ceiling(machine).reason.name == "wired"
    found = ceiling(machine, explicit=20 * GB, learned=19 * GB)
    assert [limit.name for limit in found.limits][:2] == ["learned", "flag"]
    assert found.size == 19 * GB
    assert all(limit.source for limit in found.limits)


def test_a_wired_limit_of_zero_is_none() -> None:
    assert mac().wired_limit is None


def test_what_the_process_holds_besides_counts_against_the_ram() -> None:
    crowded = ceiling(mac(**{"hw.memsize": 40 * GB}), overhead=10 * GB)
    assert crowded.reason.name == "ram"
    assert crowded.size == 26 * GB


def test_without_a_gpu_a_share_of_the_ram() -> None:
    found = ceiling(Machine("linux", "x86_64", False, 16 * GB))
    assert (found.size, found.reason.name) == (12 * GB, "ram")


def test_this_machine_can_be_read() -> None:
    here = read_machine()
    assert here.total > 2**28
    held = mx.ones((1 << 20,))
    mx.eval(held)
    now = usage()
    assert now.active >= held.nbytes
    assert now.footprint is not None and now.footprint > 10 * 2**20
    assert now.available is not None and 0 < now.available <= here.total
    assert now.overhead > 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    static=st.integers(10 * GB, 100 * GB),
    faults=st.lists(
        st.tuples(
            st.integers(2, 100 * GB), st.integers(0, 40 * GB), st.floats(0, 5000)
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_a_fault_lowers_the_ceiling_and_it_comes_back(
    static: int, faults: list[tuple[int, int, float]]
) -> None:
    clock = Clock()
    learned = LearnedCeiling(clock)
    for active, baseline, pause in faults:
        before = learned.value(static)
        found = learned.fault(active, baseline, static)
        floor = baseline + (static - baseline) // 4
        assert found < active or found <= max(floor, baseline)
        assert before is None or found <= before
        assert found <= static
        values = []
        for part in range(5):
            clock.now += pause * part / 10
            values.append(learned.value(static))
        known = [v for v in values if v is not None]
        assert known == sorted(known) and all(v <= static for v in known)
        assert None not in values or set(values[values.index(None) :]) == {None}
    clock.now += 10_000
    assert learned.value(static) is None


def test_the_learned_ceiling_stays_before_it_rises() -> None:
    clock = Clock()
    learned = LearnedCeiling(clock)
    assert learned.fault(30 * GB, 10 * GB, 36 * GB) == 26 * GB
    clock.now = 299
    assert learned.value(36 * GB) == 26 * GB
    clock.now = 300 + 1800
    assert learned.value(36 * GB) == 31 * GB
    assert learned.remaining == 1800
    clock.now = 300 + 3600
    assert learned.value(36 * GB) is None
    assert learned.remaining == 0


# -- estimates against real caches -------------------------------------------------

HEADS, DIM, LAYERS = 2, 64, 2


def feed(cache: Any, length: int, rows: int = 1) -> None:
    """One layer's step, as an attention layer or a state-space layer does it."""
    inner = getattr(cache, "caches", None)
    if inner is not None:
        for one in inner:
            feed(one, length, rows)
    elif hasattr(cache, "update_and_fetch"):
        if hasattr(cache, "maybe_trim_front"):
            cache.maybe_trim_front()
        kv = mx.zeros((rows, HEADS, length, DIM), dtype=mx.float16)
        cache.update_and_fetch(kv, kv)
    else:
        cache[0] = mx.zeros((rows, 3, 48), dtype=mx.float16)
        cache[1] = mx.zeros((rows, 4, 16, 16), dtype=mx.float32)


KINDS = {
    "full": lambda: [caches.KVCache() for _ in range(LAYERS)],
    "rotating": lambda: [caches.RotatingKVCache(max_size=300, keep=4)],
    "chunked": lambda: [caches.ChunkedKVCache(512), caches.KVCache()],
    "quantized": lambda: [caches.QuantizedKVCache(bits=4)],
    "state": lambda: [caches.ArraysCache(2)],
    "mixed": lambda: [
        caches.CacheList(caches.ArraysCache(2), caches.KVCache()),
        caches.RotatingKVCache(max_size=64),
        caches.KVCache(),
    ],
}


def nbytes(made: list[Any]) -> int:
    return sum(cache.nbytes for cache in made)


def cost_of(kind: str, **quantization: Any) -> CacheCost:
    made = KINDS[kind]()
    for cache in made:
        feed(cache, 64)
    return measure(made, **quantization)


STEPS = st.lists(st.integers(1, 700), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(steps=STEPS, decode=st.integers(0, 40))
def test_an_estimate_is_enough_and_not_much_more(
    kind: str, steps: list[int], decode: int
) -> None:
    cost, made, tokens = cost_of(kind), KINDS[kind](), 0
    places = sum(n * layer.per_slot for layer, n in cost.layers)
    # Each growth from a multiple of 256 may keep a block; one is accounted for.
    kept = -1
    for step in [*steps, *[1] * decode]:
        kept += tokens > 0 and tokens % 256 == 0
        before = nbytes(made) if tokens else 0
        for cache in made:
            feed(cache, step)
        assert nbytes(made) <= before + cost.growth(step)
        tokens += step
        estimate = cost.nbytes(tokens, step=max(steps))
        assert nbytes(made) <= estimate + max(0, kept) * 255 * places
    # Two blocks for each layer, and the largest step behind a window.
    windows = any(layer.window for layer, _ in cost.layers)
    slack = (510 + windows * max(steps)) * places
    assert estimate <= nbytes(made) + slack


@settings(max_examples=25)
@given(
    prompts=st.lists(st.integers(2, 400), min_size=1, max_size=4),
    decode=st.integers(0, 30),
)
@pytest.mark.parametrize("kind", ["full", "rotating", "mixed"])
def test_a_batch_is_padded_to_its_longest_row(
    kind: str, prompts: list[int], decode: int
) -> None:
    cost, rows = cost_of(kind), []
    for length in prompts:
        made = KINDS[kind]()
        for cache in made:
            feed(cache, length)
        rows.append(made)
    kinds = range(len(rows[0]))
    batch = [rows[0][i].merge([row[i] for row in rows]) for i in kinds]
    for step in range(decode + 1):
        longest = max(prompts) + step
        assert nbytes(batch) <= cost.nbytes(longest, rows=len(rows), step=400)
        for cache in batch:
            feed(cache, 1, len(rows))


@settings(max_examples=30)
@given(steps=STEPS, start=st.integers(1, 900), bits=st.sampled_from([4, 8]))
def test_a_cache_that_is_quantized_on_the_way(
    steps: list[int], start: int, bits: int
) -> None:
    cost = cost_of("full", kv_bits=bits, kv_group_size=64, quantized_kv_start=start)
    made, tokens = KINDS["full"](), 0
    for step in steps:
        for cache in made:
            feed(cache, step)
        tokens += step
        both = 0
        for i, cache in enumerate(made):
            if hasattr(cache, "to_quantized") and cache.offset >= start:
                both += cache.nbytes
                made[i] = cache.to_quantized(group_size=64, bits=bits)
        assert nbytes(made) + both <= cost.nbytes(tokens, step=max(steps))


class GrowingState:
    """As `LayerCache` of mlx-lm 0.32's deepseek_v41: a window, and groups of tokens."""

    def __init__(self, group: int) -> None:
        self.group, self.tokens = group, 0

    @property
    def state(self) -> list[mx.array]:
        return []

    @property
    def nbytes(self) -> int:
        pending = self.tokens % self.group
        return 64 * (min(self.tokens, 128) + self.tokens // self.group + 4 * pending)


@pytest.mark.parametrize("group", [1, 4, 64, 128])
def test_a_state_that_grows_is_counted(group: int) -> None:
    def read(tokens: mx.array, cache: list[Any]) -> None:
        for one in cache:
            one.tokens += tokens.shape[1]

    def make() -> list[Any]:
        return [GrowingState(group), GrowingState(group)]

    cost, made = calibrate(read, make, Transients()), make()
    for _ in range(100):
        read(mx.zeros((1, 100)), made)
        assert cost.at_least(made[0].tokens) <= nbytes(made)
        assert nbytes(made) <= cost.nbytes(made[0].tokens)
    # A state that is of a fixed size after the first tokens has no cost for each.
    state = [caches.ArraysCache(2)]

    def fill(tokens: mx.array, cache: list[Any]) -> None:
        feed(cache[0], tokens.shape[1])

    feed(state[0], 1)
    found = calibrate(fill, lambda: [caches.ArraysCache(2)], Transients())
    assert found == CacheCost(((LayerCost(constant=state[0].nbytes), 1),))


@given(
    room=st.integers(0, 10**9),
    full=st.sampled_from((64, 512, 2048)),
    rows=st.integers(1, 3),
    scores=st.integers(0, 20),
    kv_limit=st.none() | st.integers(0, 10**9),
)
def test_as_many_tokens_as_are_told_are_admitted_and_no_more(
    room: int, full: int, rows: int, scores: int, kv_limit: int | None
) -> None:
    """What is told of the room is what the decision would be, one after another."""
    cost = CacheCost(((LayerCost(per_slot=512), 4), (LayerCost(constant=99), 2)))
    transients = Transients()
    for context in (64, 1024):
        transients.observe(64, context, 64 * (5000 + scores * context))
    demand = Demand(cost, transients)
    steps = partial(step_sizes, full)
    found = demand.longest(room, steps, kv_limit, rows)
    now = Situation(ceiling=room, later=room, active=0, kv_limit=kv_limit)
    for tokens, fits in ((found, True), (found + 1, False)):
        asked = [Row(tokens, tokens)] * rows
        verdict = decide(now, demand.to_the_end(asked, 0, steps)).verdict
        assert (verdict == "admit") == fits or tokens == 0


@given(
    each=st.integers(1, 10**6),
    scores=st.integers(0, 100),
    seen=st.lists(
        st.tuples(st.integers(32, 4096), st.integers(0, 50_000)),
        min_size=2,
        max_size=20,
    ),
)
def test_a_transient_seen_is_foreseen(
    each: int, scores: int, seen: list[tuple[int, int]]
) -> None:
    """A cost for each token, and a part that grows with the context."""
    transients = Transients()
    steps = [(tokens, tokens + before) for tokens, before in seen]
    true = [tokens * (each + scores * context) for tokens, context in steps]
    for (tokens, context), nbytes in zip(steps, true, strict=True):
        transients.observe(tokens, context, nbytes)
    for (tokens, context), nbytes in zip(steps, true, strict=True):
        assert nbytes <= transients.predict(tokens, context) <= 1.2 * nbytes


def test_a_transient_beyond_what_was_seen_is_extrapolated() -> None:
    transients = Transients()
    for context in (64, 320):
        transients.observe(64, context, 64 * (1000 + 8 * context))
    assert transients.predict(512, 20_000) >= 512 * (1000 + 8 * 20_000)
    assert transients.predict(512, 20_000) <= 1.2 * 512 * (1000 + 8 * 20_000)


def test_a_slow_model_is_judged_by_few_tokens() -> None:
    transients = Transients()
    transients.observe(2, 4, 100_000)
    assert 2048 * 50_000 <= transients.predict(2048, 2048) <= 1.2 * 2048 * 50_000
    transients.observe(64, 68, 640_000)
    assert transients.predict(2048, 2048) < 1.2 * 2048 * 10_000


def test_an_outlier_is_forgotten() -> None:
    transients = Transients()
    transients.observe(100, 100, 10**9)
    for _ in range(5):
        transients.observe(100, 100, 10**6)
    assert transients.predict(100, 100) > 10**9
    for _ in range(5):
        transients.observe(100, 100, 10**6)
    assert transients.predict(100, 100) < 2 * 10**6


# -- the decision ------------------------------------------------------------------

SIZES = st.integers(0, 1000)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Situation, list[Option]]:
    later = draw(st.integers(1, 3000))
    now = Situation(
        ceiling=draw(st.integers(1, later)),
        later=later,
        active=draw(st.integers(0, 3000)),
        pool=draw(SIZES),
        evictable=draw(SIZES),
        reusable=draw(SIZES),
        baseline=draw(SIZES),
        running=draw(st.integers(0, 3)),
        promised=draw(st.booleans()),
        alone=draw(st.booleans()),
        may_wait=draw(st.booleans()),
        kv_limit=draw(st.none() | SIZES),
    )
    growths = sorted(draw(st.lists(SIZES, min_size=1, max_size=4)), reverse=True)
    alone = draw(st.integers(0, growths[-1]))
    least = draw(st.integers(0, alone))
    kv = draw(SIZES)
    kv_alone = draw(st.integers(0, kv))
    return now, [
        Option(2 ** (10 - i), growth, alone, least, kv, kv_alone)
        for i, growth in enumerate(growths)
    ]


def growth_of(options: list[Option], found: Decision) -> int:
    return next(o.growth for o in options if o.step == found.step)


def is_below_the_ceiling(now: Situation, options: list[Option]) -> bool:
    all_given = now.active - now.evictable - now.reusable
    return any(
        all_given + o.growth <= now.ceiling
        and (now.kv_limit is None or o.kv <= now.kv_limit)
        for o in options
    )


def is_too_long(now: Situation, options: list[Option]) -> bool:
    last = options[-1]
    too_big = now.baseline + last.alone > now.later or (
        now.kv_limit is not None and last.kv_alone > now.kv_limit
    )
    return too_big and not now.promised


def is_tried(now: Situation, options: list[Option]) -> bool:
    """It is alone, and only estimates or faults are against it."""
    if is_below_the_ceiling(now, options) or is_too_long(now, options):
        return False
    all_given = now.active - now.evictable - now.reusable
    return now.alone and all_given + options[-1].least <= now.later


@settings(max_examples=150)
@given(cases())
def test_what_is_admitted_stays_below_the_ceiling(
    case: tuple[Situation, list[Option]],
) -> None:
    now, options = case
    found = decide(now, options)
    if found.verdict != "admit":
        return
    active = now.active - found.evict - (now.reusable if found.take_over else 0)
    pool = 0 if found.free_pool else now.pool
    assert found.missing == 0
    if is_tried(now, options):
        assert active + options[-1].least + pool <= now.later
        return
    assert active + growth_of(options, found) + pool <= now.ceiling
    assert now.kv_limit is None or options[0].kv <= now.kv_limit


@settings(max_examples=150)
@given(cases())
def test_nothing_is_refused_that_the_pool_or_the_prompt_cache_could_give(
    case: tuple[Situation, list[Option]],
) -> None:
    now, options = case
    found = decide(now, options)
    fits = is_below_the_ceiling(now, options) or is_tried(now, options)
    assert (found.verdict == "admit") == fits


@settings(max_examples=150)
@given(cases())
def test_the_order_is_kept(case: tuple[Situation, list[Option]]) -> None:
    now, options = case
    found = decide(now, options)
    assert 0 <= found.evict <= now.evictable
    if found.verdict != "admit":
        assert found.evict == 0 and not found.take_over
        return
    if is_tried(now, options):
        assert (found.evict, found.free_pool) == (now.evictable, now.pool > 0)
        assert found.step == options[-1].step
        return
    missing = now.active + growth_of(options, found) - now.ceiling
    # No more is evicted than is missing, and nothing before the pool is freed.
    assert found.evict == min(max(0, missing), now.evictable)
    assert found.free_pool or found.evict == 0
    # The entry to be reused goes only when all others are gone.
    assert not found.take_over or found.evict == now.evictable
    # A smaller step only where a larger one does not fit with all given.
    for larger in itertools.takewhile(lambda o: o.step != found.step, options):
        missing = now.active + larger.growth - now.ceiling
        assert missing > now.evictable + now.reusable


@settings(max_examples=150)
@given(cases())
def test_waiting_refusing_and_never(case: tuple[Situation, list[Option]]) -> None:
    now, options = case
    found = decide(now, options)
    too_big = is_too_long(now, options)
    if found.verdict == "never":
        assert too_big
    elif found.verdict == "wait":
        assert now.may_wait and now.running > 0 and not too_big
    elif found.verdict == "refuse":
        assert not (now.may_wait and now.running > 0) and not too_big
    if found.verdict != "admit":
        assert found.missing > 0


def demand_of(per_token: int, transient: int) -> Demand:
    """Caches of so many bytes for each token, and the step of 2048 tokens."""
    transients = Transients()
    transients.observe(2048, 2048, int(transient / MARGIN))
    return Demand(CacheCost(((LayerCost(per_slot=per_token // 36), 36),)), transients)


def test_the_sizing_of_the_examples_in_words() -> None:
    demand = demand_of(94_700, 1 * GB)
    found = sizing(
        model=16 * GB, ceiling=36 * GB, demand=demand, steps=partial(step_sizes, 2048)
    )
    assert found.prompt_cache // 10**7 == 950
    assert "model 16.0 GB, ceiling 36.0 GB, prompt cache at most 9.5 GB" in str(found)
    assert "room for 210k tokens" in str(found)
    # Each of two is copied once, beside what both of them have.
    assert 3 * found.two_tokens <= found.room_tokens
    assert found.prompt_tokens() == (found.two_tokens - 512) // 1000 * 1000


def test_a_model_that_does_not_fit_has_no_room() -> None:
    found = sizing(
        model=16 * GB,
        ceiling=12 * GB,
        demand=demand_of(90_000, 1 * GB),
        steps=partial(step_sizes, 64),
    )
    assert (found.room, found.prompt_cache) == (0, 0)
    assert (found.room_tokens, found.two_tokens, found.prompt_tokens()) == (0, 0, None)


# -- a CUDA card, whose memory other programs use as well --------------------------


def card_info(free: int) -> dict[str, Any]:
    """What MLX 0.32.4's CUDA backend says of an H200, in part."""
    return {
        "device_name": "NVIDIA H200",
        "architecture": "sm_90",
        "total_memory": 140 * GB,
        "free_memory": free,
    }


def test_on_a_card_the_ceiling_is_the_cards_and_not_the_hosts() -> None:
    machine = read_machine(device_info=lambda: card_info(6 * GB))
    assert (machine.gpu, machine.card) == (True, 140 * GB)
    assert [x.name for x in ceiling(machine).limits] == ["card"]
    assert ceiling(machine).size == 126 * GB
    # Another program holds the rest; 4 GB are this process's own.
    now = ceiling(machine, card_share=10 * GB)
    assert (now.reason.name, now.size) == ("free", 9 * GB)


def test_the_driver_of_a_card_is_asked_for_a_small_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_safe.memory.machine import Usage
    from mlx_safe.server import limits

    clock = 0.0
    spent = 0.0

    def asked() -> Usage:
        nonlocal clock, spent
        clock += 0.02  # NVML is slow here
        spent += 0.02
        return Usage(0, 0, 0, None, None, card_free=5 * GB)

    machine = read_machine(device_info=lambda: card_info(0))
    monkeypatch.setattr(limits, "read_machine", lambda: machine)
    monkeypatch.setattr(limits, "usage", asked)
    own = SimpleNamespace(monotonic=lambda: clock)
    monkeypatch.setattr("mlx_safe.server.limits.time", own)
    found = limits.Limits(None)
    for _ in range(20_000):  # steps of a millisecond each
        found.now()
        clock += 0.001
    assert 0.0 < spent < 0.01 * clock
    # A fault is a reason to ask at once.
    before = spent
    found.out_of_memory(GB, 0)
    assert spent > before


def test_the_server_sees_what_other_programs_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_safe.memory.machine import Usage
    from mlx_safe.server import limits

    now = Usage(0, 0, 0, None, None)
    machine = read_machine(device_info=lambda: card_info(0))
    monkeypatch.setattr(limits, "read_machine", lambda: machine)
    monkeypatch.setattr(limits, "usage", lambda: now)
    monkeypatch.setattr(limits, "CARD_MAX_AGE_S", 0.0)
    monkeypatch.setattr(limits, "CARD_SHARE_MAX", float("inf"))
    now = Usage(4 * GB, 0, GB, None, None, card_free=5 * GB)
    found = limits.Limits(None)
    assert found.now().size == found.present().size == 9 * GB
    assert found.static().size == 126 * GB
    # It failed: what is learned is of what was there, neither of the whole card nor of
    # what the step had got until then.
    found.out_of_memory(held=3 * GB, baseline=GB)
    assert found.now().size == int(1 * GB + 0.8 * 8 * GB)
    # Again, below that: the estimates are shorter still.
    found.out_of_memory(held=3 * GB, baseline=GB)
    assert found.now().size == pytest.approx(1 * GB + 0.8 * 0.8 * 8 * GB, abs=2)
    # The other program has ended, and what was learned is not forgotten yet.
    now = Usage(GB, 0, 0, None, None, card_free=139 * GB)
    assert found.present().size == 126 * GB
    assert found.now().size < 7 * GB


def test_what_other_programs_take_is_no_lesson(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_safe.memory.machine import Usage
    from mlx_safe.server import limits

    now = Usage(4 * GB, 0, 0, None, None, card_free=96 * GB)
    machine = read_machine(device_info=lambda: card_info(0))
    monkeypatch.setattr(limits, "read_machine", lambda: machine)
    monkeypatch.setattr(limits, "usage", lambda: now)
    found = limits.Limits(None)
    assert found.now().size == 90 * GB
    for _ in range(5):  # one that comes and goes, between two looks at the driver
        now = Usage(4 * GB, 0, 0, None, None, card_free=2 * GB)
        found.out_of_memory(held=4 * GB, baseline=GB)
        assert found.lowered is None
        assert found.now().size == int(0.9 * 6 * GB)
        now = Usage(4 * GB, 0, 0, None, None, card_free=96 * GB)
        found._card_until = 0.0
        assert found.now().size == 90 * GB


def test_without_a_card_the_most_that_a_step_held_was_too_much() -> None:
    clock = Clock()
    learned = LearnedCeiling(clock)
    # A step held more than the ceiling: the estimate was short.
    assert learned.fault(60 * GB, 10 * GB, 36 * GB) == 10 * GB + int(0.8 * 26 * GB)
    assert learned.fault(60 * GB, 10 * GB, 36 * GB) < 27 * GB
