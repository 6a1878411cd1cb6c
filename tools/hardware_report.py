"""Runs tests/hardware and adds a line to docs/hardware.md; `make hardware-report`.

The line says which machine, macOS, mlx and mlx-lm, what the tests said and of
which commit. It is written whatever they said: a failure is a finding too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "docs" / "hardware.md"


def why_not() -> str | None:
    """Why nothing can be reported from this machine; None if it can."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Darwin", "arm64"):
        return (
            f"this is {system} on {machine}: only a Mac with Apple silicon can report"
        )
    if not (ROOT / ".git").exists():
        return "this is no git checkout: a line tells of which commit it is"
    return None


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def machine() -> str:
    """Model and memory: ``Mac16,10, Apple M4, 16 GB``."""
    read = [output_of("sysctl", "-n", name) for name in MACHINE]
    model, chip, memory = read
    return f"{model}, {chip}, {int(memory) >> 30} GB"


MACHINE = ("hw.model", "machdep.cpu.brand_string", "hw.memsize")


def commit() -> str:
    """Short hash; marked when there are changes that are not in it."""
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no")
    changes = "\n".join(
        line for line in changes.splitlines() if "docs/hardware.md" not in line
    )
    return output_of("git", "rev-parse", "--short", "HEAD") + ("+" if changes else "")


def run_tests() -> str:
    """What pytest says last: ``5 passed``, ``1 failed, 4 passed``."""
    command = [sys.executable, "-m", "pytest", "tests/hardware", "--timeout", "900"]
    done = subprocess.run(
        command,
        env={**os.environ, "MLX_SAFE_TEST_HARDWARE": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    print(done.stdout)
    return result_in(done.stdout)


def result_in(output: str) -> str:
    """pytest's count, of the last line that has one."""
    found = re.findall(r"\d+ (?:passed|failed|error|errors|skipped)\b", output)
    last = output.strip().splitlines()[-1] if output.strip() else ""
    counts = [count for count in found if count in last]
    return ", ".join(counts) if counts else "the tests did not run"


def add_line(cells: list[str], file: Path = LIST) -> None:
    """Appends one row to the table at the end of the file."""
    text = file.read_text().rstrip("\n")
    file.write_text(f"{text}\n| {' | '.join(cells)} |\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machine-check", action="store_true", help="only refuse")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"hardware_report: {reason}", file=sys.stderr)
        return 1
    if arguments.machine_check:
        return 0
    result = run_tests()
    versions = [importlib.metadata.version(name) for name in ("mlx", "mlx-lm")]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    row = [today, machine(), platform.mac_ver()[0], *versions, result, commit()]
    add_line(row)
    print(f"docs/hardware.md: {' | '.join(row)}")
    return int("failed" in result or "error" in result or "passed" not in result)


if __name__ == "__main__":
    sys.exit(main())
