"""What each MLX does with a failed command buffer: the table in docs/machrun.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from mlx_safe import _mlx_versions

from .runner import Machine
from .setup.packages import NEWEST, VERSIONS
from .setup.places import ALL, HERE, MAIN, ROOT
from .test_hooks import WHEELS

DOCS = ROOT / "docs" / "machrun.md"
START, END = "<!-- written by tests/machrun -->\n", "<!-- end -->\n"
LIMIT_S = 600
AT_ONCE = 4
WAYS = {"plain": "", "hooks": "hooks", "guard": "hooks, guard"}
Found = dict[str, dict[str, str]]


@cache
def all_found(python: str) -> dict[str, Found]:
    """Of every version; several at a time, as those that hang only wait."""
    machines = [Machine(mlx=version, python=python) for version in VERSIONS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(VERSIONS, pool.map(cases_of, machines), strict=True))


def found(version: str, python: str = MAIN) -> Found:
    return all_found(python)[version]


def cases_of(machine: Machine) -> Found:
    """{how: {case: outcome}}, of one process for each case."""
    done = subprocess.run(
        [str(HERE / "python"), str(HERE / "guest" / "cases.py"), *WAYS],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **machine.environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: Found = json.loads(done.stdout)
    return result


# MLX's handler has let the second queue go on, and is about to store the error, when
# the evaluation looks for one: which is first differs from run to run.
RACES = {
    "0.32.0": "lost or raised",
    **dict.fromkeys(("0.32.1", "0.32.2", "0.32.3", "0.32.4"), "late or raised"),
}


def cells(version: str, how: str, python: str) -> list[str]:
    outcomes = dict(found(version, python)[how])
    both = RACES.get(version, "")
    if how == "plain" and outcomes["two GPU streams"] in both.split(" or "):
        outcomes["two GPU streams"] = both
    return list(outcomes.values())


def rows(version: str, python: str = MAIN) -> list[str]:
    """Its rows of the table."""
    return [
        f"| {version} | {name} | {' | '.join(cells(version, how, python))} |"
        for how, name in WAYS.items()
    ]


def table() -> list[str]:
    heads = list(found(VERSIONS[0])["plain"])
    head = f"| MLX | with | {' | '.join(heads)} |"
    line = "|---" * (len(heads) + 2) + "|"
    return [head, line, *(row for version in VERSIONS for row in rows(version))]


def documented() -> str:
    return DOCS.read_text().split(START)[1].split(END)[0]


def write() -> None:
    """Puts the table into the docs: `make machrun-table`."""
    before, rest = DOCS.read_text().split(START)
    after = rest.split(END)[1]
    DOCS.write_text(f"{before}{START}" + "\n".join(table()) + f"\n{END}{after}")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("python", WHEELS if ALL else [MAIN])
def test_the_table_says_what_each_version_does(
    version: str, python: str, private_reports: Path
) -> None:
    """With each of our wheels; all of them where there is time."""
    text = documented()
    for row in rows(version, python):
        assert row in text, "docs/machrun.md says otherwise: see `make machrun-table`"


@pytest.mark.parametrize("version", VERSIONS)
def test_our_table_of_versions_says_the_same(version: str) -> None:
    """`mlx_safe._mlx_versions`, by which `install` chooses and `doctor` warns."""
    behaviour = _mlx_versions.behaviour_of(version)
    alone = set(found(version)["plain"].values())
    assert (behaviour.raises == "handler") == (alone == {"dies"})
    assert (behaviour.raises == "nothing") == ("lost" in alone)
    assert behaviour.can_hang == ("hangs" in alone)
    dies = "dies" in found(version)["hooks"].values()
    assert dies == ("ends the process, with the hooks" in behaviour.note)


def test_without_hooks_the_intercept_versions_die() -> None:
    """The control: the simulator's faults are MLX's own death."""
    for version in ("0.30.6", "0.31.2"):
        assert set(found(version)["plain"].values()) == {"dies"}


def test_the_newest_is_one_of_the_table() -> None:
    newest = Machine(mlx=NEWEST).version
    assert newest in VERSIONS, (
        f"mlx {newest} is out: add it to EXECUTED_MLX in requirements/versions.mk, "
        "and run `make machrun-table`"
    )


def test_the_message_is_the_one_in_the_readme() -> None:
    done = Machine(mlx="0.31.2", ours=None).run("""
        import machpy, mlx.core as mx
        mx.eval(mx.exp(mx.array([1.0])))
        machpy.fail(1)
        mx.eval(mx.exp(mx.array([1.0])))
    """)
    assert done.returncode == -6
    said = re.search(r"terminating due to uncaught exception of type (.*)", done.stderr)
    assert said is not None and said[1].startswith(
        "std::runtime_error: [METAL] Command buffer execution failed: "
        "Insufficient Memory"
    )


if __name__ == "__main__":
    write()
