"""What a file of the store holds, and how it is read without trusting it.

::

    0   8   magic          8  4  version (1)      12  4  length of the header
    16  32  SHA-256 of the header
    48      header: JSON
            the node's tokens, 4 bytes each
            the pieces, one after another, in the header's order

Numbers are little-endian. The header has the length and the SHA-256 of each piece.

SHA-256 is the standard library's, and the processors that MLX runs on compute it in
hardware. One core of the machine this was written on does 1.8 GB/s. blake2b does 0.9.
crc32 does 4.2, but finds damage only, not two different contents.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

__all__ = [
    "BLOCK",
    "BLOCK_TOKENS",
    "HEADER_MAX",
    "ROOT",
    "SNAPSHOT",
    "Damaged",
    "Node",
    "chain",
    "check",
    "decode",
    "encode",
]

BLOCK_TOKENS = 256
BLOCK, SNAPSHOT = "b", "s"
ROOT = "0" * 32  # the parent of the first block

MAGIC = b"mlxskv\r\n"  # a transfer that changes ends of lines is noticed
VERSION = 1
_FIXED = struct.Struct("<8sII32s")
HEADER_MAX = 4 << 20
TOKEN_MAX = 1 << 31  # more is no token: mlx-lm keys images with 60 bits


class Damaged(Exception):
    """The file is not what it should be; the message says in which way."""


def packed(tokens: Sequence[int]) -> bytes:
    """``tokens``, 4 bytes each.

    Raises:
        OverflowError, TypeError: one of them is none.
    """
    made = array("I", tokens)
    if struct.pack("<I", 1) != struct.pack("=I", 1):
        made.byteswap()
    return made.tobytes()


def _key(identity: str, parent: str, kind: str, tokens: bytes) -> str:
    head = f"{VERSION} {identity} {parent} {kind} ".encode()
    return sha256(head + tokens).hexdigest()[:32]


def chain(identity: str, tokens: Sequence[int]) -> list[str]:
    """The keys of the full blocks of ``tokens``, one after another."""
    data = packed(tokens)
    size = 4 * BLOCK_TOKENS
    keys, parent = [], ROOT
    for start in range(0, len(data) - size + 1, size):
        parent = _key(identity, parent, BLOCK, data[start : start + size])
        keys.append(parent)
    return keys


@dataclass(frozen=True)
class Node:
    """One file: what it is of, without what is in it.

    Attributes:
        identity: of the model (`identity.Identity.digest`). parent: the key of the
            block before it, or `ROOT`.
        start: how many tokens come before its own slots. end: how many it reaches to.
        key: names it; made of all of these and its tokens.
    """

    identity: str
    kind: str
    parent: str
    start: int
    end: int
    key: str

    @classmethod
    def block(cls, identity: str, keys: Sequence[str], index: int) -> Node:
        """The block ``index`` of the chain ``keys``."""
        start = index * BLOCK_TOKENS
        parent = keys[index - 1] if index else ROOT
        end = start + BLOCK_TOKENS
        return cls(identity, BLOCK, parent, start, end, keys[index])

    @classmethod
    def snapshot(
        cls, identity: str, keys: Sequence[str], tokens: Sequence[int]
    ) -> Node:
        """The snapshot after ``tokens``, whose full blocks are ``keys``."""
        full = len(tokens) // BLOCK_TOKENS
        parent = keys[full - 1] if full else ROOT
        start = full * BLOCK_TOKENS
        key = _key(identity, parent, SNAPSHOT, packed(tokens[start:]))
        return cls(identity, SNAPSHOT, parent, start, len(tokens), key)

    @property
    def name(self) -> str:
        """The file's, in the directory of its identity."""
        return f"{self.kind}-{self.start}-{self.end}-{self.parent}-{self.key}.kv"

    def own_tokens(self, tokens: Sequence[int]) -> bytes:
        """What the file keeps of ``tokens``, to be compared.

        A block its own; a snapshot all, as there may be no blocks beside it.
        """
        start = self.start if self.kind == BLOCK else 0
        return packed(tokens[start : self.end])


