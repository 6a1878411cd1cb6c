"""The ad-hoc signature: arm64 Macs kill a process that maps a page that does
not match it (Apple's <kern/cs_blobs.h>)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

LC_CODE_SIGNATURE = 0x1D
SUPER_BLOB, CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02
SHA256 = 2
ADHOC = 0x2


def check(raw: bytes) -> Iterator[str]:
    """Problems of the signature of a Mach-O file for one architecture."""
    found = _find(raw)
    if found is None:
        yield "it is not signed: macOS will not load it"
        return
    offset, size = found
    magic, length, count = struct.unpack_from(">3I", raw, offset)
    if magic != SUPER_BLOB or length > size or offset + size != len(raw):
        yield "its signature is damaged, or something follows it"
        return
    blobs = [struct.unpack_from(">2I", raw, offset + 12 + 8 * i) for i in range(count)]
    directories = [offset + at for kind, at in blobs if kind == 0]
    if len(blobs) != 1 or len(directories) != 1:
        yield f"its signature has the parts {[kind for kind, _ in blobs]}"
        return
    yield from _directory(raw, directories[0], offset)


def _find(raw: bytes) -> tuple[int, int] | None:
    """(offset, size) of the signature."""
    (count,) = struct.unpack_from("<I", raw, 16)
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", raw, at)
        if command == LC_CODE_SIGNATURE:
            offset, length = struct.unpack_from("<2I", raw, at + 8)
            return offset, length
        at += size
    return None


def _directory(raw: bytes, at: int, limit: int) -> Iterator[str]:
    magic, _, _, flags, hashes, _, special, slots, covered = struct.unpack_from(
        ">9I", raw, at
    )
    hash_size, hash_type, _, page_bits = struct.unpack_from(">4B", raw, at + 36)
    if magic != CODE_DIRECTORY or (hash_type, hash_size) != (SHA256, 32):
        yield "its signature is not of SHA-256 hashes"
        return
    if not flags & ADHOC or special:
        yield f"its signature is not a plain ad-hoc one (flags {flags:#x})"
    page = 1 << page_bits
    if covered != limit or slots != -(-covered // page):
        yield f"its signature covers {covered} bytes of {limit}"
        return
    for index in range(slots):
        data = raw[index * page : min((index + 1) * page, covered)]
        start = at + hashes + 32 * index
        if hashlib.sha256(data).digest() != raw[start : start + 32]:
            yield f"page {index} is not what was signed: macOS kills the process"
