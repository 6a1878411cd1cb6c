"""The directory of the reports: what is in it, what is new, what goes.

A report is ``<seconds since 1970>-<pid>[-<n>].json``. Beside it may stand an empty
marker with the same name and one more suffix. ``.told``: some process has said in its
log that there is a new report. ``.seen``: somebody has looked at it.
Files with other names are not ours: they are neither listed nor touched.

Several processes use the directory at once. There is no lock: each step is one
operation of the file system that one of them wins.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .._paths import ANNOUNCED, SEEN

__all__ = ["KEEP", "KEEP_BYTES", "Entry", "entries", "limits", "mark_seen", "prune"]

# As many as one looks at; a report is some hundred kilobytes at most.
KEEP = 50
KEEP_BYTES = 20 * 10**6
KEEP_VARIABLE = "MLX_SAFE_REPORTS_KEEP"
KEEP_BYTES_VARIABLE = "MLX_SAFE_REPORTS_KEEP_BYTES"

_NAME = re.compile(r"([0-9]{1,18})-([0-9]{1,18})(?:-([0-9]{1,9}))?\.json")
_MARKER = re.compile(rf"({_NAME.pattern})(?:{re.escape(ANNOUNCED)}|{re.escape(SEEN)})")

log = logging.getLogger("mlx_safe")


@dataclass(frozen=True, slots=True)
class Entry:
    """A report in the directory, unread.

    Attributes:
        path: the file. id: its name without ``.json``.
        seconds: Unix time in its name. pid: the process in its name.
        size: bytes.
        announced: some process has said that it is there.
        seen: somebody has looked at it.
    """

    path: Path
    id: str
    seconds: int
    pid: int
    number: int
    size: int
    announced: bool
    seen: bool


def entries(directory: str | os.PathLike[str]) -> list[Entry]:
    """The reports, oldest first; none where there is no directory.

    Raises:
        OSError: the directory cannot be read.
    """
    names = _names(directory)
    listed = []
    for name in names:
        match = _NAME.fullmatch(name)
        path = Path(directory, name)
        if match is None or (size := _size(path)) is None:
            continue
        listed.append(
            Entry(
                path=path,
                id=name.removesuffix(".json"),
                seconds=int(match[1]),
                pid=int(match[2]),
                number=int(match[3] or 1),
                size=size,
                announced=name + ANNOUNCED in names or name + SEEN in names,
                seen=name + SEEN in names,
            )
        )
    return sorted(listed, key=lambda e: (e.seconds, e.pid, e.number))


def _names(directory: str | os.PathLike[str]) -> set[str]:
    try:
        return {path.name for path in Path(directory).iterdir()}
    except FileNotFoundError:
        return set()


def _size(path: Path) -> int | None:
    """None: another process has removed it since it was listed."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return None


def name_for(directory: Path, seconds: int, pid: int) -> Path:
    """A path for a new report whose name is not taken."""
    path = directory / f"{seconds}-{pid}.json"
    number = 2
    while path.exists():
        path = directory / f"{seconds}-{pid}-{number}.json"
        number += 1
    return path


def mark_announced(entry: Entry) -> bool:
    """Whether it is for the caller to tell of it; true for one caller alone."""
    if entry.announced:
        return False
    try:
        _touch(entry, ANNOUNCED)
    except FileExistsError:
        return False
    except OSError as e:
        log.debug("cannot mark %s as announced: %s", entry.path, e)
    return True  # better twice than never


def mark_seen(entry: Entry) -> None:
    """Somebody has looked at it; more than once does no harm."""
    try:
        _touch(entry, SEEN)
    except FileExistsError:
        pass
    except OSError as e:
        log.debug("cannot mark %s as seen: %s", entry.path, e)


def _touch(entry: Entry, suffix: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    os.close(os.open(f"{entry.path}{suffix}", flags, 0o600))


def limits() -> tuple[int, int]:
    """(how many reports are kept, how many bytes of them)."""
    return _limit(KEEP_VARIABLE, KEEP), _limit(KEEP_BYTES_VARIABLE, KEEP_BYTES)


def _limit(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if text.isascii() and text.isdecimal() and len(text) < 19:
        return int(text)
    log.warning(
        "%s must be a whole number, not %r: %d is used", variable, text, default
    )
    return default


def prune(directory: str | os.PathLike[str]) -> list[Entry]:
    """Removes the oldest reports until the rest is within `limits`.

    The newest stays even if it alone is over the bytes, unless the count is 0.
    Markers without a report go, too. Returns what was removed; what cannot be is
    logged.

    Raises:
        OSError: the directory cannot be read.
    """
    keep, keep_bytes = limits()
    # Before the reports: a process that makes one now may mark it at once.
    markers = [m for m in map(_MARKER.fullmatch, _names(directory)) if m is not None]
    listed = entries(directory)
    kept = listed[len(listed) - keep :] if keep < len(listed) else list(listed)
    while len(kept) > 1 and sum(e.size for e in kept) > keep_bytes:
        kept.pop(0)
    gone = listed[: len(listed) - len(kept)]
    removed = [entry for entry in gone if _remove(entry.path)]
    names = {entry.path.name for entry in kept}
    for marker in markers:
        if marker[1] not in names:
            _remove(Path(directory, marker[0]))
    return removed


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False  # another process prunes, too
    except OSError as e:
        log.warning("cannot remove %s: %s", path, e.strerror)
        return False
    return True