def encode(
    node: Node, tokens: Sequence[int], pieces: Sequence[Any], about: Any
) -> list[Any]:
    """The file's content, as buffers to be written one after another.

    Args:
        tokens: the whole text up to the node's end, or further.
        pieces: contiguous buffers of bytes. about: JSON-able, for who makes arrays
            of them.
    """
    own = node.own_tokens(tokens)
    header = {
        "identity": node.identity,
        "kind": node.kind,
        "parent": node.parent,
        "start": node.start,
        "end": node.end,
        "key": node.key,
        "tokens": sha256(own).hexdigest(),
        "pieces": [[memoryview(p).nbytes, sha256(p).hexdigest()] for p in pieces],
        "about": about,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > HEADER_MAX:
        raise ValueError("too many pieces for one file")
    fixed = _FIXED.pack(MAGIC, VERSION, len(text), sha256(text).digest())
    return [fixed + text, own, *pieces]


def decode(
    fd: int,
    node: Node,
    tokens: Sequence[int],
    most: int,
    read: Callable[[int, int], bytes] = os.read,
) -> tuple[Any, list[bytes]]:
    """What the file holds; nothing of it is given out unless all of it is right.

    Args:
        fd: open for reading, at its start.
        node, tokens: what it should be of.
        most: bytes that it may have.

    Returns ``about`` and the pieces that `encode` was given.

    Raises:
        Damaged: it is not that.
        OSError: it cannot be read.
    """
    if (size := os.fstat(fd).st_size) > most:
        raise Damaged(f"{size} bytes, more than the {most} that it can have")
    own = node.own_tokens(tokens)
    reader = _Reader(fd, size, read)
    about, kept, sizes = _header(reader, node, len(own))
    found = reader.take(len(own))
    if found != own or sha256(own).hexdigest() != kept:
        raise Damaged("other tokens")
    return about, list(_pieces(reader, sizes))


def check(fd: int, node: Node, read: Callable[[int, int], bytes] = os.read) -> None:
    """Reads the file, whose tokens are not known.

    Raises:
        Damaged: it cannot be what its name says.
        OSError: it cannot be read.
    """
    reader = _Reader(fd, os.fstat(fd).st_size, read)
    tokens = node.end - (node.start if node.kind == BLOCK else 0)
    _, kept, sizes = _header(reader, node, 4 * tokens)
    if sha256(reader.take(4 * tokens)).hexdigest() != kept:
        raise Damaged("a checksum does not match")
    for _ in _pieces(reader, sizes):
        pass


def _header(
    reader: _Reader, node: Node, tokens: int
) -> tuple[Any, str, list[tuple[int, str]]]:
    """``about``, the tokens' checksum, and of each piece its size and checksum."""
    size = reader.left
    magic, version, length, digest = _FIXED.unpack(reader.take(_FIXED.size))
    if magic != MAGIC:
        raise Damaged("no file of this format")
    if version != VERSION:
        raise Damaged(f"version {version} of the format")
    if length > min(HEADER_MAX, size):
        raise Damaged("the header is too long")
    text = reader.take(length)
    if sha256(text).digest() != digest:
        raise Damaged("the header's checksum does not match")
    found = _parse(text, node)
    if sum(n for n, _ in found[2]) + tokens != reader.left:
        raise Damaged("the length is not that of its pieces")
    return found


def _pieces(reader: _Reader, sizes: Sequence[tuple[int, str]]) -> Iterator[bytes]:
    for n, expected in sizes:
        piece = reader.take(n)
        if sha256(piece).hexdigest() != expected:
            raise Damaged("a checksum does not match")
        yield piece


def _parse(text: bytes, node: Node) -> tuple[Any, str, list[tuple[int, str]]]:
    try:
        header = json.loads(text)
        named = Node(
            **{f: header[f] for f in ("identity", "kind", "parent", "start", "end")},
            key=header["key"],
        )
        sizes = [(n, digest) for n, digest in header["pieces"]]
        about, kept = header["about"], header["tokens"]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise Damaged(f"the header makes no sense ({type(e).__name__})") from e
    if named != node:
        raise Damaged("of another text or model")
    for n, digest in sizes:
        if type(n) is not int or n < 0 or not isinstance(digest, str):
            raise Damaged("the header makes no sense")
    return about, kept, sizes


class _Reader:
    def __init__(self, fd: int, size: int, read: Callable[[int, int], bytes]) -> None:
        self._fd = fd
        self._read = read
        self.left = size

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise Damaged("it is cut short")
        self.left -= size
        got = self._read(self._fd, size)
        if len(got) == size:
            return got
        parts, missing = [got], size - len(got)
        while missing and parts[-1]:
            parts.append(self._read(self._fd, missing))
            missing -= len(parts[-1])
        if missing:
            raise Damaged("it is cut short")
        return b"".join(parts)
