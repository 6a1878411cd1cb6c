"""Checks wheels without running them: check_wheel.py WHEEL…

Fails on everything that it does not know: see tools/wheelcheck. With --complete
the wheels must be all that a release has.
"""

from __future__ import annotations

import argparse
import csv
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from elftools.common.exceptions import ELFError
from wheelcheck import archive, elf, macho

# What the readers of object files raise on one that is cut or makes no sense.
DAMAGED = (AttributeError, LookupError, ValueError, ELFError, struct.error)
# The same for an archive: damaged, encrypted, packed in another way, not UTF-8.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,  # NotImplementedError is one
    UnicodeDecodeError,
    csv.Error,
)
PYTHONS = ("cp310-cp310", "cp311-cp311", "cp312-abi3")


def problems(wheel: Path) -> Iterator[str]:
    """What is wrong with a wheel; nothing when it is as it must be."""
    tags = archive.Tags.of(wheel.name)
    if tags is None:
        yield "not the name of a wheel that we make"
        return
    if not wheel.is_file():
        yield "there is no such file"
        return
    if not zipfile.is_zipfile(wheel):
        yield "not a zip archive"
        return
    try:
        with zipfile.ZipFile(wheel) as opened:
            damaged = opened.testzip()
            if damaged is not None:
                yield f"{damaged} is damaged"
                return
            yield from archive.check(opened, tags)
            if tags.extension not in opened.namelist():
                return
            raw = opened.read(tags.extension)
    except UNREADABLE as e:
        yield f"it cannot be read: {type(e).__name__}: {e}"
        return
    try:
        if tags.platform.startswith("macosx"):
            yield from macho.check(raw, tags.python)
        else:
            yield from elf.check(raw, tags.python, tags.platform)
    except DAMAGED as e:
        yield f"{tags.extension} is damaged: {type(e).__name__}: {e}"


def missing(wheels: list[Path]) -> Iterator[str]:
    """The wheels that a release must have and that are not among these."""
    found = [tags for wheel in wheels if (tags := archive.Tags.of(wheel.name))]
    there = {(tags.python, tags.platform) for tags in found}
    for platform in archive.EXTENSION:
        for python in PYTHONS:
            if (python, platform) not in there:
                yield f"no wheel {python}-{platform}"
    if len({tags.version for tags in found}) > 1:
        yield "wheels of more than one version"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--complete", action="store_true")
    arguments = parser.parse_args()
    failed = False
    for wheel in arguments.wheels:
        found = list(problems(wheel))
        failed |= bool(found)
        print(f"{wheel.name}: {'as it must be' if not found else ''}")
        for line in found:
            print(f"  {line}")
    if arguments.complete:
        for line in missing(arguments.wheels):
            failed = True
            print(line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
