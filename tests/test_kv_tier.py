"""What of a cache goes to disk, and when; without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from mlx_safe import _reports, testing
from mlx_safe._command import CommandError
from mlx_safe.doctor import doctor
from mlx_safe.kv.directory import Directory
from mlx_safe.kv.store import Limits
from mlx_safe.server.mlx_lm import kv_capture, kv_restore
from mlx_safe.server.mlx_lm.kv_layout import Layout, to_bytes
from mlx_safe.server.mlx_lm.kv_tier import KVTier
from mlx_safe.server.mlx_lm.prompt_cache import PromptCache
from support.server import kept_in

TOKENS = [3 + n % 50 for n in range(520)]  # what comes after 512 is not worth it


@pytest.fixture
def provider(tiny_model: Path) -> Any:
    model, _ = load(str(tiny_model))
    return SimpleNamespace(
        model=model,
        draft_model=None,
        model_key=(str(tiny_model), None, None),
        cli_args=SimpleNamespace(kv_bits=None),
    )


@pytest.fixture
def tier(provider: Any, tmp_path: Path) -> Iterator[KVTier]:
    made = KVTier(Directory(tmp_path / "kv"), Limits(10**9, free=0))
    made.model_loaded(provider)
    yield made
    made.close()
    made.store.close()


def read(provider: Any, tokens: list[int], caches: list[Any]) -> mx.array:
    return provider.model(mx.array([tokens]), cache=caches)  # type: ignore[no-any-return]


def cached(provider: Any) -> list[Any]:
    caches: list[Any] = make_prompt_cache(provider.model)
    mx.eval(read(provider, TOKENS, caches))
    return caches


def files(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("kv/*/*.kv"))


def flush(tier: KVTier) -> None:
    assert tier.writer.flush(60)


def test_what_comes_back_is_the_same_bit_for_bit(
    provider: Any, tier: KVTier, tmp_path: Path
) -> None:
    caches = cached(provider)
    tier.capture(provider.model_key, TOKENS, caches)
    assert not files(tmp_path), "not before a later point of the loop"
    tier.confirm()
    flush(tier)
    assert len(files(tmp_path)) == 2
    found: Any = tier.restore(provider.model_key, TOKENS, 0)
    assert found is not None
    restored, rest = found
    assert rest == TOKENS[512:]
    for old, new in zip(caches, restored, strict=True):
        assert new.offset == 512
        for a, b in ((old.keys, new.keys), (old.values, new.values)):
            assert a.dtype == b.dtype
            assert mx.array_equal(a[..., :512, :], b).item()
    plain = make_prompt_cache(provider.model)
    mx.eval(read(provider, TOKENS[:512], plain))
    expected = read(provider, rest, plain)
    assert mx.array_equal(read(provider, rest, restored), expected).item()
    assert tier.restore(provider.model_key, TOKENS, 300) is None, "less than a block"


def test_a_fault_while_bytes_are_taken(
    provider: Any, tier: KVTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = to_bytes

    def failing(x: mx.array) -> bytes:
        if not done:
            done.append(testing.record_fault(8))
        return take(x)

    done: list[Any] = []
    caches = cached(provider)
    monkeypatch.setattr(kv_capture, "to_bytes", failing)
    tier.capture(provider.model_key, TOKENS, caches)
    assert done
    tier.confirm()
    flush(tier)
    assert not files(tmp_path)


@pytest.mark.parametrize("stray", [False, True])
def test_a_fault_before_the_later_point(
    provider: Any, tier: KVTier, tmp_path: Path, stray: bool
) -> None:
    tier.capture(provider.model_key, TOKENS, cached(provider))
    testing.record_fault(9 if stray else 8)
    tier.fail(stray=stray)
    tier.confirm()
    flush(tier)
    assert not files(tmp_path)
    # Nor where nobody has been told of it yet.
    tier.capture(provider.model_key, TOKENS, cached(provider))
    testing.record_fault(8)
    tier.confirm()
    flush(tier)
    assert not files(tmp_path)
    tier.capture(provider.model_key, TOKENS, cached(provider))
    tier.confirm()
    flush(tier)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("stray", [False, True])
def test_a_fault_of_a_request_that_began_from_files(
    provider: Any, tier: KVTier, tmp_path: Path, stray: bool
) -> None:
    tier.capture(provider.model_key, TOKENS, cached(provider))
    tier.confirm()
    flush(tier)
    tier.current = lambda: SimpleNamespace(is_ended=False)
    assert tier.restore(provider.model_key, TOKENS, 0) is not None
    assert list((tmp_path / "kv" / "marks").iterdir())
    tier.fail(stray=stray)
    assert len(files(tmp_path)) == (0 if stray else 2)
    assert not list((tmp_path / "kv" / "marks").iterdir())


@pytest.mark.parametrize("call", ["read", "slots", "caches"])
def test_what_nobody_has_thought_of_turns_it_off(
    provider: Any,
    tier: KVTier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    """A mistake in the tier costs a reading of the prompt, and no answer."""
    caches = cached(provider)
    if call != "slots":
        tier.capture(provider.model_key, TOKENS, caches)
        tier.confirm()
        flush(tier)

    def failing(*_: Any) -> Any:
        raise KeyError("of somebody's text")

    monkeypatch.setattr(Layout, call, failing)
    tier.current = lambda: SimpleNamespace(is_ended=False)
    tier.capture(provider.model_key, [*TOKENS, 1], caches)
    assert tier.restore(provider.model_key, TOKENS, 0) is None
    tier.confirm()
    assert tier.store.off is not None
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert "somebody" not in warned[0].getMessage()
    assert not list((tmp_path / "kv" / "marks").iterdir())
    assert not files(tmp_path), "they may be the cause"


def test_a_fault_or_want_of_memory_is_no_failure_of_the_tier(
    provider: Any, tier: KVTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError(testing.metal_message(8))

    monkeypatch.setattr(Layout, "slots", failing)
    with pytest.raises(RuntimeError):
        tier.capture(provider.model_key, TOKENS, cached(provider))
    assert tier.store.off is None


def ends(tier: KVTier) -> list[int]:
    tier.confirm()
    flush(tier)
    return sorted(entry.node.end for entry in tier.store._index.values())


def test_what_comes_after_the_last_block_is_kept_where_it_is_worth_it(
    provider: Any, tier: KVTier
) -> None:
    """Up to 1.1 of the new KV is written, and a fiftieth of a text is read again."""
    key = provider.model_key
    first, second = TOKENS * 2, [5, *TOKENS * 2, *TOKENS]

    def go_on(caches: list[Any], tokens: list[int], end: int) -> list[int]:
        mx.eval(read(provider, tokens[caches[0].offset : end], caches))
        tier.capture(key, tokens[:end], caches)
        return ends(tier)

    caches = make_prompt_cache(provider.model)
    assert go_on(caches, first, 500) == [256, 500]
    assert go_on(caches, first, 520) == [256, 512], "its block is full"
    assert go_on(caches, first, 522) == [256, 512], "less than a fiftieth"
    assert go_on(caches, first, 620) == [256, 512], "a share of what was written"
    caches = make_prompt_cache(provider.model)
    both = sorted([256, 512, 256, 512, 768, 1024, 1100])
    assert go_on(caches, second, 1100) == both
    assert go_on(caches, second, 1110) == both
    found: Any = tier.restore(key, second, 0)
    assert found is not None
    restored, rest = found
    assert rest == second[1100:]
    for old, new in zip(caches, restored, strict=True):
        assert mx.array_equal(old.keys[..., :1100, :], new.keys).item()
    other = tier.restore(key, [*second[:1060], *first], 0)
    assert other is not None
    assert len(other[1]) == len(first) + 1060 - 1024


@pytest.mark.parametrize("way", ["evicted", "too large", "cleared"])
def test_of_what_leaves_memory_the_disk_has_all(
    provider: Any, tier: KVTier, way: str
) -> None:
    tier._capture._tails = 0.0  # nothing may be spent on it otherwise
    cache = PromptCache(1, 10 if way == "too large" else None)
    cache.disk = tier
    tokens, caches = [*TOKENS, *TOKENS[:40]], make_prompt_cache(provider.model)
    mx.eval(read(provider, tokens, caches))
    key = provider.model_key
    cache.insert_cache(key, tokens, caches)
    if way == "evicted":
        assert ends(tier) == [256, 512]
        assert cache.evict_oldest() > 0
    elif way == "cleared":  # after a failure: nothing of it is trusted
        cache.clear()
    assert ends(tier) == [256, 512] + [560] * (way != "cleared")
    assert len(cache) == 0


def test_of_what_memory_has_more_of_nothing_is_written_when_it_leaves(
    provider: Any, tier: KVTier
) -> None:
    """The beginning of a conversation that goes on, and cannot be trimmed to it."""
    tier._capture._tails = 0.0
    cache = PromptCache(3)
    cache.disk = tier
    key, text = provider.model_key, [*TOKENS, *TOKENS[:40]]
    for tokens, kind in ((text, "system"), (text[:552], "user"), ([7], "user")):
        caches = make_prompt_cache(provider.model)
        mx.eval(read(provider, tokens, caches))
        cache.insert_cache(key, tokens, caches, cache_type=kind)
    assert cache.evict_oldest() > 0
    assert len(cache) == 2
    assert ends(tier) == [256, 512]
    cache.trim_to(n_sequences=0)
    assert ends(tier) == [256, 512, 560]


def test_another_model_does_not_get_them(
    provider: Any, tier: KVTier, tiny_model: Path, tmp_path: Path
) -> None:
    tier.capture(provider.model_key, TOKENS, cached(provider))
    tier.confirm()
    flush(tier)
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model.iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            data[-1] ^= 1  # the same heads and sizes
        (other / file.name).write_bytes(data)
    provider.model_key = (str(other), None, None)
    tier.model_loaded(provider)
    assert tier.restore(provider.model_key, TOKENS, 0) is None


def test_what_0_1_0_has_kept_is_of_the_same_model(tier: KVTier, tmp_path: Path) -> None:
    """A fact more, and none of its files would be found after an upgrade."""
    (about,) = tmp_path.glob("kv/*/about.json")
    names = set(json.loads(about.read_text()))
    assert names == {"caches", "device", "format", "mlx", "mlx-lm", "model", "name"}


def test_it_restores_only_where_that_is_cheaper(provider: Any, tier: KVTier) -> None:
    tier.capture(provider.model_key, TOKENS, cached(provider))
    tier.confirm()
    flush(tier)

    def is_restored() -> bool:
        return tier.restore(provider.model_key, TOKENS, 0) is not None

    def learn(read: float, restore: float) -> None:
        """Tokens and bytes a second."""
        rates = tier._restore
        rates.read_rate.per_s, rates.restore_rate.per_s = read, restore

    assert is_restored(), "of nothing is anything known"
    size = tier.store.nbytes
    learn(read=512, restore=2 * size)  # 1 s to read them, half of it to load them
    assert is_restored()
    learn(read=512, restore=size / 2)
    tried = [is_restored() for _ in range(kv_restore.TRY_AGAIN_AFTER)]
    assert tried.count(True) == 1
    assert tried[-1]
    assert tier.store.events["not_cheaper"] == kv_restore.TRY_AGAIN_AFTER
    assert is_restored(), "it was learned that it is cheap by now"


def test_a_busy_moment_ends_no_writing(tier: KVTier) -> None:
    """After one restore of 10 s nothing was written until others had come back."""
    rates = tier._restore
    for _ in range(9):
        rates.read_rate.saw(256, 0.25)
        rates.take_rate.saw(1e6, 0.001)
        rates.restore_rate.saw(1e6, 0.001)
    rates.take_rate.saw(1e6, 10)
    rates.restore_rate.saw(1e6, 10)
    assert rates.blocks_max(10**6, 256) is None
    for _ in range(9):  # a disk that stays so slow is known soon
        rates.restore_rate.saw(1e6, 10)
    assert rates.blocks_max(10**6, 256) == 0


def test_what_is_read_faster_than_it_is_taken_is_not_written(
    provider: Any, tier: KVTier, tmp_path: Path
) -> None:
    """As on a card, where the first token would come later for it."""
    rates = tier._restore
    block = tier._kept[0].layout.block_nbytes
    texts = iter([[n, *TOKENS] for n in range(1000, 1100)])

    def written() -> int:
        before = files(tmp_path)
        tokens = next(texts)
        caches = make_prompt_cache(provider.model)
        mx.eval(read(provider, tokens, caches))
        tier.capture(provider.model_key, tokens, caches)
        tier.confirm()
        flush(tier)
        return len(files(tmp_path)) - len(before)

    def learn(read_s: float, take_s: float, restore_s: float) -> None:
        """Seconds for a block."""
        rates.read_rate.per_s = 256 / read_s
        rates.take_rate.per_s = block / take_s
        rates.restore_rate.per_s = block / restore_s if restore_s else 0.0

    everything = written()
    assert everything > 1, "of nothing is anything known"
    assert not rates.take_rate.per_s, "MLX compiled a kernel for it"
    assert written() == everything
    assert rates.take_rate.per_s > 0
    for speeds, pays in (
        ((4, 0.9, 0), 1),
        ((4, 1.1, 0), 0),
        ((4, 0.9, 3), 1),
        ((4, 0.9, 3.2), 0),
    ):
        learn(*speeds)
        assert written() == pays * everything, speeds
    assert tier.store.events["not_written_dear"] == 2
    tried = []
    for _ in range(kv_restore.TRY_AGAIN_AFTER):
        learn(4, 5, 0)
        tried.append(written())
    assert sum(tried) == 1, "a try is of one block, as each delays a first token"


def test_what_is_being_written_is_waited_for_no_longer_than_reading_takes(
    provider: Any, tier: KVTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def flush(timeout_s: float) -> bool:
        asked.append(timeout_s)
        return False

    monkeypatch.setattr(tier.writer, "flush", flush)
    tier.capture(provider.model_key, TOKENS, cached(provider))
    assert tier.restore(provider.model_key, TOKENS, 0) is None
    tier._restore.read_rate.saw(52_000, 1.0)  # a card's
    tier._restore.take_rate.per_s = 1e12  # and of one that copies as fast
    assert tier.restore(provider.model_key, TOKENS, 0) is None
    assert asked == [kv_restore.FLUSH_S, pytest.approx(0.01)]
    tier._restore.take_rate.per_s = 1.0  # to take it is dearer than to read it again
    assert tier.restore(provider.model_key, TOKENS, 0) is None
    assert len(asked) == 2


def test_both_speeds_are_learned(provider: Any, tier: KVTier) -> None:
    request = SimpleNamespace(run=SimpleNamespace(alone=True), is_ended=False)
    tier.current = lambda: request
    caches: Any = tier.follow(provider.model_key, TOKENS, None, 0)
    for at in range(0, 600, 100):
        mx.eval(read(provider, TOKENS[at : at + 100], caches))
        tier.checkpoint_alone(request, at + 100)
    assert tier._restore.read_rate.per_s > 0
    tier.confirm()
    flush(tier)
    assert tier.restore(provider.model_key, TOKENS, 0) is not None
    assert tier._restore.restore_rate.per_s > 0


def test_loading_takes_the_cache_once(provider: Any, tier: KVTier) -> None:
    tokens = TOKENS * 8
    caches = make_prompt_cache(provider.model)
    mx.eval(read(provider, tokens, caches))
    tier.capture(provider.model_key, tokens, caches)
    tier.confirm()
    flush(tier)
    del caches
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = tier.restore(provider.model_key, tokens, 0)
    assert found is not None
    restored, _ = found
    size = sum(cache.nbytes for cache in restored)
    taken = mx.get_active_memory() - before
    assert size <= taken <= 1.05 * size
    block = size / (len(tokens) // 256)
    assert mx.get_peak_memory() - before <= size + 2 * block
    assert mx.get_cache_memory() <= 3 * block, "a second copy is in MLX's pool"


def test_reports_tell_how_the_tier_stood(
    provider: Any, tier: KVTier, tmp_path: Path
) -> None:
    tier.capture(provider.model_key, TOKENS, cached(provider))
    tier.confirm()
    flush(tier)
    assert tier.restore(provider.model_key, TOKENS, 0) is not None
    _reports.set_server({"kv_disk": tier.figures()})
    path = _reports.write("stall", "nothing happens")
    assert path is not None
    told = json.loads(Path(path).read_text())
    kept = told["context"]["server"]["kv_disk"]
    assert (kept["off"], kept["files"], kept["restored"]) == (None, 2, 1)
    assert kept["bytes"] == tier.store.nbytes
    assert kept["restoring"] == 1
    assert "mlx_lm" in told["context"], "what it told before"
    assert str(tmp_path) not in json.dumps(kept)
    crumbs = [c for c in told["breadcrumbs"] if c["kind"] == "kv"]
    assert crumbs[-1]["fields"]["tokens"] == 512


def test_the_doctor_says_whether_the_server_could_use_it(
    tier: KVTier,
    provider: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tier.capture(provider.model_key, TOKENS, cached(provider))
    tier.confirm()
    flush(tier)
    assert doctor([*kept_in(tmp_path / "kv"), "--kv-disk-bytes", "1G"]) == 0
    told = capsys.readouterr().out
    assert "2 files" in told
    assert "of 1.0 GB" in told
    assert "nothing is written" not in told
    too_much = ("--kv-free-bytes", "1000T")
    assert doctor(["--kv-dir", str(tmp_path / "kv"), *too_much]) == 0
    assert "! nothing is written: see --kv-free-bytes" in capsys.readouterr().out
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(CommandError, match="no directory of KV caches"):
        doctor(["--kv-dir", str(tmp_path / "full")])
    with pytest.raises(CommandError, match="needs --kv-dir"):
        doctor(["--kv-disk-bytes", "1G"])
    with pytest.raises(CommandError, match="--kv-free-bytes needs --kv-dir"):
        doctor(["--kv-free-bytes", "0"])
