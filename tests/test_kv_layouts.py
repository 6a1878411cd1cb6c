"""Caches of every kind come back from the disk and go on with the same logits."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_safe.kv.directory import Directory
from mlx_safe.kv.format import SNAPSHOT, Node, chain
from mlx_safe.kv.store import Draft, Limits
from mlx_safe.server.mlx_lm import kv_capture, kv_tier, kv_window
from mlx_safe.server.mlx_lm.kv_layout import own_bytes, to_bytes
from mlx_safe.server.mlx_lm.kv_parts import leaves
from mlx_safe.server.mlx_lm.kv_restore import Rate
from mlx_safe.server.mlx_lm.kv_tier import KVTier
from support import model_types
from support.card import is_card

# Windows have 32 tokens.
KINDS = {
    "qwen3": "KVCache",
    "gemma3_text": "KVCache, RotatingKVCache",
    "mamba2": "ArraysCache",
    "qwen3_next": "ArraysCache, KVCache",
    "falcon_h1": "ArraysCache, KVCache",
    "baichuan_m1": "ArraysCache, KVCache, RotatingKVCache",
    "deepseek_v32": "KVCache",
    "recurrent_gemma": "ArraysCache, RotatingKVCache",
    "llama4": "ChunkedKVCache, KVCache",
}
NEW = importlib.metadata.version("mlx-lm") >= "0.32"
# Of a chunked cache that comes back 0.31.3 makes another text.
IN_MEMORY = {"deepseek_v41": "LayerCache"} if NEW else {"llama4": "ChunkedKVCache"}
EXACT = [kind for kind in KINDS if kind not in IN_MEMORY]
BATCHED = ["qwen3", "gemma3_text", "qwen3_next", "falcon_h1"]

TEXT = [3 + n * 7 % 900 for n in range(310)]


class Kept:
    """A model, and a tier that outlives its servers."""

    def __init__(self, folder: Path, model: Any, **more: Any) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        self.key = (str(folder / "model"), None, None)
        self.provider = SimpleNamespace(
            model=model,
            draft_model=more.pop("draft", None),
            model_key=self.key,
            cli_args=SimpleNamespace(**{"kv_bits": None, **more}),
        )
        self._folder = folder / "kv"
        self.tier: KVTier | None = None
        self.start()

    def start(self) -> KVTier:
        """As a new process."""
        self.stop()
        self.tier = KVTier(Directory(self._folder), Limits(10**9, free=0))
        self.tier.model_loaded(self.provider)
        return self.tier

    def stop(self) -> None:
        if self.tier is not None:
            self.tier.close()
            self.tier.store.close()
            self.tier = None

    def settle(self) -> None:
        assert self.tier is not None
        self.tier.confirm()
        assert self.tier.writer.flush(60)

    def restore(self, tokens: list[int]) -> tuple[list[Any], int]:
        """What a new process has: caches, and of how many tokens."""
        found = self.start().restore(self.key, tokens, 0)
        assert found is not None
        caches, rest = found
        return caches, len(tokens) - len(rest)


def make_model(kind: str, seed: int = 1) -> Any:
    mx.random.seed(seed)
    model = model_types.make(model_types.config_of(kind))
    mx.eval(model.parameters())
    return model


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def make(kind: str, **more: Any) -> Kept:
        made.append(Kept(tmp_path, make_model(kind), **more))
        return made[-1]

    yield make
    for kept in made:
        kept.stop()


def read(model: Any, tokens: list[int], caches: list[Any], step: int = 100) -> None:
    for at in range(0, len(tokens), step):
        mx.eval(model(mx.array([tokens[at : at + step]]), cache=caches))


def logits(model: Any, caches: list[Any]) -> list[mx.array]:
    """Of a part of a prompt, and of two tokens one by one."""
    parts = (TEXT[280:300], TEXT[300:301], TEXT[301:302])
    found = [model(mx.array([part]), cache=caches)[:, -1] for part in parts]
    mx.eval(found)
    return found


def assert_equal(found: list[mx.array], expected: list[mx.array]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert not mx.any(mx.isnan(y)).item()
        assert mx.array_equal(x, y).item()


@pytest.mark.parametrize("kind", EXACT)
def test_a_text_goes_on_as_if_nothing_had_been(
    keep: Callable[..., Kept], kind: str
) -> None:
    kept = keep(kind)
    model = kept.provider.model
    caches = make_prompt_cache(model)
    found = {type(c).__name__ for c in leaves(caches)}
    assert ", ".join(sorted(found)) == KINDS[kind]
    read(model, TEXT[:272], caches)
    read(model, TEXT[272:280], caches, step=1)  # windows are in the midst of a turn
    assert kept.tier is not None
    kept.tier.capture(kept.key, TEXT[:280], caches)
    kept.settle()
    restored, length = kept.restore(TEXT)
    if length < 280:  # blocks alone
        assert (length, found) == (256, {"KVCache"})
        read(model, TEXT[256:280], restored, step=24)
        caches = make_prompt_cache(model)
        read(model, TEXT[:256], caches, step=256)
        read(model, TEXT[256:280], caches, step=24)
    assert_equal(logits(model, restored), logits(model, caches))


@pytest.mark.parametrize("shape", [(1, 1, 256, 64), (1, 2, 256, 64), (4, 5), (0, 3)])
def test_what_the_host_looks_at_is_no_memory_of_the_caches(
    shape: tuple[int, ...],
) -> None:
    """On CUDA it moves, and MLX's pool keeps its old block."""
    x = mx.random.normal(shape).astype(mx.bfloat16)
    found = own_bytes(x)
    mx.eval(x, found)
    of_x, of_found = (
        np.asarray(memoryview(y))  # type: ignore[arg-type]
        for y in (x.reshape(-1).view(mx.uint8), found)
    )
    assert to_bytes(found) == of_x.tobytes()
    assert not np.shares_memory(of_x, of_found)


