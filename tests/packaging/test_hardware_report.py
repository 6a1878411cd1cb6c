"""The command that adds to docs/hardware.md, as far as it can run anywhere."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import hardware_report
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("output", "result"),
    [
        ("...\n===== 5 passed in 3.1s =====\n", "5 passed"),
        ("1 passed early\n=== 1 failed, 4 passed in 9s ===\n", "1 failed, 4 passed"),
        ("no tests ran\n", "the tests did not run"),
        ("", "the tests did not run"),
    ],
)
def test_the_result_is_what_pytest_said_last(output: str, result: str) -> None:
    assert hardware_report.result_in(output) == result


def test_a_line_is_added_to_the_table(tmp_path: Path) -> None:
    copy = tmp_path / "hardware.md"
    before = (ROOT / "docs" / "hardware.md").read_text()
    copy.write_text(before)
    hardware_report.add_line(["2027-01-01", "a Mac"], copy)
    assert copy.read_text() == before + "| 2027-01-01 | a Mac |\n"


def test_without_git_it_refuses_before_the_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take minutes, and then the line could not name its commit."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(hardware_report, "ROOT", tmp_path)
    assert "no git checkout" in (hardware_report.why_not() or "")
    (tmp_path / ".git").touch()  # a file in a work tree
    assert hardware_report.why_not() is None


@pytest.mark.skipif(platform.system() == "Darwin", reason="this is a Mac: it reports")
def test_elsewhere_it_refuses_in_one_line() -> None:
    before = (ROOT / "docs" / "hardware.md").read_text()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "hardware_report.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "only a Mac with Apple silicon can report" in done.stderr
    assert (ROOT / "docs" / "hardware.md").read_text() == before
