"""Behind the fixtures that plan faults."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_safe import testing
from mlx_safe.running.command import environment

INJECT = "MLX_SAFE_INJECT"
CEILING = "MLX_SAFE_INJECT_CEILING"


class Programs:
    """Environments for programs, and what they have written down of their faults."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._logs: list[tuple[Path, str, tuple[str, ...]]] = []
        self._numbers = itertools.count(1)

    def environment(
        self,
        variable: str,
        value: str,
        wanted: tuple[str, ...],
        base: Mapping[str, str] | None,
        protected: bool,
    ) -> dict[str, str]:
        """For a program, and all it starts, that must write each line of ``wanted``."""
        name = f"mlx-safe-{variable.lower()}-{next(self._numbers)}.log"
        log = self._directory / name
        self._logs.append((log, f"{variable}={value}", wanted))
        words = [] if protected else ["unprotected"]
        made = environment(dict(os.environ if base is None else base), words)
        made[variable] = value
        made["MLX_SAFE_INJECT_LOG"] = str(log)
        made["MLX_SAFE_AUTOINSTALL"] = "1" if protected else "0"
        return made

    def unfired(self) -> list[str]:
        """A line for each of them whose faults have not struck."""
        return [
            f"{name}: {self._why_not(log, one)}"
            for log, name, wanted in self._logs
            for one in wanted
            if not any(line.startswith(one) for line in self._events(log))
        ]

    @staticmethod
    def _events(log: Path) -> list[str]:
        """Without the ids of the processes."""
        lines = log.read_text().splitlines() if log.exists() else []
        words = (line.split(" ", 2) for line in lines)
        return [f"{event} {what}" for event, _, what in words]

    def _why_not(self, log: Path, wanted: str) -> str:
        models = [x for x in self._events(log) if x.startswith("attached ")]
        if not models:
            return "the program has loaded no model"
        names = ", ".join(sorted({x.partition(" ")[2] for x in models}))
        lacking = "no generation step was measured"
        if wanted.startswith("fired "):
            lacking = f"{wanted.removeprefix('fired ')} never fired"
        return f"{lacking} in the program, which has loaded {names}"


class Faults:
    """The fixture ``metal_fault``."""

    attach = staticmethod(testing.attach)
    detach = staticmethod(testing.detach)

    def __init__(self, directory: Path) -> None:
        self._programs = Programs(directory)
        self._plans: list[testing.Injection] = []

    def __call__(
        self,
        phase: str = "decode",
        step: int = 1,
        code: int = 8,
        *,
        persistent: bool = False,
        action: str = "raise",
    ) -> testing.Injection:
        """`mlx_safe.testing.inject`, taken back when the test ends."""
        plan = testing.inject(phase, step, code, persistent=persistent, action=action)
        self._plans.append(plan)
        return plan

    def environment(
        self,
        plan: str,
        base: Mapping[str, str] | None = None,
        *,
        protected: bool = True,
    ) -> dict[str, str]:
        """The environment of a program in which ``plan`` strikes.

        The program needs no change, and need not import mlx_safe, which must be
        installed where it runs. That holds for what it starts or executes as well.

        Args:
            plan: as in ``MLX_SAFE_INJECT``: ``"decode:3:8"``.
            base: by default the environment of this process.
            protected: as under ``mlx-safe run``; False: only the fault is there.

        Raises:
            ValueError: ``plan`` cannot be read.
        """
        wanted: list[str] = []
        for one in testing.parse_plan(plan):
            injection = testing.Injection(**one)
            wanted.append(f"fired {injection}")
        return self._programs.environment(INJECT, plan, tuple(wanted), base, protected)

    def end(self) -> list[str]:
        """Takes all plans back; a line for each that has not struck."""
        for plan in self._plans:
            plan.cancel()
        return [
            *(plan.why_not() for plan in self._plans if not plan.fired),
            *self._programs.unfired(),
        ]


class OutOfMemoryAfter:
    """The fixture ``out_of_memory_after``."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __call__(self, n: int, *, persistent: bool = False) -> testing.Injection:
        """``n`` generation steps from now go well, the next one does not."""
        return self._faults("any", n + 1, persistent=persistent)

    def environment(
        self, n: int, base: Mapping[str, str] | None = None, **options: Any
    ) -> dict[str, str]:
        """The same for a program; the options of ``metal_fault.environment``."""
        return self._faults.environment(f"any:{n + 1}:8", base, **options)


class Ceilings:
    """The fixture ``gpu_ceiling``."""

    def __init__(self, directory: Path) -> None:
        self._programs = Programs(directory)
        self._ceilings: list[testing.GPUCeiling] = []

    def __call__(self, size: int | str) -> testing.GPUCeiling:
        """`mlx_safe.testing.gpu_ceiling`, taken back when the test ends."""
        ceiling = testing.gpu_ceiling(size)
        self._ceilings.append(ceiling)
        return ceiling

    def environment(
        self,
        size: int | str,
        base: Mapping[str, str] | None = None,
        *,
        protected: bool = True,
    ) -> dict[str, str]:
        """The environment of a program that has such a GPU; see ``metal_fault``."""
        with testing.gpu_ceiling(size) as ceiling:  # says what is no size
            ceiling.steps = 1
        return self._programs.environment(
            CEILING, str(size), ("measured ",), base, protected
        )

    def end(self) -> list[str]:
        """Takes all ceilings back; a line for each under which no step was run."""
        for ceiling in self._ceilings:
            ceiling.cancel()
        return [
            *(ceiling.why_not() for ceiling in self._ceilings if not ceiling.steps),
            *self._programs.unfired(),
        ]
