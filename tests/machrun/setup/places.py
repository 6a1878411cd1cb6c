"""Where everything lies; all of it below one directory that may be deleted."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
OWN_CACHE = (ROOT / ".cache" / "machrun").resolve()
CACHE = Path(os.environ.get("MACHRUN_CACHE") or OWN_CACHE).resolve()
HERE = ROOT / "tests" / "machrun"
TOOLS = CACHE / "tools"
QEMU = TOOLS / "usr" / "bin" / "qemu-aarch64-static"
LOADER = CACHE / "machrun"
PRELOADED = CACHE / "machrun.so"  # the same, for a program that it is loaded into
FAILED = CACHE / "failed.txt"
ERROR = re.compile(r"\berror\b|^E: ", re.IGNORECASE)
LIMIT_S = 900
# Also what takes long and adds little.
ALL = os.environ.get("MACHRUN_ALL") == "1"


class SetupError(Exception):
    """What could not be had or built, in one line."""


@dataclass(frozen=True)
class Python:
    """A CPython for aarch64 Linux, and which of our wheels it runs.

    Attributes:
        version: as in the names of Debian's packages.
        suite: Debian's, which has it, or its libraries.
        wheel: the tag of our wheel that macOS's Python of this version takes.
        from_pypi: from packages of PyPI, as setup/program.py has it.
    """

    version: str
    suite: str
    wheel: str
    from_pypi: bool = False

    @property
    def tag(self) -> str:
        return "cp" + self.version.replace(".", "")

    @property
    def sysroot(self) -> Path:
        return CACHE / "sysroot" / (self.version if self.from_pypi else self.suite)

    @property
    def library(self) -> str:
        """Has Python's C API; empty where the program itself has it."""
        return "" if self.from_pypi else f"libpython{self.version}.so.1.0"

    @property
    def program(self) -> Path:
        """What is started: the loader, or the program that it is preloaded into."""
        return CACHE / f"python{self.version}" if self.from_pypi else LOADER

    @property
    def preloaded(self) -> dict[str, str]:
        """What makes qemu load the loader into the program."""
        return {"QEMU_SET_ENV": f"LD_PRELOAD={PRELOADED}"} if self.from_pypi else {}


# What Debian's suites have (bullseye: 3.9; forky also 3.13 and 3.15, for which MLX has
# no wheel), each version from the suite that keeps it. None has 3.10 and 3.12.
PYTHONS = {
    p.version: p
    for p in (
        Python("3.10", "bookworm", "cp310-cp310", from_pypi=True),
        Python("3.11", "bookworm", "cp311-cp311"),
        Python("3.12", "bookworm", "cp312-abi3", from_pypi=True),
        Python("3.13", "trixie", "cp312-abi3"),
        Python("3.14", "forky", "cp312-abi3"),
    )
}
MAIN = "3.11"  # the one that runs every version of MLX


def run(*command: object, limit: float = LIMIT_S, **more: object) -> str:
    """Runs a program; its output, or a SetupError with the line that says why not.

    That is the first that speaks of an error, else the last. All of them are in
    FAILED.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=limit, **more
        )  # type: ignore[call-overload]
    except FileNotFoundError:
        raise SetupError(f"{words[0]} is not installed") from None
    except OSError as e:
        raise SetupError(f"{words[0]}: {e.strerror}: delete it") from None
    except subprocess.TimeoutExpired:
        raise SetupError(f"{words[0]} took more than {limit:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
        lines = said.splitlines()
        why = next((line for line in lines if ERROR.search(line)), lines[-1])
        where = ""
        if len(lines) > 1 and CACHE.is_dir():
            FAILED.write_text(said)
            where = f" (all it said: {FAILED})"
        raise SetupError(f"{Path(words[0]).name} {words[-1]}: {why.strip()}{where}")
    return str(done.stdout)


def digest(parts: Iterable[Path | str]) -> str:
    """Of the contents of files, and of texts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def is_current(target: Path, stamp: str) -> bool:
    """Whether ``target`` was made from what ``stamp`` is the digest of."""
    note = target.with_name(target.name + ".stamp")
    return target.exists() and note.exists() and note.read_text() == stamp


def made(target: Path, stamp: str) -> None:
    target.with_name(target.name + ".stamp").write_text(stamp)


def fresh(directory: Path) -> Path:
    """An empty directory in the place of whatever was there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
