"""Changes code in one place at a time and sees whether a test notices.

mutants.py [TARGET ...] [--jobs N] [--only TEXT] [--part K/N] [--list]

A change that no test notices survives. Survivors stand in mutants_survivors.txt,
each with the reason why it may; the program fails on any other. It works on a copy
of the tree, of which only the target's files are changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import queue
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mutations
from mutations import Change

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = Path(__file__).with_name("mutants_survivors.txt")
# A change may make a program allocate for ever.
MEMORY_MAX = 4 << 30


@dataclass(frozen=True)
class Target:
    """What is changed, and what is to notice.

    Commands run in the copy; one that fails has noticed. ``once`` runs before
    anything is changed, ``check`` after each change; first what notices most.
    """

    files: tuple[str, ...]
    copied: tuple[str, ...]
    changes: Callable[[str], Iterator[Change]]
    check: tuple[str, ...]
    once: tuple[str, ...] = ()


UNITS = ("ledger", "self_waits", "skipped_waits")
COMPILE = "g++ -std=c++20 -pthread -Isrc/cpp -Itests/native -c"
TEST_UNITS = ("ledger_inspector", "plain_objects", "ledger_rules", "ledger_model")


def link(program: str) -> str:
    units = (*UNITS, "ledger_inspector", "plain_objects", program)
    return f"g++ -pthread {' '.join(f'{u}.o' for u in units)} -o {program}"


def tested_by(*names: str) -> tuple[str, ...]:
    """Pytest ends at the first failure, and hypothesis makes no failure smaller."""
    command = f"{sys.executable} -m pytest -p no:cacheprovider -x -q"
    return tuple(f"{command} tests/{name}.py" for name in names)


def of_server(unit: str, *tests: str) -> Target:
    """A module of the server that needs no MLX."""
    return Target(
        files=(f"src/mlx_safe/server/{unit}.py",),
        copied=(
            "src/mlx_safe",
            "pyproject.toml",
            "ARCHITECTURE.md",
            "tests/conftest.py",
            "tests/support",
            "tests/programs",
            *(f"tests/{name}.py" for name in tests),
        ),
        changes=mutations.of_python,
        check=tested_by(*tests),
    )


TARGETS = {
    "ledger": Target(
        files=tuple(f"src/cpp/metal/{unit}.cpp" for unit in UNITS),
        copied=("src/cpp", "tests/native"),
        changes=mutations.of_cpp,
        once=tuple(f"{COMPILE} -O2 tests/native/{unit}.cpp" for unit in TEST_UNITS)
        + tuple(f"{COMPILE} -O2 src/cpp/metal/{unit}.cpp" for unit in UNITS),
        check=(
            f"{COMPILE} -O0 {{file}}",
            link("ledger_rules"),
            "./ledger_rules",
            f"{COMPILE} -O2 {{file}}",
            link("ledger_model"),
            "./ledger_model 1",
        ),
    ),
    "scheduler": of_server("scheduler", "test_scheduler_model", "test_in_flight"),
    "admission": of_server("admission", "test_admission", "test_scheduler_model"),
}


@dataclass(frozen=True)
class Mutant:
    file: str
    change: Change

    @property
    def text(self) -> str:
        """It says which it is, unless a function has the statement twice."""
        change = self.change
        place = f"{self.file}:{change.function}".rstrip(":")
        return f"{place} | {change.before} | {change.after}"


def mutants_of(name: str) -> Iterator[Mutant]:
    target = TARGETS[name]
    for file in target.files:
        for change in target.changes((ROOT / file).read_text()):
            if change.before != change.after:
                yield Mutant(file, change)


def explained() -> dict[str, str]:
    """Reason by the text of the mutant."""
    found: dict[str, str] = {}
    reason = ""
    for line in EXPLAINED.read_text().splitlines():
        if line.startswith("# "):
            reason = line[2:]
        elif line.strip():
            found[line.strip()] = reason
    return found


def native_part() -> Path:
    """The extension of the package that is installed here."""
    found = importlib.util.find_spec("mlx_safe._core")
    if found is None or found.origin is None:
        raise SystemExit("mlx-safe is not installed here: run `make mutants`")
    return Path(found.origin)


class Copy:
    """A copy of the tree to change and to run in.

    Args:
        made: one that is ready, to be copied; None: it is made, and tried out.
    """

    def __init__(self, name: str, made: Copy | None = None) -> None:
        self._target = TARGETS[name]
        self._place = Path(tempfile.mkdtemp(prefix="mutants-"))
        self._limits: list[float]
        if made is None:
            self._make()
        else:
            shutil.copytree(made._place, self._place, dirs_exist_ok=True)
            self._limits = made._limits
        # Of what is not changed; only what is changed is built anew.
        self._built = {p: p.read_bytes() for p in self._place.glob("*.o")}

    def _make(self) -> None:
        for part in self._target.copied:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            (self._place / part).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / part, self._place / part)
        package = self._place / "src" / "mlx_safe"
        if package.exists():
            shutil.copy2(native_part(), package)
        for command in self._target.once:
            self._run_unchanged(command)
        self._limits = [
            3 * self._run_unchanged(command.format(file=self._target.files[0])) + 20
            for command in self._target.check
        ]

    def _run_unchanged(self, command: str) -> float:
        """How many seconds it takes."""
        begin = time.monotonic()
        if not self._run(command, 1000):
            raise SystemExit(f"this fails without any change: {command}")
        return time.monotonic() - begin

    def _run(self, command: str, limit_s: float) -> bool:
        """Whether it succeeds in that time."""
        env = {
            **os.environ,
            "PYTHONPATH": str(self._place / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MLX_SAFE_TEST_PROFILE": "mutants",
        }
        child = subprocess.Popen(
            shlex.split(command),
            cwd=self._place,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return child.wait(limit_s) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def survives(self, mutant: Mutant) -> bool:
        path = self._place / mutant.file
        whole = path.read_text()
        path.write_text(mutant.change.text)
        commands = [c.format(file=mutant.file) for c in self._target.check]
        try:
            return all(map(self._run, commands, self._limits))
        finally:
            path.write_text(whole)
            for built, content in self._built.items():
                if built.stem == path.stem:
                    built.write_bytes(content)

    def remove(self) -> None:
        shutil.rmtree(self._place)


def try_all(name: str, mutants: list[Mutant], jobs: int) -> list[Mutant]:
    """Those of ``mutants`` that survive."""
    copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        first = Copy(name)
        for copy in [first, *(Copy(name, first) for _ in range(jobs - 1))]:
            copies.put(copy)

        def survives(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return copy.survives(mutant)
            finally:
                copies.put(copy)

        survivors = []
        for done, (mutant, survived) in enumerate(
            zip(mutants, pool.map(survives, mutants), strict=True), 1
        ):
            if survived:
                survivors.append(mutant)
                print(f"  survives: {mutant.change.line}: {mutant.text}", flush=True)
            if done % 50 == 0:
                print(f"  {done} of {len(mutants)}", flush=True)
    while not copies.empty():
        copies.get().remove()
    return survivors


def part(text: str) -> slice:
    first, _, step = text.partition("/")
    if not 1 <= int(first) <= int(step or 0):
        raise argparse.ArgumentTypeError("K/N: two numbers, K at most N")
    return slice(int(first) - 1, None, int(step))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="mutants with this in their text")
    parser.add_argument(
        "--part", type=part, default=slice(None), help="K/N: each Nth, from the Kth on"
    )
    parser.add_argument("--list", action="store_true", help="print them, run none")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    reasons = explained()
    failed = False
    for name in arguments.targets:
        mutants = [m for m in mutants_of(name) if arguments.only in m.text]
        mutants = mutants[arguments.part]
        if arguments.list:
            print(*(m.text for m in mutants), sep="\n")
            continue
        survivors = try_all(name, mutants, arguments.jobs)
        unexplained = [m for m in survivors if m.text not in reasons]
        stale = [m for m in mutants if m.text in reasons and m not in survivors]
        print(
            f"{name}: {len(mutants)} mutants, {len(mutants) - len(survivors)} caught, "
            f"{len(survivors)} survived, {len(unexplained)} of them unexplained"
        )
        for mutant in unexplained:
            print(f"  line {mutant.change.line}: {mutant.text}")
        for mutant in stale:
            print(f"  line {mutant.change.line}: explained, and caught: {mutant.text}")
        failed |= bool(unexplained or stale)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
