"""What ``mlx-safe doctor`` holds against each other: machine, files and programs.

Each check returns lines for people: none where there is nothing to look at. A line that
begins with `BAD` is something to do.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from . import _paths
from ._command import CommandError, need_mlx
from ._install import installed_versions
from .memory.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .server.configuration import Settings

__all__ = [
    *("BAD", "ServerFlags", "all_checks", "backend", "built_check", "built_for"),
    *("disk_check", "driver_check", "macos_check", "others_check", "server_of"),
]

BAD = "! "

Version = tuple[int, int]


def all_checks(flags: ServerFlags) -> dict[str, list[str]]:
    """Every check of this machine, by what it is about. Imports MLX."""
    return {
        "built for": built_check(),
        "driver": driver_check(nvidia_driver(), cuda_package()),
        "disk": disk_check(_places()),
        "others": others_check(os.getpid()),
        "defaults": flags.lines(),
    }


# -- macOS ---------------------------------------------------------------------------

# Mach-O's <mach-o/loader.h>: 64 bits, and the command with the oldest macOS.
MACH_O_64 = 0xFEEDFACF
LC_BUILD_VERSION = 0x32
# A metallib's header has no public description. In MLX's own (0.32.4, for macOS 14.0,
# 15.0 and 26.2) bytes 12 to 15 are what libmlx says beside it.
METALLIB = struct.Struct("<4s8xHH")


def built_check() -> list[str]:
    """Whether the installed MLX may run on this macOS. Imports it."""
    import mlx.core as mx

    folder = Path(mx.__file__).parent / "lib"
    found = platform.mac_ver()[0]
    return macos_check(built_for(folder), found, installed_versions("mlx")["mlx"])


def built_for(folder: Path) -> dict[str, Version]:
    """The oldest macOS that MLX's files in ``folder`` say they are for."""
    found = {}
    for name, read in (("libmlx.dylib", _of_library), ("mlx.metallib", _of_metallib)):
        try:
            with (folder / name).open("rb") as file:
                version = read(file.read(1 << 16))
        except OSError:
            continue
        if version is not None:
            found[name] = version
    return found


def _of_library(head: bytes) -> Version | None:
    if len(head) < 32 or struct.unpack_from("<I", head)[0] != MACH_O_64:
        return None
    count, at = struct.unpack_from("<I", head, 16)[0], 32
    for _ in range(count):
        if at + 16 > len(head):
            break
        kind, size = struct.unpack_from("<II", head, at)
        if kind == LC_BUILD_VERSION:
            (oldest,) = struct.unpack_from("<I", head, at + 12)
            return oldest >> 16, oldest >> 8 & 0xFF
        at += max(size, 8)
    return None


def _of_metallib(head: bytes) -> Version | None:
    if len(head) < METALLIB.size:
        return None
    magic, major, minor = METALLIB.unpack_from(head)
    return (major, minor) if magic == b"MTLB" else None


def macos_check(built: Mapping[str, Version], macos: str, mlx: str | None) -> list[str]:
    """Whether MLX's files may run here.

    Args:
        built: as `built_for`. macos: version of this system; "": it is none.
        mlx: version of the installed MLX.
    """
    if not built:
        return []
    files = ", ".join(f"{name} for macOS {_dotted(v)}" for name, v in built.items())
    if not macos:
        return [f"{files}; this is no macOS"]
    here = tuple(int(part) for part in macos.split(".")[:2])
    here = (here[0], here[1] if len(here) > 1 else 0)
    newest = max(built.values())
    if here >= newest:
        return [f"{files}: they fit macOS {macos}"]
    # pip looks at the wheel's tag alone, which says 26.0 for what needs 26.2 (0.32.4).
    older = f"macosx_{min(15, here[0])}_0_arm64"
    return [
        f"{BAD}{files}, and this is macOS {macos}: MLX may not load, or its kernels "
        f"may be missing. Update macOS to {_dotted(newest)}, or take the older wheel: "
        f"pip download --no-deps --only-binary :all: --platform {older} "
        f"mlx-metal=={mlx} && pip install --force-reinstall --no-deps "
        f"mlx_metal-{mlx}-py3-none-{older}.whl"
    ]


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


