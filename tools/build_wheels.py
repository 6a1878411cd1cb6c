"""Builds the wheels from an sdist: build_wheels.py [--available] macos|linux SDIST.

For each target one wheel for CPython 3.10, one for 3.11, and one for every
CPython from 3.12 on (stable ABI), with the compiler and the linkers of `ziglang`
(tools/cross). Nothing that is built is run, so it needs no Mac; what comes out
is held against tools/check_wheel.py.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import ziglang
from cross import elf_stub

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TARGETS = {
    "macos": {"macos-arm64": "macosx-14.0-arm64"},
    "linux": {
        "linux-x86_64": "linux-x86_64",
        "linux-aarch64": "linux-aarch64",
    },
}
# The oldest first; the last one builds for itself and for all that follow.
PYTHONS = ("3.10", "3.11", "3.12")
# What tools/cross/c++ links for; tools/check_wheel.py holds the wheel to it.
LINUX_TAG = "manylinux_2_35"
NEWER = ("3.13", "3.14")  # as good as 3.12: only the stable ABI is used
ZIG = Path(ziglang.__file__).parent / "zig"


class BuildError(Exception):
    """What went wrong, in one line."""


def find_python(version: str) -> str | None:
    """The program of that CPython, with headers: by name, then pyenv's, uv's."""
    major, minor = version.split(".")
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    candidates: list[str | Path | None] = [
        sys.executable,
        shutil.which(f"python{version}"),
        *Path(pyenv).glob(f"versions/{version}.*/bin/python"),
        *Path("/opt/python").glob(f"cp{major}{minor}-cp{major}{minor}/bin/python"),
        *Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python"),
    ]
    probe = (
        "import sys, sysconfig, os; h = sysconfig.get_path('include') + '/Python.h';"
        "print('%d.%d' % sys.version_info[:2] if os.path.exists(h) else '')"
    )
    for candidate in candidates:
        if candidate is None:
            continue
        done = subprocess.run(
            [candidate, "-I", "-c", probe], capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and done.stdout.strip() == version:
            return str(candidate)
    return None


def pythons(available: bool) -> dict[str, str]:
    """The programs to build with, by version; with ``available``, those found."""
    found = {version: find_python(version) for version in PYTHONS}
    if found["3.12"] is None:
        found["3.12"] = next(filter(None, map(find_python, NEWER)), None)
    missing = [version for version, program in found.items() if program is None]
    if missing:
        advice = (
            f"no Python {', '.join(missing)} with headers found; install it "
            "(pyenv install, or uv python install) or put it on the PATH"
        )
        if not available or len(missing) == len(found):
            raise BuildError(advice)
        print(f"build_wheels: left out: {advice}", file=sys.stderr)
    return {version: program for version, program in found.items() if program}


def environment(
    target: str, platform: str, version: str, build: Path
) -> dict[str, str]:
    """What the build back end, CMake and tools/cross/c++ are told."""
    digits = version.replace(".", "")
    suffix = f".cpython-{digits}-darwin.so"
    if target != "macos-arm64":
        suffix = f".cpython-{digits}-{target.removeprefix('linux-')}-linux-gnu.so"
    cache = str(build / "zig")
    return {
        **os.environ,
        "ZIG": str(ZIG),
        "ZIG_GLOBAL_CACHE_DIR": cache,
        "ZIG_LOCAL_CACHE_DIR": cache,
        "CROSS_TARGET": target,
        "CROSS_STUBS": str(build / target),
        "CROSS_CXX_HEADERS": ":".join(cxx_headers()) if "linux" in target else "",
        "CMAKE_ARGS": f"-DCMAKE_TOOLCHAIN_FILE={HERE / 'cross' / 'toolchain.cmake'}",
        "CMAKE_GENERATOR": "Ninja",
        # The wheel's tag and the name of the extension come from these.
        "_PYTHON_HOST_PLATFORM": platform,
        "SETUPTOOLS_EXT_SUFFIX": suffix,
    }


def cxx_headers() -> list[str]:
    """libstdc++'s header directories, as this machine's g++ names them."""
    command = ["g++", "-E", "-x", "c++", "-v", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    listed = said.split("search starts here:")[-1].split("End of search list")[0]
    return [d.strip() for d in listed.splitlines() if "/c++/" in d]


def make_stubs(target: str, build: Path) -> None:
    """ELF stubs of this machine's C++ runtime, for the linker of ``target``."""
    if sysconfig.get_config_var("MACHDEP") != "linux":
        raise BuildError("the wheels for Linux are built on Linux")
    if shutil.which("g++") is None:
        raise BuildError("the wheels for Linux need the headers of g++: install it")
    machine = target.removeprefix("linux-")
    compiler = [str(ZIG), "cc", "-target", f"{machine}-linux-gnu.2.35"]
    for name in ("libstdc++.so.6", "libgcc_s.so.1"):
        found = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        elf_stub.make(compiler, Path(found), build / target / name)


