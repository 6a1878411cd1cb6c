"""Runs programs in the emulated process: a Python with MLX's and our macOS wheels."""

from __future__ import annotations

import os
import subprocess
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from support.versions import NEWEST_PAIR

from .setup.packages import NEWEST, get_mlx, get_ours, get_site, version_of
from .setup.places import CACHE, HERE, LOADER, MAIN, PYTHONS, QEMU

LIMIT_S = 300
STARTUP = HERE.parent / "support" / "startup"


@dataclass
class Machine:
    """One choice of versions; every process of it is new.

    Attributes:
        mlx: a version, or "newest".
        macos: what is pretended.
        system: for which macOS MLX's wheel is.
        ours: the folder with our package in place of the wheel's own; None: without.
        server: with mlx-lm; only for the mlx of a pair in `support.versions`.
        platform: what Python says it is on: see guest/darwin.py.
    """

    mlx: str = NEWEST_PAIR[0]
    python: str = MAIN
    macos: str = "14.0"
    system: str = "14_0"
    ours: Path | None = field(default_factory=Path)
    server: bool = False
    platform: str = "darwin"

    @property
    def version(self) -> str:
        """MLX's own version."""
        if self.mlx != NEWEST:
            return self.mlx
        return version_of(get_mlx(self.mlx, PYTHONS[self.python], self.system))

    @property
    def environment(self) -> dict[str, str]:
        python = PYTHONS[self.python]
        path = [HERE / "guest", STARTUP, get_mlx(self.mlx, python, self.system)]
        if self.ours is not None:
            path.append(self.ours if self.ours != Path() else get_ours(python))
        if self.server:
            path += get_site(self.mlx)
        return {
            "MACHRUN_MACOS": self.macos,
            "MACHRUN_PLATFORM": self.platform,
            "MACHRUN_PYTHON": python.library,
            "MACHRUN_SYSROOT": str(python.sysroot),
            "MACHRUN_QEMU": str(QEMU),
            "MACHRUN_LOADER": str(python.program),
            **python.preloaded,
            "MACHRUN_EXECUTABLE": str(HERE / "python"),
            "PYTHONHOME": str(python.sysroot / "usr"),
            "PYTHONPATH": ":".join(map(str, path)),
            # Debian's files are compiled when they are installed, ours never. That
            # is slow under emulation, so it is kept even where the host keeps none.
            "PYTHONPYCACHEPREFIX": str(CACHE / "pycache" / python.tag),
            "PYTHONDONTWRITEBYTECODE": "",
            # With it MLX calls a compiler for the CPU's kernels, at run time.
            "MLX_DISABLE_COMPILE": "1",
        }

    def run(
        self, code: str, limit: float = LIMIT_S, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs Python code; never raises for its exit status."""
        return subprocess.run(
            [str(HERE / "python"), "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **self.environment, **more},
            check=False,
        )


def load(
    *files: Path | str,
    macos: str = "14.0",
    call: list[str] | None = None,
    output: IO[str] | int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Loads Mach-O files, and calls a function of the last, `[name, *arguments]`."""
    sysroot = PYTHONS[MAIN].sysroot
    called = [] if call is None else ["--", *call]
    return subprocess.run(
        [str(QEMU), "-L", str(sysroot), str(LOADER), *map(str, files), *called],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
        env={
            **os.environ,
            "MACHRUN_MACOS": macos,
            "MACHRUN_PYTHON": PYTHONS[MAIN].library,
        },
        check=False,
    )