# -- the card --------------------------------------------------------------------------

# Of NVIDIA's table "CUDA Toolkit and Minimum Required Driver Version" for Linux.
DRIVER_MIN = {"mlx-cuda-12": (525, 60), "mlx-cuda-13": (580, 65)}


def nvidia_driver() -> str | None:
    """Version of NVIDIA's driver, as its own library (NVML) says; None: none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2():
            return None
        text = ctypes.create_string_buffer(96)
        failed = library.nvmlSystemGetDriverVersion(text, len(text))
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return None if failed else text.value.decode(errors="replace")


def cuda_package() -> str | None:
    """Which of MLX's CUDA backends is installed; None: none.

    Each is files in mlx's own folder and metadata, and no package to import.
    """
    for package in DRIVER_MIN:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(package)
            return package
    return None


def driver_check(driver: str | None, package: str | None) -> list[str]:
    """Whether the driver is new enough for the backend that is installed."""
    if package is None:
        return [] if driver is None else [f"NVIDIA {driver}; MLX is for the CPU here"]
    least = ".".join(map(str, DRIVER_MIN[package]))
    if driver is None:
        return [f"{BAD}{package} is installed, and there is no NVIDIA driver"]
    numbers = tuple(int(x) for x in driver.split(".")[:2] if x.isdecimal())
    if numbers < DRIVER_MIN[package]:
        return [f"{BAD}NVIDIA {driver}: {package} needs {least} or later"]
    return [f"NVIDIA {driver}; {package} needs {least} or later"]


def backend(mlx: str | None, metal: str | None) -> tuple[str, list[str]]:
    """What the installed MLX computes with, and what that lacks here. Imports MLX.

    Args:
        mlx: its version; None: there is none. metal: the runtime of `Status`.
    """
    if mlx is None:
        return "none", []  # why there is no MLX is a reason of `Status` already
    package, driver = cuda_package(), nvidia_driver()
    lacks = []
    try:
        need_mlx()
    except CommandError as e:
        lacks = [str(e)]
    if package is None:
        return "CPU" if metal is None else "Metal", lacks
    about = "no NVIDIA driver" if driver is None else f"NVIDIA {driver}"
    bad = [line for line in driver_check(driver, package) if line.startswith(BAD)]
    return f"CUDA ({package}), {about}", lacks or [x.removeprefix(BAD) for x in bad]


# -- disk ------------------------------------------------------------------------------

# A model of a few billion parameters, and some crash reports.
FREE_MIN = 10 * 10**9


def _places() -> dict[str, Path]:
    """Where crash reports go, and models that are downloaded."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME")
    models = Path(cache or Path("~/.cache/huggingface")).expanduser()
    return {"crash reports": Path(_paths.report_dir()), "models of the hub": models}


