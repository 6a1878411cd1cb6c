"""``mlx-safe kv``: looks after a directory of KV caches, in use or not."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from .._command import CommandError, Parser, path_or_name
from ..memory.sizes import format_size
from .directory import GONE, Directory, Entry, NotOurs, printable
from .format import Damaged, check

__all__ = ["kv"]


def kv(arguments: Sequence[str]) -> int:
    """Runs one of its commands; returns the exit status.

    Raises:
        CommandError: a mistake of the user's, or a directory that is none.
    """
    parser = Parser(
        prog="mlx-safe kv",
        description="Looks after a directory of KV caches, in use or not.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("list", "what is kept, by model"),
        ("check", "read all files; exit status 1 when one is damaged"),
        ("empty", "remove all files; servers that run go on with none"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "directory",
            metavar="DIR",
            type=path_or_name,
            help="the directory of --kv-dir",
        )
    options = parser.parse_args(arguments)
    try:
        directory = Directory(options.directory, make=False)
    except NotOurs as e:
        raise CommandError(str(e)) from e
    try:
        return {"list": _list, "check": _check, "empty": _empty}[options.command](
            directory
        )
    except OSError as e:
        raise CommandError(f"{options.directory}: {e.strerror}") from e
    finally:
        directory.close()


def _list(directory: Directory) -> int:
    by_model: dict[str, list[Entry]] = {}
    for (identity, _), entry in directory.scan().items():
        by_model.setdefault(identity, []).append(entry)
    for identity, entries in sorted(by_model.items()):
        size = format_size(sum(entry.size for entry in entries))
        longest = max(entry.node.end for entry in entries)
        print(
            f"{identity}  {len(entries)} files  {size}  "
            f"texts of up to {longest} tokens  {_name(directory, identity)}"
        )
    total = sum(entry.size for entries in by_model.values() for entry in entries)
    print(f"{format_size(total)} in all")
    return 0


def _name(directory: Directory, identity: str) -> str:
    try:
        found = json.loads(directory.description(identity) or "{}")["name"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "(unknown model)"
    return printable(found)


def _check(directory: Directory) -> int:
    damaged = 0
    entries = directory.scan()
    for (identity, name), entry in sorted(entries.items()):
        try:
            fd = directory.open_node(entry.node)
            try:
                check(fd, entry.node)
            finally:
                os.close(fd)
        except Damaged as e:
            damaged += 1
            print(f"{identity}/{name}: {e}")
        except OSError as e:
            if e.errno in GONE:
                continue  # meanwhile
            damaged += 1
            print(f"{identity}/{name}: {e.strerror}")
    print(f"{len(entries)} files, {damaged} damaged")
    return 1 if damaged else 0


def _empty(directory: Directory) -> int:
    with directory.lock():
        directory.begin_change()
        entries = directory.scan(clean=True)
        for entry in entries.values():
            directory.remove(entry.node)
        directory.begin_change()
    size = format_size(sum(entry.size for entry in entries.values()))
    print(f"removed {len(entries)} files, {size}")
    return 0
