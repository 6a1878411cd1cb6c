"""What libmlx sends to Metal, seen: as it is recorded in tests/metalsim/sent.

The native hosts are held against the same files, by tests/test_metal_sent.py.
`make machrun-table` records anew.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from support import sent
from support.versions import EXECUTED

from .runner import LIMIT_S, Machine
from .setup.places import ALL, HERE


def text_of(version: str) -> str:
    traces: dict[str, list[str]] = {}
    for size in sorted({*sent.WORKLOADS.values()}):
        names = [name for name, fits in sent.WORKLOADS.items() if fits == size]
        done = subprocess.run(
            [HERE / "python", HERE / "guest" / "sent.py", *names],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env={
                **os.environ,
                **Machine(mlx=version).environment,
                "MLX_MAX_OPS_PER_BUFFER": str(size),
            },
            check=False,
        )
        assert done.returncode == 0, done.stderr
        traces.update(json.loads(done.stdout))
    return sent.all_of(lambda name, fault: traces[name][fault])


# Those that a file is named after, and the newest; with MACHRUN_ALL=1 all.
COMPARED = [
    v
    for v in EXECUTED
    if ALL or v == EXECUTED[-1] or (sent.RECORDED / f"{v}.txt").exists()
]


@pytest.mark.parametrize("version", COMPARED)
def test_it_sends_what_is_recorded(version: str, private_reports: object) -> None:
    file = sent.recorded(version)
    found = sent.differences(file.read_text(), text_of(version))
    assert not found, f"{file.name}, and mlx {version}:\n{found}"


def write() -> None:
    """A file for each version that differs from the one before it."""
    for file in sent.RECORDED.glob("*.txt"):
        file.unlink()
    sent.RECORDED.mkdir(exist_ok=True)
    before = ""
    for version in EXECUTED:
        text = text_of(version)
        if text != before:
            (sent.RECORDED / f"{version}.txt").write_text(text)
        before = text


if __name__ == "__main__":
    write()
