"""The prompt cache: its limits, what it holds, and what outlives a fault."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
)

from mlx_safe import epoch, testing
from mlx_safe.server.mlx_lm import prompt_cache
from mlx_safe.server.mlx_lm.prompt_cache import PromptCache
from support import child
from support.programs import program
from support.server import CONTROLLED, Answer, Server, eventually

MODEL = ("model", None, None)
HEADS, WIDTH = 2, 4
TOKEN_BYTES = 2 * HEADS * WIDTH * 4  # keys and values, float32
BATCHED: dict[str, Any] = {}
SEQUENTIAL = {"seed": 1}


def kv(cache: Any, tokens: int) -> Any:
    """``cache`` after it has seen so many tokens."""
    shape = (1, HEADS, tokens, WIDTH)
    cache.update_and_fetch(mx.ones(shape), mx.ones(shape))
    return cache


def store(cache: PromptCache, tokens: list[int], **more: Any) -> None:
    cache.insert_cache(MODEL, tokens, [kv(KVCache(), len(tokens))], **more)


def hits(cache: PromptCache, tokens: list[int]) -> int:
    """Tokens that a request with this prompt does not read."""
    return len(tokens) - len(cache.fetch_nearest_cache(MODEL, tokens)[1])


# -- what it holds ----------------------------------------------------------------

HOLDS = program("what_a_cache_holds")


def test_entries_hold_what_they_count() -> None:
    """mlx-lm's hold the buffer of the batch that they were cut from."""
    ran = child.run(HOLDS)
    assert ran.returncode == 0, ran.stderr
    stock, ours = ([int(x) for x in row.split()] for row in ran.stdout.splitlines())
    assert stock[0] == ours[0] == 2 * 2 * 4 * 1000 * 32 * 4
    assert stock[1] > 3.5 * stock[0]
    assert ours[0] <= ours[1] < 1.05 * ours[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: kv(KVCache(), 300),
        lambda: kv(RotatingKVCache(max_size=64), 300),
        lambda: kv(KVCache(), 256).to_quantized(group_size=32, bits=8),
        lambda: CacheList(kv(KVCache(), 300), kv(RotatingKVCache(max_size=64), 300)),
        lambda: ArraysCache(2),
    ],
    ids=["full", "rotating", "quantized", "list", "state"],
)
def test_an_entry_is_what_was_stored(make: Any) -> None:
    """Of every kind of cache that mlx-lm has: the same answer as from mlx-lm's."""
    global WIDTH
    WIDTH, before = 32, WIDTH
    try:
        step = mx.random.normal((1, HEADS, 1, WIDTH))
        found = []
        for kind in (LRUPromptCache, PromptCache):
            cache = make()
            if isinstance(cache, ArraysCache):
                cache[0], cache[1] = mx.ones((1, 3, 5)), mx.zeros((1, 7))
            kept: Any = kind(10)
            size = getattr(cache, "offset", 300)
            kept.insert_cache(MODEL, list(range(size)), [cache])
            again, rest = kept.fetch_nearest_cache(MODEL, list(range(size + 1)))
            assert rest == [size]
            found.append(_next(again[0], step))
    finally:
        WIDTH = before
    assert found[0] == found[1]


def _next(cache: Any, step: mx.array) -> Any:
    if isinstance(cache, CacheList):
        return [_next(c, step) for c in cache.caches]
    if isinstance(cache, ArraysCache):
        return [x.tolist() for x in cache.cache]
    from mlx.utils import tree_map

    return tree_map(lambda x: x.tolist(), cache.update_and_fetch(step, step))


