"""Debian's packages, unpacked below the cache: nothing is installed.

apt-get is given lists, caches and a status of its own, so it can read another
architecture and another suite than this machine's, and the machine stays as it is.
"""

from __future__ import annotations

import plistlib
import re
from pathlib import Path

from .places import CACHE, PYTHONS, QEMU, TOOLS, Python, SetupError, fresh, run

# Of one suite and architecture each; what CPython and NumPy load.
LIBRARIES = {
    "bookworm": ("libssl3", "libffi8", "zlib1g"),
    "trixie": ("libssl3t64", "libffi8", "zlib1g", "libzstd1"),
    "forky": ("libssl3t64", "libffi8", "zlib1g", "libzstd1"),
}
COMMON = (
    *("libc6", "libgcc-s1", "libstdc++6", "libexpat1", "libbz2-1.0", "liblzma5"),
    *("libsqlite3-0", "libuuid1", "libcrypt1"),
)
# What qemu finds where a program asks for it by its absolute path.
SYSTEM_VERSION = Path("System/Library/CoreServices/SystemVersion.plist")
MACOS = {"ProductName": "macOS", "ProductVersion": "14.0", "ProductBuildVersion": "0A0"}
SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))


def _sources(suite: str) -> str:
    """This machine's own sources of Debian, for another suite; one-line or deb822."""
    own = re.search(
        r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.M
    )
    if own is None:
        raise SetupError("no Debian here: its packages for arm64 are needed")
    files = [f for s in SOURCES for f in ([s] if s.is_file() else sorted(s.glob("*")))]
    kept = []
    for file in files:
        for part in re.split(r"\n\s*\n", file.read_text()):
            lines = [x for x in part.splitlines() if not x.startswith("#")]
            text = "\n".join(x for x in lines if not x.startswith("Architectures:"))
            if "debian" in text and re.search(rf"\b{own[1]}\b", text):
                kept.append(re.sub(rf"\b{own[1]}\b", suite, text))
    if not kept:
        raise SetupError("apt has no sources of Debian: its arm64 packages are needed")
    return "\n\n".join(kept) + "\n"


def _apt(suite: str, architecture: str) -> list[str]:
    """apt-get with a world of its own, whose lists are fetched at its first use."""
    place = CACHE / "apt" / f"{suite}-{architecture}"
    command = ["apt-get", "--quiet"]
    for key, value in {
        "Dir::State": place,
        "Dir::State::status": place / "status",
        "Dir::Cache": place / "cache",
        "Dir::Etc::SourceList": place / "none",
        "Dir::Etc::SourceParts": place / "sources",
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Sandbox::User": "",
        "Acquire::Retries": 5,
    }.items():
        command += ["-o", f"{key}={value}"]
    if not (place / "complete").exists():
        fresh(place)
        for part in ("lists/partial", "cache/archives/partial", "sources"):
            (place / part).mkdir(parents=True)
        (place / "status").touch()
        (place / "none").touch()
        text = _sources(suite)
        kind = "sources" if "URIs:" in text else "list"
        (place / "sources" / f"debian.{kind}").write_text(text)
        run(*command, "update")
        (place / "complete").touch()
    return command


def _unpack(suite: str, architecture: str, names: list[str], into: Path) -> None:
    """Fetches packages by name and unpacks them side by side."""
    downloads = fresh(CACHE / "apt" / "downloads" / into.name)
    run(*_apt(suite, architecture), "download", *names, cwd=downloads)
    fresh(into)
    for package in sorted(downloads.glob("*.deb")):
        run("dpkg-deb", "--extract", package, into)
        package.unlink()


def get_qemu() -> Path:
    """The emulator, statically linked."""
    if not QEMU.exists():
        own = run("dpkg", "--print-architecture").strip()
        _unpack("bookworm", own, ["qemu-user-static"], TOOLS)
        for other in QEMU.parent.glob("qemu-*"):
            if other != QEMU:
                other.unlink()
    return QEMU


def get_sysroot(python: Python) -> Path:
    """A C library and a CPython for aarch64."""
    done = python.sysroot / "complete"
    if not done.exists():
        name = f"python{python.version}"
        parts = [f"lib{name}", f"lib{name}-minimal", f"lib{name}-stdlib"]
        names = [*COMMON, *LIBRARIES[python.suite]]
        names += [] if python.from_pypi else parts
        _unpack(python.suite, "arm64", names, python.sysroot)
        if not (python.sysroot / "lib").exists():  # of Debian 13 another package's
            (python.sysroot / "lib").symlink_to("usr/lib")
        done.touch()
    if not (plist := python.sysroot / SYSTEM_VERSION).exists():
        plist.parent.mkdir(parents=True, exist_ok=True)
        plist.write_bytes(plistlib.dumps(MACOS))
    return python.sysroot


def get_all() -> None:
    get_qemu()
    for python in PYTHONS.values():
        get_sysroot(python)
