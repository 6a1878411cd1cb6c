"""The archive: names, tags, RECORD, metadata (PEP 427, PEP 491)."""

from __future__ import annotations

import base64
import configparser
import csv
import hashlib
import re
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

NAME = re.compile(
    r"mlx_safe-(?P<version>[^-]+)-(?P<python>cp310-cp310|cp311-cp311|cp312-abi3)-"
    r"(?P<platform>macosx_14_0_arm64|manylinux_2_35_(x86_64|aarch64))\.whl"
)
EXTENSION = {
    "macosx_14_0_arm64": "darwin",
    "manylinux_2_35_x86_64": "x86_64-linux-gnu",
    "manylinux_2_35_aarch64": "aarch64-linux-gnu",
}
SOURCE = Path(__file__).parents[2] / "src"
PACKAGES = ("mlx_safe", "pytest_mlx_safe")
LICENSE = SOURCE.parent / "LICENSE"
PROMISED = {"License-Expression": "MIT", "Requires-Python": ">=3.10"}
ENTRY_POINTS = {
    "console_scripts": {"mlx-safe": "mlx_safe.cli:main"},
    "pytest11": {"mlx_safe": "pytest_mlx_safe"},
}
# Distributions that are needed, by the extra that needs them (None: always).
NEEDED: dict[str | None, set[str]] = {
    None: {"mlx"},
    "server": {"mlx-lm", "prometheus-client", "pydantic", "rich", "tomli"},
    "cli": {"rich"},
    # What MLX computes with on Linux: an extra of its own.
    **{backend: {"mlx"} for backend in ("cpu", "cuda12", "cuda13")},
}
METADATA_FILES = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")


@dataclass(frozen=True)
class Tags:
    """What the file name says: ``cp312-abi3`` and ``macosx_14_0_arm64``."""

    version: str
    python: str
    platform: str

    @classmethod
    def of(cls, file_name: str) -> Tags | None:
        """None when it is not the name of a wheel that we make."""
        match = NAME.fullmatch(file_name)
        return cls(*match.group("version", "python", "platform")) if match else None

    @property
    def extension(self) -> str:
        """Path of the extension module in the wheel."""
        if self.python == "cp312-abi3":
            return "mlx_safe/_core.abi3.so"
        digits = self.python[2:5]
        return f"mlx_safe/_core.cpython-{digits}-{EXTENSION[self.platform]}.so"


def check(archive: zipfile.ZipFile, tags: Tags) -> Iterator[str]:
    """Problems of everything but the machine code.

    Raises:
        UnicodeDecodeError, csv.Error: a text in it is none.
    """
    yield from _names(archive, tags)
    yield from _files(archive, tags)
    yield from _record(archive, tags)
    yield from _metadata(archive, tags)


def _info(tags: Tags) -> str:
    return f"mlx_safe-{tags.version}.dist-info"


def _names(archive: zipfile.ZipFile, tags: Tags) -> Iterator[str]:
    names = archive.namelist()
    if len(names) != len(set(names)):
        yield "a name is there twice"
    known = {f"{_info(tags)}/{name}" for name in METADATA_FILES}
    known |= {tags.extension, *_sources()}
    for name in sorted(known - {*names}):
        yield f"{name} is missing"
    for name in sorted({*names} - known):
        yield f"{name} does not belong here"


def _sources() -> set[str]:
    """What lies in the source tree beside this tool, as it lies in a wheel."""
    return {
        path.relative_to(SOURCE).as_posix()
        for package in PACKAGES
        for path in (SOURCE / package).rglob("*")
        if path.suffix in (".py", ".pyi", ".html") or path.name == "py.typed"
    }


def _files(archive: zipfile.ZipFile, tags: Tags) -> Iterator[str]:
    """Plain files that everybody can read, the sources as they are here."""
    ours = {name: SOURCE / name for name in _sources()}
    ours[f"{_info(tags)}/licenses/LICENSE"] = LICENSE
    for entry in archive.infolist():
        mode = entry.external_attr >> 16
        if not stat.S_ISREG(mode) or mode & 0o444 != 0o444:
            yield f"{entry.filename} is {stat.filemode(mode)}, not a file for all"
        path = ours.get(entry.filename)
        if path is not None and archive.read(entry) != path.read_bytes():
            yield f"{entry.filename} is not what the source tree has"


def _record(archive: zipfile.ZipFile, tags: Tags) -> Iterator[str]:
    record = f"{_info(tags)}/RECORD"
    if record not in archive.namelist():
        return
    rows = {
        row[0]: row[1:]
        for row in csv.reader(archive.read(record).decode().splitlines())
        if row
    }
    for name in archive.namelist():
        if name not in rows:
            yield f"{name} is not in RECORD"
        elif name != record:
            data = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(
                b"="
            )
            if rows[name] != [f"sha256={digest.decode()}", str(len(data))]:
                yield f"{name} is not what RECORD says"
    for name in rows.keys() - {*archive.namelist()}:
        yield f"RECORD names {name}, which is not there"


def _metadata(archive: zipfile.ZipFile, tags: Tags) -> Iterator[str]:
    names = archive.namelist()
    if f"{_info(tags)}/WHEEL" in names:
        wheel = HeaderParser().parsestr(archive.read(f"{_info(tags)}/WHEEL").decode())
        expected = f"{tags.python}-{tags.platform}"
        if wheel.get_all("Tag") != [expected]:
            yield f"WHEEL has the tags {wheel.get_all('Tag')}, the name has {expected}"
        if wheel["Root-Is-Purelib"] != "false":
            yield "WHEEL says that it is pure Python"
    if f"{_info(tags)}/METADATA" in names:
        text = archive.read(f"{_info(tags)}/METADATA").decode()
        metadata = HeaderParser().parsestr(text)
        promised = {"Name": "mlx-safe", "Version": tags.version, **PROMISED}
        for key, value in promised.items():
            if metadata[key] != value:
                yield f"METADATA has the {key} {metadata[key]}, not {value}"
        yield from _needed(metadata.get_all("Requires-Dist", []))
    commands = f"{_info(tags)}/entry_points.txt"
    if commands in names:
        listed = _entry_points(archive.read(commands).decode())
        if listed != ENTRY_POINTS:
            yield "entry_points.txt has not the command mlx-safe and the plugin alone"
    if "mlx_safe/_version.py" in names:
        source = archive.read("mlx_safe/_version.py").decode()
        if f'__version__ = "{tags.version}"' not in source:
            yield f"mlx_safe/_version.py is not of version {tags.version}"


def _entry_points(text: str) -> dict[str, dict[str, str]] | None:
    parser = configparser.ConfigParser(delimiters="=")
    try:
        parser.read_string(text)
    except configparser.Error:
        return None
    return {name: dict(parser[name]) for name in parser.sections()}


def _needed(requirements: list[str]) -> Iterator[str]:
    """PEP 508: ``name[extras]specifiers; markers``."""
    found: dict[str | None, set[str]] = {extra: set() for extra in NEEDED}
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        told = re.search(r"""extra == ["'](\w+)["']""", marker)
        distribution = re.match(r"[\w.-]+", name)
        if distribution is not None:
            found.setdefault(told and told[1], set()).add(distribution[0])
    for extra, names in found.items():
        if names != NEEDED.get(extra):
            yield f"METADATA requires {sorted(names)} for {extra or 'all'}"
