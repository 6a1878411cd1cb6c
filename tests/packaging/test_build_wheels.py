"""What the builder of the wheels says when it cannot, and that it waits its turn."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import build_wheels
import pytest

ROOT = Path(__file__).parents[2]


def run(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with another PATH; as a user's who has nothing else."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_wheels.py"), *arguments],
        env={"PATH": path, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("linux", "none.tar.gz"), "need the headers of g++"),
        (("macos", "none.tar.gz"), "none.tar.gz cannot be unpacked"),
    ],
)
def test_what_is_missing_is_told_in_one_line(
    arguments: tuple[str, str], complaint: str
) -> None:
    done = run("/nonexistent", *arguments)
    assert done.returncode == 1
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_python_that_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        build_wheels, "find_python", lambda version: "p" if version == "3.13" else None
    )
    with pytest.raises(build_wheels.BuildError, match=r"no Python 3\.10, 3\.11 with"):
        build_wheels.pythons(available=False)
    assert build_wheels.pythons(available=True) == {"3.12": "p"}
    told = capsys.readouterr().err
    assert "left out: no Python 3.10, 3.11" in told and len(told.splitlines()) == 1


def test_two_builds_take_turns(tmp_path: Path) -> None:
    """They share the unpacked sources: the second would delete the first one's."""
    entered = threading.Event()

    def second() -> None:
        with build_wheels.alone(tmp_path):
            entered.set()

    with build_wheels.alone(tmp_path):
        other = threading.Thread(target=second)
        other.start()
        assert not entered.wait(0.3)
    other.join(60)
    assert entered.is_set()