# -- its limits -------------------------------------------------------------------

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(PROMPTS, st.sampled_from(["assistant", "user", "system"]))),
    st.integers(0, 4),
    st.integers(0, 40),
)
def test_the_limits_hold_at_every_moment(
    stored: list[tuple[list[int], str]], entries: int, tokens: int
) -> None:
    limit = tokens * TOKEN_BYTES
    seen = []

    class Watched(PromptCache):
        # Read by the base class too, in the midst of what it does.
        @property
        def _n_bytes(self) -> int:
            return self._held

        @_n_bytes.setter
        def _n_bytes(self, value: int) -> None:
            self._held = value
            seen.append(value)

    cache = Watched(entries, limit)
    for prompt, kind in stored:
        store(cache, prompt, cache_type=kind)
        assert len(cache) <= entries
        assert cache.nbytes == sum(
            len(e.tokens) * TOKEN_BYTES for e in cache._lru.entries
        )
        fits = entries > 0 and len(prompt) <= tokens
        assert fits == any(e.tokens == prompt for e in cache._lru.entries)
        found = hits(cache, [*prompt, 9])
        assert not fits or found == len(prompt)
        assert found == cache.reusable_tokens(MODEL, [*prompt, 9])
    assert max(seen) <= limit
    of_mlx_lm: Any = cache
    by_type = of_mlx_lm.stats_by_type().values()
    assert sum(t["n_bytes"] for t in by_type) == cache.nbytes
    while cache.evict_oldest():
        pass
    assert (len(cache), cache.nbytes) == (0, 0)


@settings(max_examples=60)
@given(st.lists(PROMPTS, min_size=1), PROMPTS)
def test_the_entry_that_is_told_is_the_one_that_is_found(
    stored: list[list[int]], prompt: list[int]
) -> None:
    cache = PromptCache(100)
    for tokens in stored:
        store(cache, tokens)
    told = cache.reusable_tokens(MODEL, prompt)
    # mlx-lm does not look for prefixes of one token.
    assert hits(cache, prompt) in ({told} if told != 1 else {0, 1})


def test_a_protected_entry_is_not_evicted() -> None:
    cache = PromptCache(10)
    for i in range(4):
        store(cache, [i] * 5)
    with cache.protecting(MODEL, [0] * 5 + [7]):
        cache.trim_to(n_bytes=0)
        assert len(cache) == 1
        assert cache.evict_oldest() == 0
        cache.limit_bytes(1)
        assert hits(cache, [0] * 5 + [7]) == 5
    cache.limit_bytes(1)
    assert len(cache) == 0


def test_the_oldest_goes_first_and_use_makes_young() -> None:
    cache = PromptCache(3)
    for i in range(3):
        store(cache, [i] * 5)
    assert hits(cache, [0] * 6) == 5
    store(cache, [3] * 5)
    assert [hits(cache, [i] * 6) for i in range(4)] == [5, 0, 5, 5]
    assert cache.events["evictions"] == 1
    assert (cache.events["hits"], cache.events["misses"]) == (4, 1)


@pytest.mark.parametrize("trimmable", [True, False])
def test_one_token_is_always_left_to_read(trimmable: bool) -> None:
    """mlx-lm's loop ends when a prompt is in the cache as a whole."""
    cache = PromptCache(10)
    prompt = list(range(40))
    for size in (20, 40):
        kind = KVCache() if trimmable else RotatingKVCache(max_size=8)
        cache.insert_cache(MODEL, prompt[:size], [kv(kind, size)])
    found: Any
    found, rest = cache.fetch_nearest_cache(MODEL, prompt)
    assert rest == (prompt[39:] if trimmable else prompt[20:])
    assert found[0].offset == 40 - len(rest)


# -- what a fault leaves ------------------------------------------------------------


def test_only_what_was_complete_before_the_fault_stays() -> None:
    cache = PromptCache(10)
    store(cache, [1] * 5)
    clean = epoch()
    testing.record_fault(2)
    store(cache, [2] * 5)
    cache.keep_clean(clean)
    assert [hits(cache, [i] * 6) for i in (1, 2)] == [5, 0]
    assert cache.events["dropped"] == 1