def build_environment(version: str, program: str, build: Path) -> Path:
    """A virtual environment with the build back end, hashes checked."""
    directory = build / f"python-{version}"
    wanted = ROOT / "requirements" / "build.txt"
    python = directory / "bin" / "python"
    # With pip, as all that is installed here: it knows the machine's settings.
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    commands = [[*pip, "install", "--require-hashes", "-r", str(wanted)]]
    if not python.exists():
        commands.insert(0, [program, "-m", "venv", str(directory)])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return python


def build_one(python: Path, source: Path, out: Path, env: dict[str, str]) -> None:
    """One wheel, into ``out``; the compiler's words are in the error."""
    command = [str(python), "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    bin_path = f"{python.parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [*command, str(out), str(source)],
        env={**env, "PATH": bin_path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"{env['CROSS_TARGET']}: {done.stdout}{done.stderr}")


def tag_as_manylinux(out: Path) -> None:
    """Renames the wheels for plain Linux after what they were linked for."""
    retag = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag"]
    for wheel in out.glob("*-linux_*.whl"):
        machine = wheel.stem.partition("-linux_")[2]
        command = [*retag, f"{LINUX_TAG}_{machine}", str(wheel)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def alone(build: Path) -> Iterator[None]:
    """Waits for another build here to end: all use the same tree and environments.

    `make --jobs` runs this for macOS and for Linux at the same time.
    """
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up when the file is closed
        yield


def unpack(sdist: Path, directory: Path) -> Path:
    """The root of the unpacked sdist."""
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with tarfile.open(sdist) as archive:
            archive.extractall(directory)
    except (OSError, tarfile.TarError) as e:
        raise BuildError(f"{sdist} cannot be unpacked: {e}") from e
    return directory / sdist.name.removesuffix(".tar.gz")


def make_all(system: str, sdist: Path, out: Path, build: Path, available: bool) -> None:
    """The wheels of each target and each Python, into ``out``."""
    targets = TARGETS[system]
    if system == "linux":
        for target in targets:
            make_stubs(target, build)
    # One tree for all: each tag has its own build directory in it, and what
    # does not depend on Python is compiled once.
    source = unpack(sdist, build / "source")
    for version, program in pythons(available).items():
        python = build_environment(version, program, build)
        for target, platform in targets.items():
            env = environment(target, platform, version, build)
            build_one(python, source, out.resolve(), env)
    tag_as_manylinux(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("system", choices=sorted(TARGETS))
    parser.add_argument("sdist", type=Path)
    parser.add_argument(
        "--available",
        action="store_true",
        help="only for the Pythons that this machine has, instead of failing",
    )
    parser.add_argument("--out", type=Path, default=Path("dist"))
    arguments = parser.parse_args()
    build = (ROOT / "build" / "wheels").resolve()
    try:
        with alone(build):
            make_all(
                arguments.system,
                arguments.sdist,
                arguments.out,
                build,
                arguments.available,
            )
    except BuildError as e:
        print(f"build_wheels: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
