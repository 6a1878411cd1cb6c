"""Installs a wheel as a user would: check_release.py WHEEL... | --installed

Each Python from 3.10 to 3.14 that is on the machine gets a clean environment and pip's
install of the wheel that fits it. Tried are the import, `mlx-safe --version`, and a
fault in a guard. A Python that is missing is named; with ``--complete`` that is a
failure. With ``--installed`` the same is tried of what the Python has that runs this.

Exit status: 0; 1: something did not work, or no wheel was tried at all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A fault inside a guard is an exception, and the next step works.
FAULT = """
import mlx.core as mx
import mlx_safe
from mlx_safe import testing
mlx_safe.install()
try:
    with mlx_safe.guard():
        mx.eval(mx.ones(3) + 1)
        testing.record_fault(8)
except mlx_safe.errors.MetalOutOfMemoryError:
    print("caught")
assert (mx.ones(2) + 1).tolist() == [2, 2]
"""


def fitting(wheels: list[Path], version: str) -> Path | None:
    """The wheel for that Python on this machine."""
    machine = f"_{platform.machine()}"
    digits = version.replace(".", "")
    for tag in (f"-cp{digits}-cp{digits}-", "-cp312-abi3-"):
        is_abi3 = "abi3" in tag
        if is_abi3 and tuple(map(int, version.split("."))) < (3, 12):
            continue
        for wheel in wheels:
            system = "macosx" if sys.platform == "darwin" else "linux"
            if tag in wheel.name and machine in wheel.name and system in wheel.name:
                return wheel
    return None


def attempt(python: str, wheel: Path, wanted: str) -> None:
    """Raises CalledProcessError, or AssertionError, at the first that does not work."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([python, "-m", "venv", directory], check=True)
        own = f"{directory}/bin"
        extra = "" if sys.platform == "darwin" else "[cpu]"
        pip = [f"{own}/python", "-m", "pip", "install", "--quiet"]
        said = ["--disable-pip-version-check", f"mlx-safe{extra} @ {wheel.as_uri()}"]
        subprocess.run([*pip, *said], check=True)
        use(own, directory, wanted)


def use(own: str, directory: str, wanted: str) -> None:
    """Tries what is installed beside the programs in ``own``; raises as `attempt`."""
    for command, expected in (
        ([f"{own}/python", "-c", "import mlx_safe; print('imported')"], "imported"),
        ([f"{own}/mlx-safe", "--version"], wanted),
        ([f"{own}/python", "-c", FAULT], "caught"),
    ):
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout, done.stdout + done.stderr


def installed() -> int:
    """Tries what this Python has; the exit status."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with tempfile.TemporaryDirectory() as directory:
        try:
            wanted = importlib.metadata.version("mlx-safe")
            use(str(Path(sys.executable).parent), directory, wanted)
        except (AssertionError, OSError, subprocess.SubprocessError, ImportError) as e:
            print(f"check_release: {version}: {e!r}", file=sys.stderr)
            return 1
    print(f"{version}: mlx-safe {wanted} works")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheels", nargs="*", type=lambda name: Path(name).resolve())
    parser.add_argument("--installed", action="store_true", help="what is here")
    parser.add_argument("--complete", action="store_true", help="no Python may miss")
    arguments = parser.parse_args()
    if arguments.installed:
        return installed()
    # It needs what builds the wheels.
    from build_wheels import NEWER, PYTHONS, find_python

    failed, tried = False, 0
    for version in (*PYTHONS, *NEWER):
        python = find_python(version)
        wheel = fitting(arguments.wheels, version)
        if python is None or wheel is None:
            what = f"no Python {version}" if python is None else "no wheel for it"
            print(f"check_release: {version}: NOT TRIED: {what}", file=sys.stderr)
            failed = failed or arguments.complete
            continue
        try:
            attempt(python, wheel, wheel.name.split("-")[1])
        except (AssertionError, subprocess.SubprocessError) as e:
            print(f"check_release: {version}: {wheel.name}: {e}", file=sys.stderr)
            failed = True
        else:
            tried += 1
            print(f"{version}: {wheel.name} works")
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
