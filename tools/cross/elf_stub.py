"""Stubs of ELF libraries: what a linker needs to know of them, and no code.

A stub is made from the library of the machine that builds and linked for
another. Names and versions of libstdc++ and libgcc_s are the same on x86-64 and
aarch64; a name that only one of them has is found by tools/check_wheel.py.
"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from elftools.elf.elffile import ELFFile

HIDDEN = 0x8000  # of an entry of .gnu.version: not the default version


def exports(library: Path) -> Iterator[tuple[str, str, str]]:
    """(name, version, "function" or "object") of each default symbol."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        versions = elf.get_section_by_name(".gnu.version")
        defined = elf.get_section_by_name(".gnu.version_d")
        names = {
            version["vd_ndx"]: next(auxiliary).name
            for version, auxiliary in defined.iter_versions()
        }
        symbols = elf.get_section_by_name(".dynsym").iter_symbols()
        for index, symbol in enumerate(symbols):
            version = versions.get_symbol(index)["ndx"]
            if symbol["st_shndx"] == "SHN_UNDEF" or isinstance(version, str):
                continue
            if version & HIDDEN or symbol.name in names.values():
                continue
            data = symbol["st_info"]["type"] in ("STT_OBJECT", "STT_TLS")
            yield symbol.name, names[version], "object" if data else "function"


def make(compiler: Sequence[str], library: Path, stub: Path) -> None:
    """Writes ``stub``, which exports what ``library`` does.

    Args:
        compiler: the command that compiles C for the target.
        library: the library of this machine; its file name is the soname.
        stub: where to write; its directory is made.
    """
    by_version: dict[str, list[str]] = defaultdict(list)
    lines = [".text"]
    for name, version, kind in exports(library):
        by_version[version].append(name)
        lines += [f".globl {name}", f".type {name}, %{kind}", f"{name}: .quad 0"]
    stub.parent.mkdir(parents=True, exist_ok=True)
    source, script = stub.with_suffix(".s"), stub.with_suffix(".map")
    source.write_text("\n".join(lines) + "\n")
    script.write_text(
        "".join(
            f"{version} {{ {' '.join(f'{n};' for n in names)} }};\n"
            for version, names in by_version.items()
        )
    )
    link = ["-shared", "-nostdlib", f"-Wl,-soname,{library.name}"]
    command = [*compiler, *link, f"-Wl,--version-script={script}", str(source)]
    subprocess.run([*command, "-o", str(stub)], check=True)