def _is_seen(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # of somebody else's, or a name that is too long
        return False


def disk_check(places: Mapping[str, Path]) -> list[str]:
    """How much is free where the server writes, one line for each volume."""
    by_volume: dict[int, tuple[list[str], Path]] = {}
    for name, path in places.items():
        there = next(filter(_is_seen, (path, *path.parents)), Path("/"))
        names, _ = by_volume.setdefault(there.stat().st_dev, ([], there))
        names.append(name)
    lines = []
    for names, there in by_volume.values():
        free = shutil.disk_usage(there).free
        bad = BAD if free < FREE_MIN else ""
        lines.append(f"{bad}{format_size(free)} free for {' and '.join(names)}")
    return lines


# -- other servers ---------------------------------------------------------------------

# As a command line begins. Nothing else of it is shown: keys may be in it.
SERVERS = (
    *("mlx-safe serve", "mlx_safe serve", "mlx_lm.server", "mlx_lm server"),
    *("mlx_vlm.server", "vllm-mlx", "mlx-openai-server", "ollama", "llama-server"),
)
SERVERS_APP = "LM Studio.app"
NAMED_MAX = 8


def others_check(own: int) -> list[str]:
    """Programs that share the memory of the GPU, or of the machine, as far as seen.

    Args:
        own: this process, which is none of them.
    """
    found = dict(_of_run_files())
    found.update(_of_processes())
    there = [
        f"{name} (pid {pid})"
        for pid, name in sorted(found.items())
        if pid not in (own, os.getppid())
    ]
    if not there:
        return []
    more = f" and {len(there) - NAMED_MAX} more" if len(there) > NAMED_MAX else ""
    return [
        f"{BAD}{', '.join(there[-NAMED_MAX:])}{more}: all take from one memory, and "
        "none knows what the others hold; give each its --max-active-memory-bytes"
    ]


def _of_run_files() -> list[tuple[int, str]]:
    """Those that mlx-safe protects: each has a file while it lives."""
    folder = Path(_paths.report_dir())
    try:
        files = list(folder.iterdir())
    except OSError:
        return []
    owners = [(file, _paths.owner_of(file.name)) for file in files]
    return [
        (pid, "another program with mlx-safe")
        for file, pid in owners
        if pid is not None and _paths.process_lives(str(file), pid)
    ]


def _of_processes() -> list[tuple[int, str]]:
    try:
        done = subprocess.run(
            ["ps", "-axww", "-o", "pid=,args="],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []  # a container without it
    found = []
    for line in done.stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        name = server_of(command)
        if name is not None and pid.isdecimal():
            found.append((int(pid), name))
    return found


def server_of(command: str) -> str | None:
    """Which of `SERVERS` a command line starts, by itself or with a Python.

    Not one that only names it, such as an editor, a pager or an installer.
    """
    if f"/{SERVERS_APP}/" in command:  # its path has a blank
        return SERVERS_APP
    words = command.split()
    if words and Path(words[0]).name.lower().startswith("python"):
        words = words[1:]
        while words and words[0].startswith("-") and words[0] != "-c":
            words = words[1:]
    begin = " ".join([Path(word).name for word in words[:1]] + words[1:2])
    return next((name for name in SERVERS if f"{begin} ".startswith(f"{name} ")), None)


# -- defaults --------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerFlags:
    """What a server would take of the command line, the environment and a file.

    Attributes:
        settings: None: it would not start, or the library alone is installed.
        error: why it would not start.
        has_config: a file is named on the command line.
    """

    settings: Settings | None = None
    error: str | None = None
    has_config: bool = False

    @classmethod
    def read(cls, words: Sequence[str], environment: Mapping[str, str]) -> ServerFlags:
        """Of flags of ``mlx-safe serve``, and of ``environment``. Raises nothing."""
        has_config = any(word.startswith("--config") for word in words)
        try:
            return cls(_settings(words, environment), has_config=has_config)
        except CommandError as e:
            return cls(error=str(e), has_config=has_config)

    def lines(self) -> list[str]:
        """Whether a server would start, and what it takes from where."""
        if self.error is not None:
            return [f"{BAD}mlx-safe serve would not start: {self.error}"]
        if self.settings is None:
            missing = "packages of the server are missing, which mlx-safe serve names"
            return [f"{BAD}--config is not read: {missing}"] if self.has_config else []
        lines = [
            f"{BAD}{name} in the environment belongs to no flag"
            for name in self.settings.unknown
        ]
        path = self.settings.values.config
        named: dict[str, list[str]] = {} if path is None else {path: []}
        for flag, place in self.settings.sources.items():
            if place not in ("default", "command line") and flag != "config":
                place = path if place == path else "the environment"
                named.setdefault(place, []).append(flag.replace("_", "-"))
        sets = [f"{k} sets {', '.join(v) or 'nothing'}" for k, v in named.items()]
        return lines + sets


def _settings(words: Sequence[str], environment: Mapping[str, str]) -> Settings | None:
    """None where the library alone is installed; `serve` says what is missing.

    Raises:
        CommandError: a server would not start with them.
    """
    try:
        from .server.configuration import resolve
        from .server.flag_checks import check_flags
        from .server.flags import whole_parser
        from .server.mlx_lm.patch import parser_of
        from .server.mlx_lm.requirements import import_server

        parser = whole_parser(parser_of(import_server()))
    except (CommandError, ImportError):
        return None
    settings = resolve(parser, words, environment)
    with settings.with_places():
        check_flags(settings.values, _copy(settings.values))
    return settings


def _copy(values: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(values))
