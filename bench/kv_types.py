"""Every type of model that mlx-lm knows, through the disk and back: the same logits?

Each is a tiny one with random weights. 280 tokens are read, taken, written, and come
back in a new tier. Then a part of a prompt and two tokens must have the same logits,
bit for bit, as without. Says of each whether that is so and of which caches, or that
its caches stay in memory. Exit status 1 when one is not exact.

    bench/kv_types.py [TYPE ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_safe.server.mlx_lm.kv_parts import leaves
from support import model_types
from test_kv_layouts import TEXT, Kept, logits, make_model, read

TOKENS = 280
LIMIT_S = 120


def through_the_disk(kept: Kept) -> str:
    model = kept.provider.model
    caches = make_prompt_cache(model)
    names = ", ".join(sorted({type(cache).__name__ for cache in leaves(caches)}))
    read(model, TEXT[: TOKENS - 8], caches)
    read(model, TEXT[TOKENS - 8 : TOKENS], caches, step=1)
    assert kept.tier is not None
    kept.tier.capture(kept.key, TEXT[:TOKENS], caches)
    kept.settle()
    restored, length = kept.restore(TEXT)
    if length < TOKENS:  # blocks alone
        caches = make_prompt_cache(model)
        read(model, TEXT[:length], caches, step=length)
        for made in (restored, caches):
            read(model, TEXT[length:TOKENS], made, step=TOKENS - length)
    pairs = zip(logits(model, restored), logits(model, caches), strict=True)
    # Not a number is no number, and so is not the same.
    same = all(mx.array_equal(x, y).item() for x, y in pairs)
    return f"{'exact' if same else 'NOT EXACT'}: {names}"


def tried(kind: str) -> str:
    try:
        model = make_model(kind)
    except ImportError as e:  # of a package that it asks for
        return f"not made: {e}"
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(Path(folder), model)
        try:
            # Nothing of the tier's is said here but by the log.
            is_kept = bool(kept.tier and kept.tier._kept)
            return through_the_disk(kept) if is_kept else "in memory"
        finally:
            kept.stop()


def in_a_child(kind: str) -> str:
    """Some types crash MLX on a CPU: phi3small's, with 0.32.4."""
    command = [sys.executable, __file__, "--one", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"FAILED: more than {LIMIT_S} s"
    if done.returncode != 0:
        return f"FAILED: status {done.returncode}: {done.stderr[-500:]}"
    return done.stdout.splitlines()[-1]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(tried(sys.argv[2]))
        return
    counts: Counter[str] = Counter()
    for kind in sys.argv[1:] or model_types.model_types():
        found = in_a_child(kind)
        counts[found.partition(":")[0]] += 1
        print(f"{kind}: {found}", flush=True)
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}: {dict(counts)}")
    sys.exit(bool(counts["NOT EXACT"] or counts["FAILED"]))


if __name__ == "__main__":
    main()
