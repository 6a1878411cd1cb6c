"""What the hooks rely on, read off the real libmlx.dylib of each MLX.

Nothing of it is run: its code is for macOS. `make contract` runs this; the
wheels are kept in the directory CONTRACT_CACHE.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from contract.disassembly import Library, library_of, plain_name
from contract.facts import KNOWN, RECORDED, UNSEEN, Facts
from mlx_safe import _install

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("CONTRACT_CACHE", ROOT / ".cache" / "contract"))
PLATFORM = ("--platform", "macosx_14_0_arm64", "--only-binary=:all:", "--no-deps")
HOOK = re.compile(r'MLX_SAFE_HOOK\((k\w+), "([^"]+)", \w+, k\w+, (k\w+)\)')

# (kind, selector, need) of each hook.
HOOKS = HOOK.findall((ROOT / "src/cpp/metal/hooks.cpp").read_text())
REQUIRED = [selector for _, selector, need in HOOKS if need == "kRequired"]


@cache
def wheel_of(version: str) -> Path:
    """The mlx-metal wheel of a version, or of the newest, from the cache."""
    stored = list(CACHE.glob(f"mlx_metal-{version}-*.whl"))
    if stored:
        return stored[0]
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = "mlx-metal" if version == "newest" else f"mlx-metal=={version}"
    report = CACHE / "report.txt"
    command = [sys.executable, "-m", "pip", "download", "--log", str(report)]
    command += [*PLATFORM, "--dest", str(CACHE), wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"no {wanted} to be had:\n{done.stderr}"
    name = re.search(r"mlx_metal-[\w.]+-py3-none-macosx_14_0_arm64\.whl", done.stdout)
    assert name is not None, done.stdout
    return CACHE / name[0]


@cache
def library(wheel: Path) -> Library:
    return library_of(wheel)


@pytest.fixture(params=[*KNOWN, "newest"])
def mlx(request: pytest.FixtureRequest) -> tuple[str, Library]:
    """(version, its libmlx.dylib)"""
    wheel = wheel_of(request.param)
    return wheel.name.split("-")[1], library(wheel)


def users(lib: Library, selector: str) -> set[str]:
    """Who sends a selector, in plain names."""
    return {plain_name(name) for name in lib.users(selector)}


def facts_of(lib: Library) -> Facts:
    throwing = {plain_name(f.name) for f in lib.completion_handlers() if lib.throws(f)}
    sent = {s: tuple(sorted(users(lib, s))) for s in RECORDED}
    return Facts(tuple(sorted(throwing)), sent)


def known_facts(version: str) -> tuple[str, Facts]:
    """The facts recorded for a version, or for the last one before it."""
    order = _install.parse_version
    before = [v for v in KNOWN if order(v) <= order(version)]
    last = max(before, key=order)
    return last, KNOWN[last]


def changes(version: str, found: Facts) -> list[str]:
    """What is not as recorded; a line for each change."""
    last, known = known_facts(version)
    compared = {"throwing completion handlers": (known.throws_in, found.throws_in)}
    for selector in RECORDED:
        pair = (known.users[selector], found.users[selector])
        compared[f"senders of {selector}"] = pair
    lines = []
    for what, (was, now) in compared.items():
        new, gone = sorted({*now} - {*was}), sorted({*was} - {*now})
        if new or gone:
            lines.append(f"{what}: new {new}, gone {gone}")
    if lines:
        lines.insert(0, f"mlx-metal {version} is not as recorded for {last}:")
        lines.append("See what it means for src/cpp/metal/hooks.cpp, then record it")
        lines.append(f"in tests/contract/facts.py: {found}")
    return lines


def test_the_hooks_are_read_off_their_list() -> None:
    assert len(HOOKS) >= 18 and "commit" in REQUIRED


def test_every_required_hook_is_on_something_that_mlx_sends(
    mlx: tuple[str, Library],
) -> None:
    version, lib = mlx
    idle = [s for s in REQUIRED if not users(lib, s)]
    assert not idle, (
        f"mlx-metal {version} no longer sends {idle}: how does it do that now?"
    )


def test_mlx_sends_nothing_that_the_hooks_do_not_see(mlx: tuple[str, Library]) -> None:
    version, lib = mlx
    sent = {s: users(lib, s) for s in UNSEEN}
    lines = [f"{s} in {sorted(by)}: {UNSEEN[s]}" for s, by in sent.items() if by]
    assert not lines, f"mlx-metal {version} now sends {lines}"


def test_the_regime_is_that_of_the_completion_handlers(
    mlx: tuple[str, Library],
) -> None:
    version, lib = mlx
    handlers = lib.completion_handlers()
    assert handlers, f"mlx-metal {version}: no completion handler recognised"
    throwing = sorted({plain_name(f.name) for f in handlers if lib.throws(f)})
    regime = _install._regime("auto", version)
    assert regime == ("intercept" if throwing else "observe"), (
        f"mlx-metal {version}: its completion handlers "
        f"{f'throw ({throwing})' if throwing else 'do not throw'}, "
        f"but _install.OBSERVE_SINCE makes its regime {regime!r}"
    )


def test_faults_and_waits_are_where_they_were(mlx: tuple[str, Library]) -> None:
    version, lib = mlx
    lines = changes(version, facts_of(lib))
    assert not lines, "\n".join(lines)


def test_exceptions_come_from_the_systems_runtime(mlx: tuple[str, Library]) -> None:
    """Our wheels bind the same one, so that they are caught by type."""
    version, lib = mlx
    names = [library.name for library in lib.binary.libraries]
    for symbol in ("___cxa_throw", "__ZTISt13runtime_error"):
        found = lib.binary.get_symbol(symbol)
        origin = names[found.library_ordinal]  # its own name is the first
        assert origin == "/usr/lib/libc++.1.dylib", (
            f"mlx-metal {version} takes {symbol} from {origin}"
        )


def test_a_change_is_told(mlx: tuple[str, Library]) -> None:
    """The other side: this version's facts as those of one that differs."""
    version, lib = mlx
    other = "0.32.4" if _install._regime("auto", version) == "intercept" else "0.31.2"
    told = "\n".join(changes(other, facts_of(lib)))
    assert f"mlx-metal {other} is not as recorded" in told
    assert "throwing completion handlers" in told
    assert "senders of status: new [" in told
