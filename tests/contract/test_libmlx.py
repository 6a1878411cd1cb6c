"""What the hooks rely on, read off the real libmlx.dylib of each MLX.

Nothing of it is run: its code is for macOS. `make contract` runs this; the
wheels are kept in the directory CONTRACT_CACHE.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from contract.disassembly import Library, library_of, plain_name
from contract.facts import KNOWN, RECORDED, UNSEEN, Facts
from mlx_safe import _install, _mlx_versions
from support.versions import NEWEST_PAIR, OLDEST_PAIR, READ

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("CONTRACT_CACHE", ROOT / ".cache" / "contract"))
# Built apart for each of these; pip takes the latest that fits. Of the later ones
# one version of each regime is looked at.
SYSTEM, LATER_SYSTEMS = "14_0", ("15_0", "26_0")
BUILDS = [(version, SYSTEM) for version in (*KNOWN, "newest")]
BUILDS += [(v, system) for v in (OLDEST_PAIR[0], "newest") for system in LATER_SYSTEMS]
HOOK = re.compile(r'MLX_SAFE_HOOK\((k\w+), "([^"]+)", \w+, k\w+, (k\w+)\)')

# (kind, selector, need) of each hook.
HOOKS = HOOK.findall((ROOT / "src/cpp/metal/hooks.cpp").read_text())
REQUIRED = [selector for _, selector, need in HOOKS if need == "kRequired"]


@cache
def wheel_of(version: str, system: str) -> Path:
    """The mlx-metal wheel of a version, or of the newest, from the cache."""
    platform = f"macosx_{system}_arm64"
    stored = list(CACHE.glob(f"mlx_metal-{version}-*-{platform}.whl"))
    if stored:
        return stored[0]
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = "mlx-metal" if version == "newest" else f"mlx-metal=={version}"
    report = CACHE / "report.txt"
    command = [sys.executable, "-m", "pip", "download", "--log", str(report)]
    command += ["--platform", platform, "--only-binary=:all:", "--no-deps"]
    command += ["--retries", "10", "--timeout", "60", "--dest", str(CACHE), wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"no {wanted} to be had:\n{done.stderr}"
    name = re.search(rf"mlx_metal-[\w.]+-py3-none-{platform}\.whl", done.stdout)
    assert name is not None, (
        f"{wanted} has no wheel of its own for macOS {system}: see BUILDS\n"
        f"{done.stdout}"
    )
    return CACHE / name[0]


@cache
def library(wheel: Path) -> Library:
    return library_of(wheel)


@pytest.fixture(params=BUILDS, ids="-".join)
def mlx(request: pytest.FixtureRequest) -> tuple[str, Library]:
    """(version, its libmlx.dylib)"""
    wheel = wheel_of(*request.param)
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
    order = _mlx_versions.parse_version
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


def idle(version: str, lib: Library, required: list[str]) -> list[str]:
    """Hooks of which nothing comes: MLX does it in another way now."""
    found = [s for s in required if not users(lib, s)]
    lines = [f"mlx-metal {version} no longer sends {found}: how does it do that now?"]
    return lines if found else []


def unseen(version: str, lib: Library, selectors: dict[str, str]) -> list[str]:
    """What MLX sends and no hook sees."""
    sent = {s: sorted(users(lib, s)) for s in selectors}
    return [
        f"mlx-metal {version} now sends {s} in {by}: {selectors[s]}"
        for s, by in sent.items()
        if by
    ]


def wrong_regime(version: str, lib: Library) -> list[str]:
    handlers = lib.completion_handlers()
    if not handlers:
        return [f"mlx-metal {version}: no completion handler recognised"]
    throwing = sorted({plain_name(f.name) for f in handlers if lib.throws(f)})
    regime = _install._regime("auto", version)
    if regime == ("intercept" if throwing else "observe"):
        return []
    return [
        f"mlx-metal {version}: its completion handlers "
        f"{f'throw ({throwing})' if throwing else 'do not throw'}, "
        f"but _mlx_versions.VERSIONS makes its regime {regime!r}"
    ]


def not_read(newest: str) -> list[str]:
    """Why the newest wheel, by its file name, is none of those that are read."""
    version, system = re.findall(r"mlx_metal-([\w.]+)-.*-macosx_(\w+)_arm64", newest)[0]
    lines = []
    if system not in (SYSTEM, *LATER_SYSTEMS):
        lines.append(f"{newest} is for macOS {system}: read it, too (LATER_SYSTEMS)")
    read = wheel_of("newest", SYSTEM).name.split("-")[1]
    if read != version:
        lines.append(f"the newest for macOS {SYSTEM} is {read}, not {version}")
    return lines


def test_the_newest_of_all_is_read(tmp_path: Path) -> None:
    """Asked for a macOS that is not yet, pip tells of the latest wheel there is."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--platform", "macosx_99_0_arm64", "--only-binary=:all:", "--no-deps"]
    command += ["--retries", "10", "--timeout", "60", "--report", "-"]
    command += ["--target", str(tmp_path), "mlx-metal"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"no mlx-metal to be had:\n{done.stderr}"
    (found,) = json.loads(done.stdout)["install"]
    lines = not_read(found["download_info"]["url"].rpartition("/")[2])
    assert not lines, "\n".join(lines)


def test_a_newest_that_is_not_read_is_told() -> None:
    newer = "mlx_metal-99.1.0-py3-none-macosx_27_0_arm64.whl"
    told = "\n".join(not_read(newer))
    assert "macOS 27_0" in told and "not 99.1.0" in told


def test_the_hooks_are_read_off_their_list() -> None:
    assert len(HOOKS) >= 18 and "commit" in REQUIRED


def test_every_required_hook_is_on_something_that_mlx_sends(
    mlx: tuple[str, Library],
) -> None:
    lines = idle(*mlx, REQUIRED)
    assert not lines, lines[0]


def test_mlx_sends_nothing_that_the_hooks_do_not_see(mlx: tuple[str, Library]) -> None:
    lines = unseen(*mlx, UNSEEN)
    assert not lines, "\n".join(lines)


def test_the_regime_is_that_of_the_completion_handlers(
    mlx: tuple[str, Library],
) -> None:
    lines = wrong_regime(*mlx)
    assert not lines, lines[0]


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


def test_every_version_has_its_facts() -> None:
    assert tuple(KNOWN) == READ


def test_a_change_is_told(mlx: tuple[str, Library]) -> None:
    """The other side: this version's facts as those of one that differs."""
    version, lib = mlx
    intercepts = _install._regime("auto", version) == "intercept"
    other, _ = NEWEST_PAIR if intercepts else OLDEST_PAIR
    told = "\n".join(changes(other, facts_of(lib)))
    assert f"mlx-metal {other} is not as recorded" in told
    assert "throwing completion handlers" in told
    assert "senders of status: new [" in told
    (line,) = wrong_regime(other, lib)
    assert f"mlx-metal {other}: its completion handlers" in line
    (line,) = idle(version, lib, ["commit", "addScheduledHandler:"])
    assert f"{version} no longer sends ['addScheduledHandler:']" in line
    (line,) = unseen(version, lib, {"commit": "a reason"})
    assert f"{version} now sends commit in [" in line and "a reason" in line
