"""Fetches and builds what is not there yet: python -m machrun.setup."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from . import debian, native, packages, program
from .places import (
    CACHE,
    LOADER,
    MAIN,
    OWN_CACHE,
    PYTHONS,
    QEMU,
    ROOT,
    SetupError,
    run,
)


def fetch() -> None:
    debian.get_all()
    main = PYTHONS[MAIN]
    for version in packages.VERSIONS:
        packages.get_mlx(version, main)
    packages.get_mlx(packages.NEWEST, main)
    for version, system in packages.LATER_SYSTEMS.items():
        packages.get_mlx(version, main, system)
    for python in PYTHONS.values():
        for version in packages.PAIRS:
            packages.get_mlx(version, python)
        packages.get_ours(python)
        if python.from_pypi:
            program.get_program(python)
    for version in packages.PAIRS:
        packages.get_site(version)
    packages.get_model()


def build() -> None:
    native.build_loader()
    native.build_system()
    native.build_cxxrt()
    native.build_metalsim()
    native.build_accelerate()


def imports() -> str:
    """How many names of libSystem and of Python the loader has, of each kind."""
    sysroot = PYTHONS[MAIN].sysroot
    lines = run(QEMU, "-L", sysroot, LOADER, "--imports").splitlines()
    lists = {kind: names for kind, *names in map(str.split, lines)}
    shims = native.shims()
    python = {name for name in shims if name.startswith("Py")}
    return (
        f"libSystem: {len(shims - python)} by shim, {len(lists['alias'])} by alias, "
        f"{len(lists['pass'])} pass through, any other is refused; "
        f"Python's variadic functions: {len(python)} by shim"
    )


def timed(step: Callable[[], None]) -> str:
    start = time.monotonic()
    step()
    return f"{step.__name__} {time.monotonic() - start:.0f} s"


def make_cache() -> None:
    """Whatever lies in it may be deleted later, so it must be ours, or empty."""
    mark = CACHE / "of-machrun"
    is_ours = CACHE == OWN_CACHE or mark.exists() or not CACHE.is_dir()
    if not is_ours and any(CACHE.iterdir()):
        raise SetupError(f"{CACHE}: not empty, and no cache of machrun")
    CACHE.mkdir(parents=True, exist_ok=True)
    mark.touch()


def main() -> int:
    try:
        # Both are in lists of paths.
        if odd := [p for p in (CACHE, ROOT) if ":" in str(p) or "\n" in str(p)]:
            raise SetupError(f"{str(odd[0])!r}: a colon or a newline in a path")
        make_cache()
        # The network is waited for while the compiler computes.
        with ThreadPoolExecutor(2) as pool:
            print("machrun: " + ", ".join(pool.map(timed, (build, fetch))))
        print(f"machrun: {imports()}")
    except (SetupError, OSError) as e:  # as of a full disk
        print(f"machrun: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