def test_an_entry_that_fails_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PromptCache(10)
    evaluate = prompt_cache._make_own

    def fault_meanwhile(one: Any) -> None:
        evaluate(one)
        testing.record_fault(5)

    monkeypatch.setattr(prompt_cache, "_make_own", fault_meanwhile)
    store(cache, [1] * 5)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_an_entry_that_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stores it is told; of it nothing is stored, and the others stay."""
    cache = PromptCache(10)
    store(cache, [1] * 5)

    def fail(*_: Any) -> None:
        raise RuntimeError("not computed")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", fail)
        with pytest.raises(RuntimeError, match="not computed"):
            store(cache, [2] * 5)
    assert [hits(cache, [i] * 6) for i in (1, 2)] == [5, 0]
    assert len(cache) == 1


def test_borrowed_arrays_are_not_written_to() -> None:
    """What a request does with an entry does not change the entry."""
    cache = PromptCache(10)
    store(cache, [1] * 5)

    def borrow() -> Any:
        (found,) = cache.fetch_nearest_cache(MODEL, [1] * 6)[0] or []
        return found

    before = mx.array(borrow().keys).tolist()
    borrowed = borrow()
    borrowed.keys[..., 2:4, :] = 7  # in place, as `update_and_fetch` writes
    borrowed.trim(3)
    kv(borrowed, 1)
    mx.eval(borrowed.keys, borrowed.values)
    assert borrow().keys.tolist() == before


# -- the real server ------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, program=CONTROLLED) as server:
        yield server.wait_ready()


def cached(answer: Answer) -> int:
    return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])


def metric(server: Server, name: str) -> float:
    return server.metric(f"mlx_safe_{name}_total")


def wipe(server: Server) -> None:
    """Nothing is reused by what follows."""
    server.ask("forget")


@pytest.mark.parametrize("more", [BATCHED, SEQUENTIAL], ids=["batched", "sequential"])
@pytest.mark.parametrize("step", ["prefill:1", "decode:1", "decode:4"])
def test_an_entry_outlives_a_fault_of_its_borrower(
    server: Server, more: dict[str, Any], step: str
) -> None:
    messages = [{"role": "user", "content": "a long question " * 8}]
    first = {"messages": messages, "max_tokens": 6, **more}
    answer = {"role": "assistant", "content": server.post(first).text}
    asks = [
        {**first, "messages": [*messages, answer, {"role": "user", "content": text}]}
        for text in ("and now?", "and then?")
    ]
    wipe(server)
    undisturbed = [server.post(ask).text for ask in asks]
    wipe(server)
    server.post(first)
    before = {
        name: metric(server, name)
        for name in ("replays", "prompt_cache_dropped", "prompt_cache_reused_tokens")
    }
    server.plan(f"{step}:2")
    assert server.post(asks[0]).text == undisturbed[0]
    more_now = {name: metric(server, name) - n for name, n in before.items()}
    assert (more_now["replays"], more_now["prompt_cache_dropped"]) == (1, 0)
    # Both the request and its replay began from the entry.
    assert more_now["prompt_cache_reused_tokens"] > 200
    again = server.post(asks[1])
    assert (again.text, cached(again) > 100) == (undisturbed[1], True)


# Out of memory: when less was tried, and was not enough.
@pytest.mark.parametrize("plan", ["decode:2:8,decode:3:8", "decode:2:0xb"])
def test_what_a_fault_may_have_spoilt_goes(server: Server, plan: str) -> None:
    text = f"what of {plan}?"
    calm = server.chat(text)
    dropped = metric(server, "prompt_cache_dropped")
    server.plan(plan)
    server.chat("another")
    assert metric(server, "prompt_cache_dropped") > dropped
    again = server.chat(text)
    assert again.text == calm.text
    assert cached(again) <= 1  # the template's first token


@pytest.mark.parametrize("fault", ["8", "8:once:record"])
def test_what_memory_can_hold_stays(server: Server, fault: str) -> None:
    """The demand was the failed request's own."""
    text = f"what does {fault} leave?"
    calm = server.chat(text)
    before = cached(server.chat(text))
    assert before > 1
    server.plan(f"decode:2:{fault}")
    assert server.chat("another").status == 200
    again = server.chat(text)
    assert (again.text, cached(again)) == (calm.text, before)