def test_what_is_taken_meanwhile_is_not_the_time_of_reading(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card it takes as long: a restore would be taken for quicker than reading."""
    clock = [100.0]
    clocks = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr(kv_tier, "time", clocks)

    def slowly(x: mx.array) -> bytes:
        clock[0] += 10.0
        return to_bytes(x)

    monkeypatch.setattr(kv_capture, "to_bytes", slowly)
    kept = keep("qwen3")
    tier = kept.tier
    assert tier is not None
    batch = BatchGenerator(kept.provider.model, prefill_step_size=100)
    texts = [TEXT[:300], TEXT[1:301]]
    requests = [
        SimpleNamespace(prompt_key=(kept.key, text), is_ended=False, cached_tokens=0)
        for text in texts
    ]
    uids = batch.insert_segments([[text] for text in texts])
    taken = clock[0]
    for _ in range(3):
        tier.confirm()
        prompts, _ = batch.next()
        clock[0] += 1.0
        for prompt in prompts:
            n = uids.index(prompt.uid)
            tier.checkpoint(batch, prompt.uid, requests[n], is_boundary=False)
    batch.close()
    assert clock[0] - taken > 10.0
    assert tier._restore.read_rate.per_s == pytest.approx(100.0, rel=0.02)


@pytest.mark.parametrize("kind", BATCHED)
def test_rows_of_a_batch_are_taken_while_they_are_read(
    keep: Callable[..., Kept], kind: str
) -> None:
    kept = keep(kind)
    tier = kept.tier
    assert tier is not None
    batch = BatchGenerator(kept.provider.model, prefill_step_size=100)
    texts = [TEXT[:300], TEXT[5:275]]  # one has padding before it, and ends first
    requests = [
        SimpleNamespace(prompt_key=(kept.key, text), is_ended=False, cached_tokens=0)
        for text in texts
    ]
    uids = batch.insert_segments([[text] for text in texts])
    ends: dict[int, list[Any]] = {}
    for _ in range(6):
        prompts, _ = batch.next()
        for prompt in prompts:
            n = uids.index(prompt.uid)
            tier.checkpoint(batch, prompt.uid, requests[n], is_boundary=False)
            if not prompt.end_of_prompt:
                ends[n] = batch.extract_cache([prompt.uid])[prompt.uid]
    kept.settle()
    batch.close()
    for n, text in enumerate(texts):
        restored, length = kept.restore(text)
        assert length >= 256
        caches, tokens = ends[n]
        if length < len(tokens):  # not one for each step: read on from it
            read(kept.provider.model, text[length : len(tokens)], restored, step=100)
            if kind != "qwen3":
                caches = make_prompt_cache(kept.provider.model)
                read(kept.provider.model, text[: len(tokens)], caches, step=100)
        assert_alike(logits(kept.provider.model, restored), logits_of(kept, caches))


def logits_of(kept: Kept, caches: list[Any]) -> list[mx.array]:
    return logits(kept.provider.model, caches)


def assert_alike(found: list[mx.array], expected: list[mx.array]) -> None:
    """But for the rounding of a batch."""
    for x, y in zip(found, expected, strict=True):
        assert mx.allclose(x, y, rtol=1e-3, atol=1e-3).item()
        assert mx.array_equal(mx.argmax(x, -1), mx.argmax(y, -1)).item()


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_kinds_that_are_not_proven_stay_in_memory(
    keep: Callable[..., Kept], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keep(kind)
    assert kept.tier is not None
    kept.tier.model_loaded(kept.provider)
    said = [r for r in caplog.records if "stay in memory" in r.getMessage()]
    assert len(said) == 1
    assert IN_MEMORY[kind] in said[0].getMessage()
    assert kept.tier.restore(kept.key, TEXT, 0) is None


def test_a_subclass_is_not_taken_for_what_it_comes_from(
    keep: Callable[..., Kept], caplog: pytest.LogCaptureFixture
) -> None:
    kept = keep("gemma3_text")
    make = kept.provider.model.make_cache

    def changed() -> list[Any]:
        made: list[Any] = make()
        made[0].__class__ = type("OwnCache", (type(made[0]),), {})
        return made

    kept.provider.model.make_cache = changed
    assert not kept.start().store.has(Node("0" * 32, "b", "0" * 32, 0, 256, "0" * 32))
    assert "not proven for OwnCache" in caplog.text


def test_a_draft_models_caches_are_kept_beside_the_targets(
    keep: Callable[..., Kept],
) -> None:
    draft = make_model("llama", seed=2)
    kept = keep("qwen3", draft=draft)
    model = kept.provider.model
    caches = make_prompt_cache(model)
    own = len(caches)
    caches += make_prompt_cache(draft)
    read(model, TEXT[:300], caches[:own])
    read(draft, TEXT[:300], caches[own:])
    assert kept.tier is not None
    kept.tier.capture(kept.key, TEXT[:300], caches)
    kept.settle()
    restored, length = kept.restore(TEXT)
    assert length == 300
    for one, part in ((model, slice(None, own)), (draft, slice(own, None))):
        plain = make_prompt_cache(one)
        read(one, TEXT[:300], plain)
        assert_equal(logits(one, restored[part]), logits(one, plain))


@pytest.mark.skipif(
    is_card(), reason="MLX's CUDA backend multiplies no such matrices (0.32.4)"
)
def test_quantized_caches_come_back_where_they_ended(
    keep: Callable[..., Kept],
) -> None:
    kept = keep("qwen3", kv_bits=8, kv_group_size=16, quantized_kv_start=200)
    config = {**model_types.config_of("qwen3"), "head_dim": 64}
    kept.provider.model = model = model_types.make(config)
    kept.provider.model_key = kept.key = (kept.key[0], None, None)
    args = SimpleNamespace(kv_bits=8, kv_group_size=64, quantized_kv_start=200)
    kept.provider.cli_args = args
    tier = kept.start()
    caches = make_prompt_cache(model)
    read(model, TEXT[:270], caches)
    caches = [c.to_quantized(group_size=64, bits=8) for c in caches]
    read(model, TEXT[270:280], caches)
    tier.capture(kept.key, TEXT[:280], caches)
    kept.settle()
    restored, length = kept.restore(TEXT)
    assert length == 280, "not at a block, where other bits would have been read"
    assert [type(c).__name__ for c in restored] == ["QuantizedKVCache"] * len(caches)
    assert_equal(logits(model, restored), logits(model, caches))
    # Quantized from another token on, a text has other bits.
    args.quantized_kv_start = 5000
    assert kept.start().restore(kept.key, TEXT, 0) is None


def test_files_that_are_sound_and_not_of_these_caches_are_not_used(
    keep: Callable[..., Kept],
) -> None:
    """Their maker knew the format."""
    kept = keep("recurrent_gemma")
    model = kept.provider.model
    caches = make_prompt_cache(model)
    read(model, TEXT[:300], caches)
    tier = kept.tier
    assert tier is not None
    tier.capture(kept.key, TEXT[:300], caches)
    offered = tier.writer._drafts()[-1]
    kept.settle()
    identity = offered.node.identity
    node = Node.snapshot(identity, chain(identity, TEXT[:300]), TEXT[:300])
    good, pieces = offered.about, list(offered.pieces)
    for n, (about, parts) in enumerate(others(good, pieces)):
        tier.store.drop([node])
        tier.store.publish(Draft(node, TEXT[:300], parts, about, ()))
        assert tier.store.has(node)
        assert tier.restore(kept.key, TEXT, 0) is None, f"case {n}"
        assert not tier.store.has(node), "it goes"
        assert tier.store.off is None
    tier.store.publish(Draft(node, TEXT[:300], pieces, good, ()))
    assert tier.restore(kept.key, TEXT, 0) is not None


def others(good: Any, pieces: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """What a header can say that is not so."""

    def states(change: Callable[[list[Any]], Any]) -> Any:
        made = [
            [list(ints), [f and list(f) for f in forms]]
            for ints, forms in good["states"]
        ]
        changed = change(made)
        return {**good, "states": made if changed is None else changed}

    window = next(n for n, (ints, _) in enumerate(good["states"]) if ints)
    recurrent = next(n for n, (ints, _) in enumerate(good["states"]) if not ints)

    def assign(n: int, part: int, at: int, value: Any) -> Callable[[list[Any]], None]:
        def change(made: list[Any]) -> None:
            made[n][part][at] = value

        return change

    for value in (-1, 10**9, 299, True, "300", None, 2.5):
        yield states(assign(window, 0, 0, value)), pieces
    for value in (-1, 33, 10**12):
        yield states(assign(window, 0, 1, value)), pieces
    for value in (-1, 5):
        yield states(assign(window, 0, 2, value)), pieces
    listed: Any
    for listed in (
        ["float32", 1, 1, 2, 8],
        ["float32", 1, 1, 2**31, 2**31],
        ["float32", -1, -1, 32, 16],
        ["complex64", 1, 1, 32, 16],
        ["Dtype", 1],
        ["__class__", 1],
        [],
        None,
        "float32",
    ):
        yield states(assign(window, 1, 0, listed)), pieces
        yield states(assign(recurrent, 1, 0, listed)), pieces
    yield states(lambda made: made[:-1]), pieces
    yield states(lambda made: [*made, made[0]]), pieces
    yield states(lambda made: made[::-1]), pieces
    yield states(lambda made: {"0": 1}), pieces
    yield {**good, "more": 1}, pieces
    yield {"arrays": good["arrays"]}, pieces
    yield [], pieces
    yield None, pieces
    yield good, pieces[:-1]
    yield good, [*pieces, b"more"]
    yield good, [*pieces[:-1], pieces[-1][:-4]]
    yield good, pieces[::-1]


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next"])
def test_a_snapshot_that_goes_before_it_is_read(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Evicted meanwhile; it ends where a block does, and an older one serves."""
    kept = keep(kind)
    tier, model = kept.tier, kept.provider.model
    assert tier is not None
    text = [*TEXT, *TEXT][:600]
    caches = make_prompt_cache(model)
    for begin, end in ((0, 256), (256, 512)):
        read(model, text[begin:end], caches, step=256)
        tier.capture(kept.key, text[:end], caches)
        kept.settle()
    tier = kept.start()
    plain = Directory.open_node

    def open_node(self: Directory, node: Node) -> int:
        if node.end == node.start == 512:
            tier.store.drop([node])
        return plain(self, node)

    monkeypatch.setattr(Directory, "open_node", open_node)
    found: Any = tier.restore(kept.key, text, 0)
    assert tier.store.off is None
    assert found is not None
    assert found[1] == text[256:]
    read(model, text[256:512], found[0], step=256)
    assert_equal(logits(model, found[0]), logits(model, caches))


def test_a_long_prompts_snapshots_go_one_for_the_next(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the sequential path; what a fault leaves reaches back a block and a step."""
    monkeypatch.setattr(kv_capture, "WAIT_S", 0)
    kept = keep("mamba2")
    tier, model = kept.tier, kept.provider.model
    assert tier is not None
    text = [*TEXT, *TEXT, *TEXT]
    request = SimpleNamespace(run=SimpleNamespace(alone=True), is_ended=False)
    tier.current = lambda: request
    caches: Any = tier.follow(kept.key, text, None, 0)
    kept_ends = []
    for at in range(0, 900, 100):
        read(model, text[at : at + 100], caches)
        tier.checkpoint_alone(request, at + 100)
        kept.settle()
        kept_ends.append(sorted(n.end for n in nodes(tier)))
    assert kept_ends == [[], [], *[[300]] * 3, *[[600]] * 3, [900]]
    tier.fail(stray=False)
    tier.confirm()
    restored, length = kept.restore(text)
    assert length == 900
    assert_equal(logits(model, restored), logits(model, caches))


@pytest.mark.parametrize(
    ("way", "length"),
    [("fault", 900), ("stray", 300), ("left", 900), ("stop", 900), ("answered", 300)],
)
def test_what_is_not_worth_its_bytes_is_held_until_it_is_needed(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, way: str, length: int
) -> None:
    """A snapshot that saves a small share of the text is written if that is lost."""
    monkeypatch.setattr(kv_capture, "SHARE", 0.9)
    monkeypatch.setattr(kv_capture, "WAIT_S", 0)
    kept = keep("mamba2")
    tier, model = kept.tier, kept.provider.model
    assert tier is not None
    text = [*TEXT, *TEXT, *TEXT]
    request = SimpleNamespace(run=SimpleNamespace(alone=True), is_ended=False)
    tier.current = lambda: request
    caches = tier.follow(kept.key, text, None, 0)
    assert caches is not None
    for at in range(0, 900, 100):
        read(model, text[at : at + 100], caches)
        tier.checkpoint_alone(request, at + 100)
        kept.settle()
    assert [n.end for n in nodes(tier)] == [300]
    if way in ("fault", "stray"):
        tier.fail(stray=way == "stray")
    elif way == "answered":
        tier.first_token(request)
    request.is_ended = way in ("left", "answered")
    if way != "stop":  # which a new process begins with
        kept.settle()
        assert [n.end for n in nodes(tier)] == [length]
    restored, found = kept.restore(text)
    assert found == length
    if length == 900:
        assert_equal(logits(model, restored), logits(model, caches))


def keep_waiting(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, kind: str, per_s: float
) -> tuple[Kept, KVTier, Any]:
    """(kept, tier, model): snapshots wait an hour; so many tokens are read a second."""
    monkeypatch.setattr(kv_capture, "WAIT_S", 3600)
    kept = keep(kind)
    assert kept.tier is not None
    kept.tier._restore.read_rate.saw(per_s, 1)
    return kept, kept.tier, kept.provider.model


@pytest.mark.parametrize("kind", ["qwen3_next", "gemma3_text"])
def test_turns_that_follow_soon_write_one_snapshot(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And it is there when the server stops, or when none has followed."""
    kept, tier, model = keep_waiting(keep, monkeypatch, kind, per_s=500)
    text = [*TEXT, *TEXT, *TEXT, *TEXT]
    caches = make_prompt_cache(model)
    for turn in range(4):
        read(model, text[300 * turn : 300 * turn + 300], caches)
        tier.capture(kept.key, text[: 300 * turn + 300], caches)
        kept.settle()
    assert [n for n in nodes(tier) if n.kind == SNAPSHOT] == []
    monkeypatch.setattr(kv_capture, "WAIT_S", 1)  # it takes two to read them again
    read(model, [7] * 300, caches)
    longer = [*text[:1200], *[7] * 300]
    tier.capture(kept.key, longer, caches)
    kept.settle()
    assert [n.end for n in nodes(tier) if n.kind == SNAPSHOT] == [1500]
    restored, length = kept.restore([*longer, 1])
    assert length == 1500
    assert_equal(logits(model, restored), logits(model, caches))


def test_the_end_of_a_prompt_waits_and_not_its_short_answers(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may render the answer in other tokens; and memory evicts both."""
    kept, tier, model = keep_waiting(keep, monkeypatch, "mamba2", per_s=1000)
    caches = make_prompt_cache(model)
    text = [*TEXT, *TEXT][:620]
    for begin, end in ((0, 280), (280, 300), (300, 620)):
        read(model, text[begin:end], caches)
        tier.capture(kept.key, text[:end], caches)
        kept.settle()
        (held,) = tier.writer.due(tier._kept[0].identity, text)
        assert held.end == (280 if end < 620 else 620)
    other = [*text[:600], 5]
    plain = make_prompt_cache(model)
    read(model, other, plain)
    tier.capture(kept.key, other, plain, leaves=True)
    kept.settle()
    tier.capture(kept.key, text, caches, leaves=True)
    kept.settle()
    assert sorted(n.end for n in nodes(tier)) == [601, 620]
    assert tier.writer.waiting == 0


def test_in_the_midst_of_a_prompt_no_snapshot_waits_to_be_written(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step would have one; the one at its end waits for the next turn's."""
    kept, tier, model = keep_waiting(keep, monkeypatch, "mamba2", per_s=1000)
    text = [*TEXT, *TEXT][:600]
    request = SimpleNamespace(run=SimpleNamespace(alone=True), is_ended=False)
    tier.current = lambda: request
    caches: Any = tier.follow(kept.key, text, None, 0)
    waiting = []
    for begin, end in [*((at, at + 100) for at in range(0, 500, 100)), (500, 599)]:
        read(model, text[begin:end], caches)
        tier.checkpoint_alone(request, end)
        kept.settle()
        waiting.append(tier.writer.waiting > 0)
    assert waiting == [False] * 5 + [True]
    held = tier.writer.waiting
    tier.capture(kept.key, text[:599], caches)  # as the prompt cache gets it
    assert tier.writer.waiting == held, "once"
    assert tier.writer.has_held(id(request)), "it is written if the client leaves"
    tier.first_token(request)
    request.is_ended = True
    kept.settle()
    assert tier.writer.waiting > 0, "it may be written later"
    assert nodes(tier) == []


def test_how_fast_a_prompt_is_read_its_short_last_step_does_not_tell() -> None:
    rate = Rate()
    for _ in range(5):
        rate.saw(2048, 4.0)
        rate.saw(10, 0.5)
    assert 400 < rate.per_s < 512


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2", "gemma3_text"])
def test_what_is_taken_at_a_prompts_end_is_of_that_end(
    keep: Callable[..., Kept], kind: str
) -> None:
    """mlx-lm tells of the last token when the next step has begun."""
    kept = keep(kind)
    tier, model = kept.tier, kept.provider.model
    assert tier is not None
    text = [*TEXT, *TEXT][:512]
    request = SimpleNamespace(run=SimpleNamespace(alone=True), is_ended=False)
    tier.current = lambda: request
    caches: Any = tier.follow(kept.key, text, None, 0)
    made = generate_step(
        mx.array(text),
        model,
        max_tokens=4,
        prompt_cache=caches,
        prefill_step_size=256,
        prompt_progress_callback=lambda read, _: tier.checkpoint_alone(request, read),
    )
    tokens = [token for token, _ in made]
    tier.capture(kept.key, [*text, *tokens], caches)
    kept.settle()
    assert tier._kept, "it is still kept"
    more = [*text, 5, 6, 7]  # another answer: nothing after the prompt is of use
    restored, length = kept.restore(more)
    assert length >= 256
    plain = make_prompt_cache(model)
    for at in range(0, length, 256):
        read(model, more[at : min(at + 256, length)], plain, step=256)
    assert_equal(logits(model, restored), logits(model, plain))


def nodes(tier: KVTier) -> list[Node]:
    return [entry.node for entry in tier.store._index.values()]


@pytest.mark.parametrize("batched", [False, True])
def test_windows_that_keep_their_first_tokens(
    keep: Callable[..., Kept], batched: bool
) -> None:
    """``--max-kv-size``; what comes out of a batch has forgotten which they were."""
    kept = keep("llama")
    model = kept.provider.model
    kv_window.limit(model, 64)
    tier = kept.start()
    caches = make_prompt_cache(model)
    read(model, TEXT[:272], caches)
    if batched:
        caches = [type(c).merge([c]).extract(0) for c in caches]
    else:
        read(model, TEXT[272:280], caches, step=1)
    done = caches[0].offset
    tier.capture(kept.key, TEXT[:done], caches)
    kept.settle()
    restored, length = kept.restore(TEXT)
    assert length == done
    assert [c.keep for c in restored] == [0 if batched else 4] * len(caches)
    assert_equal(logits(model, restored), logits(model, caches))
