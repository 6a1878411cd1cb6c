"""Damaged images: the loader says one line and ends with status 2, or loads them."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from .runner import LIMIT_S, Machine, load
from .samples import (
    CHAINED_FIXUPS,
    SAMPLES,
    SIGNATURE,
    commands,
    segments,
    signed_again,
    write,
)
from .setup.places import ALL, HERE

COUNT = 2000 if ALL else 120  # of each format
SEED = int(os.environ.get("MACHRUN_SEED", "9"))
BATCH = 250
NUMBERS = (0, 1, 7, 8, 0x7F, 0xFF, 0x4000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class Damage:
    """Changes at random places of an image, outside of its code."""

    def __init__(self, good: bytes, random: random.Random) -> None:
        self.good, self.random = good, random
        (size,) = struct.unpack_from("<I", good, 20)
        _, *data, linkedit = segments(good)
        (signature,) = struct.unpack_from("<I", good, commands(good)[SIGNATURE] + 8)
        self.parts = [
            *[(0, 32 + size)] * 5,
            *[(linkedit[2], signature)] * 5,
            *[(part[2], part[2] + part[3]) for part in data],
            (signature, len(good)),
        ]

    def one(self, raw: bytearray) -> None:
        rng = self.random
        start, end = rng.choice(self.parts)
        at = rng.randrange(start, end - 16)
        way = rng.randrange(6)
        if way == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            raw[at] = rng.randrange(256)
        elif way == 2:
            struct.pack_into("<I", raw, at & ~3, rng.choice(NUMBERS))
        elif way == 3:
            (value,) = struct.unpack_from("<I", raw, at & ~3)
            value = value + rng.choice((-8, -1, 1, 8, 0x4000)) & 0xFFFFFFFF
            struct.pack_into("<I", raw, at & ~3, value)
        elif way == 4:
            source = rng.randrange(start, end - 16)
            raw[at : at + 16] = raw[source : source + 16]
        else:
            length = rng.randrange(1, 16)
            raw[at : at + length] = rng.randbytes(length)

    def image(self) -> bytes:
        raw = bytearray(self.good)
        for _ in range(self.random.randrange(1, 4)):
            self.one(raw)
        # Mostly with right hashes: or nothing but those is looked at.
        if self.random.random() < 0.95:
            raw = bytearray(signed_again(bytes(raw), self.good))
        if self.random.random() < 0.05:
            del raw[self.random.randrange(len(raw)) :]
        return bytes(raw)


def outcomes(files: list[Path]) -> dict[str, tuple[int, str]]:
    done = subprocess.run(
        [HERE / "python", HERE / "guest" / "fuzz.py", *files],
        capture_output=True,
        text=True,
        timeout=10 * LIMIT_S,
        env={**os.environ, **Machine().environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def is_told(status: int, said: str) -> bool:
    """One line; before it may stand what an initialiser said that was aborted."""
    *before, line = said.splitlines() or [""]
    aborted = "Aborted while it was loaded" in line
    return (
        status == 2
        and re.fullmatch(r"machrun: /\S+\.dylib: [^\n]+", line) is not None
        and (not before or aborted)
    )


@pytest.mark.parametrize("fixups", SAMPLES)
def test_the_sample_is_as_it_must_be(fixups: str, tmp_path: Path) -> None:
    done = load(write(tmp_path)[fixups], call=["check"])
    assert (done.returncode, done.stderr) == (0, "")
    chained = CHAINED_FIXUPS in commands(SAMPLES[fixups]())
    assert chained == (fixups == "chained")


@pytest.mark.parametrize("fixups", SAMPLES)
def test_damage_is_told_or_harmless(fixups: str, tmp_path: Path) -> None:
    damage = Damage(SAMPLES[fixups](), random.Random(SEED))
    counts: Counter[str] = Counter()
    wrong = []
    for first in range(0, COUNT, BATCH):
        files = [
            tmp_path / f"{i}.dylib" for i in range(first, min(first + BATCH, COUNT))
        ]
        for file in files:
            file.write_bytes(damage.image())
        for path, (status, said) in outcomes(files).items():
            if status == 0 and said == "":
                counts["loaded"] += 1
            elif is_told(status, said):
                counts["told"] += 1
            else:
                wrong.append((Path(path).name, status, said[:300]))
                continue
            Path(path).unlink()
    print(f"machrun: {fixups}, seed {SEED}: {dict(counts)}")
    assert not wrong, f"seed {SEED}: {wrong}"
    assert counts["told"] > COUNT // 4 and counts["loaded"] > 0
