"""What cannot be set up is one line, and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .setup import packages, places
from .setup.places import MAIN, PYTHONS, ROOT, SetupError


def said_by(*command: str, **more: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT / "tests",
        env={**os.environ, **more},
        check=False,
    )
    return done.returncode, done.stderr or done.stdout.splitlines()[-1] + "\n"


def test_a_place_where_nothing_can_lie(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, said in (
        (f"{tmp_path}/a:b", "a colon or a newline in a path"),
        (f"{tmp_path}/a\nb", "a colon or a newline in a path"),
        (f"{tmp_path}/file", "File exists"),
        (f"{tmp_path}/file/inside", "Not a directory"),
        (f"{tmp_path}/{'x' * 300}", "File name too long"),
        (f"{tmp_path}", "not empty, and no cache of machrun"),
    ):
        status, line = said_by("machrun.setup", MACHRUN_CACHE=place)
        assert status == 2 and line.startswith("machrun: ") and said in line
        assert line.count("\n") == 1, line
    assert (tmp_path / "file").exists()


def test_a_row_that_is_not_there() -> None:
    status, line = said_by("machrun.test_hooks", "0.31.2", "0.99.0")
    assert status == 2 and line.startswith("machrun: no row 0.99.0: there are ")


def test_a_seed_that_is_no_number() -> None:
    status, line = said_by("pytest", "machrun/test_fuzz.py", MACHRUN_SEED="nine")
    assert (status, line) == (2, "Exit: MACHRUN_SEED=nine is no number\n")


def test_wheels_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dist").mkdir()
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    python = PYTHONS[MAIN]
    with pytest.raises(SetupError, match=r"^dist/ has 0 wheels cp311-cp311 for macOS$"):
        packages.get_ours(python)
    wheel = tmp_path / "dist" / f"mlx_safe-9-{python.wheel}-macosx_14_0_arm64.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mlx_safe/a.py", "text " * 1000)
    good = wheel.read_bytes()
    bad = good[:40] + bytes(20) + good[60:]
    for raw in (b"", b"<html>404</html>", good[: len(good) // 2], bad):
        wheel.write_bytes(raw)
        with pytest.raises(SetupError, match=rf"^{wheel}: a damaged wheel: [^\n]+$"):
            packages.get_ours(python)


def test_a_cache_that_was_emptied(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r": 0 of MLX in it: delete it$"):
        packages.version_of(tmp_path)


def test_programs_that_fail(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    for command, said in (
        ([tmp_path / "none"], f"{tmp_path}/none is not installed"),
        ([program], f"{program}: Exec format error: delete it"),
        ([tmp_path], f"{tmp_path}: Permission denied: delete it"),
        (["sh", "-c", "exit 3"], "sh exit 3: status 3"),
        (["sh", "-c", "echo only >&2; exit 1"], "sh echo only >&2; exit 1: only"),
    ):
        with pytest.raises(SetupError) as told:
            places.run(*command)
        assert str(told.value) == said
    lines = r"printf 'a\nb: error: this\nc\n'; false"
    with pytest.raises(SetupError, match=r": b: error: this \(all it said: [^\n]+\)$"):
        places.run("sh", "-c", lines)
    assert places.FAILED.read_text() == "a\nb: error: this\nc"
