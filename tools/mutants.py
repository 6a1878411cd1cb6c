"""Changes code in one place at a time and sees whether a test notices.

mutants.py [TARGET ...] [--jobs N] [--only TEXT] [--every N] [--list]

A change that no test notices survives. Survivors stand in mutants_survivors.txt,
each with the reason why it may; the program fails on any other. It works on a copy
of the tree, of which only the target's files are changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = Path(__file__).with_name("mutants_survivors.txt")
# Of a test that passes: one that takes longer has noticed.
TIME_LIMIT_S = 600


@dataclass(frozen=True)
class Target:
    """What is changed, and what is to notice.

    Commands run in the copy, by a shell; one that fails has noticed. ``once`` runs
    before anything is changed, ``check`` after each change.
    """

    files: tuple[str, ...]
    copied: tuple[str, ...]
    check: tuple[str, ...]
    once: tuple[str, ...] = ()
    changes: Callable[[str], Iterator[str]] = field(default=lambda line: iter(()))


CPP_SWAPS = (
    (r"(?<![<>=!-])>=", ">"), (r"(?<![<>=!-])<=", "<"),
    (r"(?<=[\w)\]] )>(?= [\w(])", ">="), (r"(?<=[\w)\]] )<(?= [\w(])", "<="),
    (r"==", "!="), (r"!=", "=="), (r"&&(?! )|&&(?= )", "||"), (r"\|\|", "&&"),
    (r"(?<![\w)])!(?=[\w(*])", ""), (r"\btrue\b", "false"), (r"\bfalse\b", "true"),
    (r"\+ 1\b", "+ 2"), (r"- 1\b", "- 0"), (r"\+\+", "--"), (r"\? 1 : 0", "? 0 : 1"),
    (r"std::min\b", "std::max"), (r"std::max\b", "std::min"),
    (r"\bany_of\b", "all_of"), (r"\bnone_of\b", "any_of"),
    (r"\bcontinue;", "break;"), (r" &= ", " |= "), (r" \|= ", " &= "),
)  # fmt: skip
STATEMENT = re.compile(r"\s+[\w:.>\[\]*&()-]+(\(.*\)| = .*);(\s*//.*)?$")


def cpp_changes(line: str) -> Iterator[str]:
    """The line with one thing about it changed, in each way that there is."""
    code = line.partition("//")[0]
    if not code.strip() or code.lstrip().startswith(("#", "using ", "template")):
        return
    for pattern, other in CPP_SWAPS:
        for match in re.finditer(pattern, code):
            yield line[: match.start()] + other + line[match.end() :]
    if STATEMENT.match(code.rstrip()) and not re.match(
        r"\s+(auto|const|return)\b", code
    ):
        yield re.match(r"\s*", code)[0] + ";"  # type: ignore[index]


UNITS = ("ledger", "self_waits", "skipped_waits")
COMPILE = "g++ -std=c++20 -O0 -pthread -Isrc/cpp -Itests/native -c"
TEST_UNITS = ("ledger_inspector", "plain_objects", "ledger_rules", "ledger_model")

TARGETS = {
    "ledger": Target(
        files=tuple(f"src/cpp/metal/{unit}.cpp" for unit in UNITS),
        copied=("src/cpp", "tests/native"),
        changes=cpp_changes,
        once=tuple(f"{COMPILE} -O2 tests/native/{unit}.cpp" for unit in TEST_UNITS)
        + tuple(f"{COMPILE} src/cpp/metal/{unit}.cpp" for unit in UNITS),
        check=(
            f"{COMPILE} {{file}}",
            f"g++ -pthread {' '.join(f'{u}.o' for u in (*UNITS, *TEST_UNITS[:3]))}"
            " -o rules",
            f"g++ -pthread {' '.join(f'{u}.o' for u in UNITS)} ledger_inspector.o"
            " plain_objects.o ledger_model.o -o model",
            "./rules",
            "./model 1",
        ),
    ),
}


@dataclass(frozen=True)
class Mutant:
    target: str
    file: str
    line: int  # from 0
    before: str
    after: str

    @property
    def text(self) -> str:
        return f"{self.file} | {self.before.strip()} | {self.after.strip()}"


def mutants_of(name: str) -> Iterator[Mutant]:
    target = TARGETS[name]
    for file in target.files:
        for number, line in enumerate((ROOT / file).read_text().splitlines()):
            for changed in target.changes(line):
                if changed != line:
                    yield Mutant(name, file, number, line, changed)


def explained() -> dict[str, str]:
    """Reason by the text of the mutant."""
    found: dict[str, str] = {}
    if not EXPLAINED.exists():
        return found
    reason = ""
    for line in EXPLAINED.read_text().splitlines():
        if line.startswith("# "):
            reason = line[2:]
        elif line.strip():
            found[line.strip()] = reason
    return found


class Copy:
    """A copy of the tree to change and to run in."""

    def __init__(self, name: str) -> None:
        self._target = TARGETS[name]
        self._place = Path(tempfile.mkdtemp(prefix="mutants-"))
        for part in self._target.copied:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            (self._place / part).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / part, self._place / part)
        for command in self._target.once:
            if not self._run(command):
                raise SystemExit(f"this fails without any change: {command}")
        # Of what is not changed; only what is changed is built anew.
        self._built = {p: p.read_bytes() for p in self._place.glob("*.o")}

    def _run(self, command: str) -> bool:
        try:
            done = subprocess.run(
                command,
                shell=True,
                cwd=self._place,
                capture_output=True,
                timeout=TIME_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def survives(self, mutant: Mutant) -> bool:
        path = self._place / mutant.file
        whole = path.read_text()
        lines = whole.splitlines()
        lines[mutant.line] = mutant.after
        path.write_text("\n".join(lines) + "\n")
        commands = [c.format(file=mutant.file) for c in self._target.check]
        try:
            return all(self._run(command) for command in commands)
        finally:
            path.write_text(whole)
            for built, content in self._built.items():
                if built.stem == path.stem:
                    built.write_bytes(content)

    def remove(self) -> None:
        shutil.rmtree(self._place)


def try_all(name: str, mutants: list[Mutant]) -> list[Mutant]:
    copy = Copy(name)
    try:
        survivors = []
        for mutant in mutants:
            if copy.survives(mutant):
                survivors.append(mutant)
                print(f"  survives: {mutant.line + 1}: {mutant.text}", flush=True)
        return survivors
    finally:
        copy.remove()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="mutants with this in their text")
    parser.add_argument("--every", type=int, default=1, help="only each Nth mutant")
    parser.add_argument("--list", action="store_true", help="says them, runs none")
    arguments = parser.parse_args()
    reasons = explained()
    failed = False
    for name in arguments.targets:
        mutants = [m for m in mutants_of(name) if arguments.only in m.text]
        mutants = mutants[:: arguments.every]
        if arguments.list:
            print(*(m.text for m in mutants), sep="\n")
            continue
        shares = [mutants[i :: arguments.jobs] for i in range(arguments.jobs)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = pool.map(try_all, [name] * len(shares), shares)
            survivors = [mutant for share in found for mutant in share]
        unexplained = [m for m in survivors if m.text not in reasons]
        print(
            f"{name}: {len(mutants)} mutants, {len(mutants) - len(survivors)} caught, "
            f"{len(survivors)} survived, {len(unexplained)} of them unexplained"
        )
        for mutant in sorted(unexplained, key=lambda m: (m.file, m.line)):
            print(f"  line {mutant.line + 1}: {mutant.text}")
        failed |= bool(unexplained)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
