"""Writes libc++.1.tbd: make_tbd.py WHEEL…

The text stub names what Apple's own linker bound to /usr/lib/libc++.1.dylib in
binaries of others that run on macOS 14 or earlier, so each name is there on
macOS 14. A name that is missing becomes a flat look-up, which
tools/check_wheel.py refuses; then run this with more wheels
(`pip download --no-deps --platform macosx_14_0_arm64 --only-binary=:all: NAME`).
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import lief

LIBRARY = "/usr/lib/libc++.1.dylib"
# Not imported by the binaries below; exported since long before macOS 14
# (LLVM's lib/abi/arm64-apple-darwin…abilist).
KNOWN = {
    "___cxa_current_exception_type",
    "__ZSt13get_terminatev",
    "__ZSt13set_terminatePFvvE",
}
HEAD = """\
--- !tapi-tbd
# Made by make_tbd.py from
{sources}
tbd-version:     4
targets:         [ arm64-macos ]
install-name:    '{library}'
current-version: 1
exports:
  - targets:     [ arm64-macos ]
    symbols:
"""


def imports(raw: bytes) -> Iterator[str]:
    """The names that a Mach-O for macOS 14 or earlier binds to libc++."""
    fat = lief.MachO.parse(raw)
    binary = fat and fat.take(lief.MachO.Header.CPU_TYPE.ARM64)
    if not binary:
        return
    floor = binary.build_version.minos if binary.build_version else [0]
    if list(floor)[:2] > [14, 0]:
        return
    names = [library.name for library in binary.libraries]
    if binary.header.file_type == lief.MachO.Header.FILE_TYPE.DYLIB:
        names = names[1:]  # its own name
    for symbol in binary.imported_symbols:
        ordinal = symbol.library_ordinal
        if 0 < ordinal <= len(names) and names[ordinal - 1] == LIBRARY:
            yield str(symbol.name)


def main() -> None:
    found = set(KNOWN)
    sources = []
    for wheel in sorted(map(Path, sys.argv[1:])):
        sources.append("-".join(wheel.name.split("-")[:2]))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith((".so", ".dylib")):
                    found.update(imports(archive.read(name)))
    text = HEAD.format(
        sources="\n".join(sorted(f"#   {s}" for s in sources)), library=LIBRARY
    )
    text += "".join(f"      - {name}\n" for name in sorted(found)) + "...\n"
    (Path(__file__).parent / "libc++.1.tbd").write_text(text)
    print(f"{len(found)} names")


if __name__ == "__main__":
    main()