def test_what_a_bug_has_not_touched_stays(server: Server) -> None:
    text = "what of an exception that is no fault?"
    calm = server.chat(text)
    before = cached(server.chat(text))
    assert before > 1
    server.plan("decode:2:0:once:bug")
    assert server.chat("another").status == 500
    again = server.chat(text)
    assert (again.text, cached(again)) == (calm.text, before)


def test_a_prompt_that_is_in_the_cache_as_a_whole(server: Server) -> None:
    failures = metric(server, "generation_failures")
    for more in (BATCHED, SEQUENTIAL):
        whole = 0
        for i in range(40):
            ask = {"prompt": f"prompt number {i} of these", "max_tokens": 2, **more}
            text = server.post(ask, "/v1/completions").json["choices"][0]["text"]
            if not text or not text[0].isascii():
                continue  # half a character: it cannot be sent back
            ask["prompt"] += text[0]
            again = server.post(ask, "/v1/completions")
            assert again.status == 200
            assert cached(again) == again.json["usage"]["prompt_tokens"] - 1
            whole += 1
            if whole == 3:
                break
        assert whole == 3
    assert metric(server, "generation_failures") == failures


def test_what_an_entry_takes_the_place_of_makes_room_for_it() -> None:
    """A conversation that has grown does not cost another one its entry."""
    kept = PromptCache(10)
    kept.insert_cache(MODEL, list(range(300)), [kv(KVCache(), 300)])
    before = kept.nbytes
    kept.insert_cache(MODEL, [500, 501], [kv(KVCache(), 2)])
    asked = []

    def make_room(size: int, given: int) -> bool:
        asked.append((size, given))
        return kept.evict_oldest() > 0

    kept.may_store = make_room
    kept.insert_cache(MODEL, list(range(600)), [kv(KVCache(), 600)])
    assert asked == [(2 * before, before)]
    # What was evicted is the other, though it is younger than what is replaced.
    assert (len(kept), kept.nbytes) == (1, 2 * before)


def test_the_flags_hold_while_requests_run(tiny_model: Path) -> None:
    limit = 300_000
    flags = ("--prompt-cache-bytes", str(limit), "--prompt-cache-size", "3")
    with Server(tiny_model, *flags) as server:
        server.wait_ready()
        seen: list[tuple[float, float]] = []
        done = threading.Event()

        def look() -> None:
            body = server.get("/metrics").body.splitlines()
            size, entries = (
                float(line.rsplit(" ", 1)[1])
                for name in ("bytes", "entries")
                for line in body
                if line.startswith(f"mlx_safe_prompt_cache_{name} ")
            )
            seen.append((size, entries))

        def watch() -> None:
            while not done.is_set():
                look()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for more in (BATCHED, SEQUENTIAL):
                for size in (20, 80, 160, 40):
                    for answer in server.chats(3, max_tokens=12, **more):
                        assert answer.status == 200
                    text = "word " * size
                    answer = server.chat(text, max_tokens=12, **more)
                    assert answer.status == 200
                too_large = metric(server, "prompt_cache_too_large")
                assert server.chat("word " * 300, **more).status == 200

                def told(before: float = too_large) -> bool:
                    return metric(server, "prompt_cache_too_large") > before

                assert eventually(told)
        finally:
            done.set()
            watcher.join(120)
        look()
        assert 0 < max(size for size, _ in seen) <= limit
        assert 0 < max(entries for _, entries in seen) <= 3
        assert metric(server, "prompt_cache_evictions") > 0
