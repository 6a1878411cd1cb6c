"""One `Report` from a file, whatever is in it."""

from __future__ import annotations

import os
import stat

from ..memory.sizes import format_size
from . import records, recover
from .records import Report, Unreadable

__all__ = ["SIZE_MAX", "parse", "read"]

# A report is some hundred kilobytes; what is bigger is read up to here.
SIZE_MAX = 8 * 10**6


def read(path: str | os.PathLike[str]) -> Report:
    """The report in ``path``: whole, cut, damaged, or none at all.

    What is wrong stands in ``Report.problems``; nothing is raised for it. `Unreadable`
    when nothing could be read. Thread-safe.
    """
    try:
        return parse(_bytes(path))
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        reason = e.strerror if isinstance(e, OSError) else str(e)
        return Unreadable(problems=[f"cannot be read: {reason}"])


def _bytes(path: str | os.PathLike[str]) -> bytes:
    """At most one more than `SIZE_MAX` bytes of a regular file."""
    # Not for ever on a pipe that somebody put there.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("not a file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(SIZE_MAX + 1)
    finally:
        os.close(fd)


def parse(data: bytes) -> Report:
    """The report in ``data``; as `read`."""
    problems = []
    if len(data) > SIZE_MAX:
        data = data[:SIZE_MAX]
        problems.append(f"larger than {format_size(SIZE_MAX)}: only the first are read")
    # A file system that lost power fills the end of a file with zeros.
    kept = data.rstrip(b"\0")
    if len(kept) < len(data):
        problems.append(f"{len(data) - len(kept)} zero bytes at the end")
    if not kept.strip():
        return Report(problems=[*problems, "empty"])
    text = kept.decode("utf-8-sig", errors="replace")
    if "\ufffd" in text and not _is_utf8(kept):
        problems.append("not valid UTF-8: what is not is shown as \ufffd")
    value, wrong = recover.loads(text)
    report = records.decode(value)
    if not report.complete and not report.problems and not problems and not wrong:
        wrong = ["not complete: the writer did not reach the end"]
    report.problems[:0] = problems + wrong
    return report


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
