"""A library of our own for the loader, in both formats of fixups, signed.

zig's linker writes dyld's opcodes. MLX's libraries have chained fixups, so the same
library is made again with those (<mach-o/fixup-chains.h>), in the room of its symbols.
"""

from __future__ import annotations

import hashlib
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path

import lief

from .setup import native
from .setup.places import CACHE, HERE

SEGMENT, SYMTAB, UUID, SIGNATURE, SOURCE_VERSION = 0x19, 0x2, 0x1B, 0x1D, 0x2A
DYLD_INFO, EXPORTS_TRIE, CHAINED_FIXUPS = 0x80000022, 0x80000033, 0x80000034
PAGE = 0x4000
lief.logging.disable()
WEAK_LOOKUP = 0xFD  # -3 in eight bits


def commands(raw: bytes) -> dict[int, int]:
    """Where the first load command of each kind lies."""
    (count,) = struct.unpack_from("<I", raw, 16)
    found: dict[int, int] = {}
    at = 32
    for _ in range(count):
        kind, size = struct.unpack_from("<2I", raw, at)
        found.setdefault(kind, at)
        at += size
    return found


def changed(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


def signed_again(raw: bytes, good: bytes | None = None) -> bytes:
    """With the hashes of its pages as they are now.

    Args:
        good: says where its signature lies, if ``raw`` may not.
    """
    good = good or raw
    result = bytearray(raw)
    offset, _ = struct.unpack_from("<2I", good, commands(good)[SIGNATURE] + 8)
    at = offset + struct.unpack_from(">I", good, offset + 16)[0]
    hashes, _, _, slots, covered = struct.unpack_from(">5I", good, at + 16)
    page = 1 << good[at + 39]
    for i in range(slots):
        data = raw[i * page : min((i + 1) * page, covered)]
        start = at + hashes + 32 * i
        result[start : start + 32] = hashlib.sha256(data).digest()
    return bytes(result)


@cache
def with_opcodes() -> bytes:
    """Built from guest/sample.cpp, once."""
    (CACHE / "samples").mkdir(parents=True, exist_ok=True)
    options = [*native.MACOS, "-O1", "-std=c++20", "-fvisibility=hidden"]
    source = HERE / "guest" / "sample.cpp"
    target = CACHE / "samples" / "sample.dylib"
    native.build(target, "/sample.dylib", [(source, options)], native.CXXRT)
    return target.read_bytes()


Bound = tuple[str, int, int]


def _fixups(raw: bytes) -> tuple[dict[int, int], dict[int, Bound]]:
    """{address: target} in the image, {address: (name, library, addend)} outside."""
    fat = lief.MachO.parse(raw)
    assert fat is not None
    binary = fat.at(0)
    bound: dict[int, Bound] = {}
    for binding in binary.dyld_info.bindings:
        weak = str(binding.binding_class).endswith("WEAK")
        library = WEAK_LOOKUP if weak else binding.library_ordinal & 0xFF
        if weak or binding.address not in bound:
            name = str(binding.symbol.name)
            bound[binding.address] = (name, library, binding.addend)
    inside = {}
    for relocation in binary.relocations:
        address = relocation.address
        if address not in bound:
            at = address_to_offset(raw, address)
            (inside[address],) = struct.unpack_from("<Q", raw, at)
    return inside, bound


def segments(raw: bytes) -> list[tuple[int, int, int, int]]:
    """(address, size, offset, size in the file) of each."""
    (count,) = struct.unpack_from("<I", raw, 16)
    found, at = [], 32
    for _ in range(count):
        kind, size = struct.unpack_from("<2I", raw, at)
        if kind == SEGMENT:
            found.append(struct.unpack_from("<4Q", raw, at + 24))
        at += size
    return found


def address_to_offset(raw: bytes, address: int) -> int:
    for start, _, offset, size in segments(raw):
        if start <= address < start + size:
            return offset + address - start
    raise AssertionError(f"nothing of the file is at {address:#x}")


@cache
def with_chains() -> bytes:
    """The same library with chained fixups, and a trie of exports."""
    raw = bytearray(with_opcodes())
    inside, bound = _fixups(bytes(raw))
    imports = sorted({(name, library) for name, library, _ in bound.values()})
    base = segments(bytes(raw))[0][0]
    starts = []
    for start, size, offset, _ in segments(bytes(raw)):
        own = sorted(a for a in {*inside, *bound} if start <= a < start + size)
        if not own:
            starts.append(b"")
            continue
        firsts = [0xFFFF] * -(-size // PAGE)
        for address, following in pairwise([*own, 0]):
            page = (address - start) // PAGE
            if firsts[page] == 0xFFFF:
                firsts[page] = (address - start) % PAGE
            same = following > 0 and (following - start) // PAGE == page
            link = (following - address) // 4 << 51 if same else 0
            if address in bound:
                name, library, addend = bound[address]
                value = 1 << 63 | addend << 24 | imports.index((name, library))
            else:
                value = inside[address] - base
            struct.pack_into("<Q", raw, offset + address - start, value | link)
        size = 22 + 2 * len(firsts)
        head = struct.pack("<IHHQIH", size, PAGE, 6, start - base, 0, len(firsts))
        starts.append(head + struct.pack(f"<{len(firsts)}H", *firsts))
    return _with_table(raw, starts, imports)


def _with_table(
    raw: bytearray, starts: list[bytes], imports: list[tuple[str, int]]
) -> bytes:
    """Puts the table in the place of the symbols, and the commands for it."""
    table = struct.pack("<I", len(starts))
    at = 4 + 4 * len(starts)
    for part in starts:
        table += struct.pack("<I", at if part else 0)
        at += -(-len(part) // 8) * 8
    for part in starts:
        table += part + bytes(-len(part) % 8)
    names = b"\0"
    entries = b""
    for name, library in imports:
        entries += struct.pack("<I", library | len(names) << 9)
        names += name.encode() + b"\0"
    at_imports = 32 + len(table)
    at_names = at_imports + len(entries)
    head = (0, 32, at_imports, at_names, len(imports), 1, 0, 0)
    table = struct.pack("<8I", *head) + table + entries + names
    found = commands(bytes(raw))
    symtab, info = found[SYMTAB], found[DYLD_INFO]
    offset, _, strings, strings_size = struct.unpack_from("<4I", raw, symtab + 8)
    # The names lie behind the symbols, and the entries for `dysymtab` between.
    assert offset < strings and len(table) <= strings + strings_size - offset
    raw[offset : offset + len(table)] = table
    struct.pack_into("<4I", raw, symtab + 8, 0, 0, 0, 0)
    exports = struct.unpack_from("<2I", raw, info + 40)
    raw[info : info + 48] = struct.pack(
        "<12I",
        *(CHAINED_FIXUPS, 16, offset, len(table)),
        *(EXPORTS_TRIE, 16, *exports),
        *(SOURCE_VERSION, 16, 0, 0),
    )
    (count,) = struct.unpack_from("<I", raw, 16)
    struct.pack_into("<I", raw, 16, count + 2)
    return signed_again(bytes(raw))


SAMPLES = {"opcodes": with_opcodes, "chained": with_chains}


def write(directory: Path) -> dict[str, Path]:
    found = {name: directory / f"{name}.dylib" for name in SAMPLES}
    for name, path in found.items():
        path.write_bytes(SAMPLES[name]())
    return found
