"""MLX's wheels for macOS and ours, unpacked; what a server needs besides."""

from __future__ import annotations

import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.versions import EXECUTED as EXECUTED
from support.versions import NEWEST_PAIR as NEWEST_PAIR
from support.versions import PAIRS as PAIRS

from .places import (
    CACHE,
    MAIN,
    PYTHONS,
    ROOT,
    Python,
    SetupError,
    digest,
    fresh,
    is_current,
    made,
    run,
)

VERSIONS = EXECUTED
# Makes the model: any Python with MLX and mlx-lm for this machine.
PYTHON_HERE = ROOT / ".venvs" / "observe" / "bin" / "python"
NEWEST = "newest"
# Built apart for later macOS; one version of each regime.
LATER_SYSTEMS = {min(PAIRS): "15_0", NEWEST: "26_0"}
# mlx.metallib is 150 MB of code for GPUs, which nothing here reads.
LEFT_OUT = (".metallib", ".h", ".metal", ".cmake")


def _pip(*arguments: object) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def download(
    python: Python, platform: str, wanted: list[str], into: Path
) -> list[Path]:
    """The wheels that pip takes for a Python and a platform, alone."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--platform", platform]
    version = ["--python-version", python.version, "--implementation", "cp"]
    _pip("download", *options, *version, "--dest", into, *wanted)
    return sorted(into.glob("*.whl"))


@contextmanager
def opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Its archive; a SetupError that names it where it is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
        raise SetupError(f"{wheel}: a damaged wheel: {e}") from None


def _unpack(wheel: Path, into: Path) -> None:
    with opened(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".metallib"):
                target = into / name  # MLX looks whether it is there
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            elif not name.endswith(LEFT_OUT):
                archive.extract(name, into)


def mlx_directory(version: str, python: Python, system: str = "14_0") -> Path:
    return CACHE / "mlx" / f"{version}-{python.tag}-{system}"


def _is_there(version: str, mark: Path) -> bool:
    """The newest is asked for again after a day."""
    if not mark.exists():
        return False
    return version != NEWEST or time.time() - mark.stat().st_mtime < 24 * 3600


def get_mlx(version: str, python: Python, system: str = "14_0") -> Path:
    """The folder with the unpacked wheels of mlx and mlx-metal for a macOS."""
    place = mlx_directory(version, python, system)
    if not _is_there(version, place / "complete"):
        pin = "" if version == NEWEST else f"=={version}"
        fresh(place)
        wheels = fresh(CACHE / "downloads" / place.name)
        wanted = [f"mlx{pin}", f"mlx-metal{pin}"]
        for wheel in download(python, f"macosx_{system}_arm64", wanted, wheels):
            _unpack(wheel, place)
        shutil.rmtree(wheels)
        (place / "complete").touch()
    return place


def version_of(place: Path) -> str:
    """The version of the mlx that is unpacked there."""
    found = [p.name for p in place.glob("mlx-*.dist-info")]
    if len(found) != 1:
        raise SetupError(f"{place}: {len(found)} of MLX in it: delete it")
    return found[0][len("mlx-") : -len(".dist-info")]


def get_ours(python: Python) -> Path:
    """Our wheel for this Python, as `make macos-wheels` made it, unpacked."""
    found = sorted(ROOT.glob(f"dist/mlx_safe-*-{python.wheel}-macosx_14_0_arm64.whl"))
    if len(found) != 1:
        raise SetupError(f"dist/ has {len(found)} wheels {python.wheel} for macOS")
    place = CACHE / "ours" / python.wheel
    stamp = digest(found)
    if not is_current(place, stamp):
        _unpack(found[0], fresh(place))
        made(place, stamp)
    return place


def _install(place: Path, *wanted: str) -> None:
    """What pip takes on aarch64 Linux, without MLX: it is the one for macOS here."""
    python = PYTHONS[MAIN]
    platforms = [f"--platform=manylinux_2_{n}_aarch64" for n in (17, 28, 34, 35)]
    version = ["--python-version", python.version, "--implementation", "cp"]
    options = ["--quiet", "--no-compile", "--only-binary=:all:", *platforms, *version]
    _pip("install", *options, "--target", fresh(place), *wanted)
    for name in ("mlx", *(p.name for p in place.glob("mlx-*"))):
        shutil.rmtree(place / name, ignore_errors=True)
    (place / "complete").touch()


def get_site(mlx_version: str) -> list[Path]:
    """Folders with mlx-lm and all that the server needs; without MLX itself.

    The dependencies of the newest mlx-lm serve all.
    """
    newest, _ = NEWEST_PAIR
    rest = CACHE / "site" / "dependencies"
    own = ["prometheus-client>=0.20", "pydantic>=2.7", "rich>=13"]
    own += ["pytest>=8", "pytest-timeout>=2.3"]  # for tests/hardware
    wanted = [f"mlx-lm=={PAIRS[newest]}", f"mlx=={newest}", *own]
    if not is_current(rest, " ".join(wanted)):
        _install(rest, *wanted)
        for part in rest.glob("mlx_lm*"):
            shutil.rmtree(part)
        made(rest, " ".join(wanted))
    place = CACHE / "site" / f"mlx-lm-{PAIRS[mlx_version]}"
    if not (place / "complete").exists():
        _install(place, "--no-deps", f"mlx-lm=={PAIRS[mlx_version]}")
    return [place, rest]


def get_model() -> Path:
    """Directory of the tiny random model of the servers."""
    program = ROOT / "tests" / "support" / "tiny_model.py"
    place, stamp = CACHE / "model", digest([program])
    if not is_current(place, stamp):
        run(PYTHON_HERE, program, fresh(place))
        made(place, stamp)
    return place
