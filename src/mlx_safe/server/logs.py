"""The log: one format for every line, from any logger, as text or as JSON.

No text of a prompt or an answer comes into it, at any level. Our own lines have none;
of other libraries' DEBUG lines nothing passes, of mlx-lm's own (0.31 to 0.32: whole
bodies, each piece of text) only what `SAFE` lists. Of an exception come its kind and
the places that it passed, and its message only where no text can be in it. Knows
nothing of MLX: the supervisor logs in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from types import SimpleNamespace, TracebackType
from typing import Any

from .. import _output
from .._command import CommandError

__all__ = [
    *("FORMATS", "LEVELS", "fields", "for_mlx_lm", "of_exception", "refuse"),
    *("set_up", "take_over"),
]

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMATS = ("text", "json")

# How those lines of mlx-lm's server begin that have no text in them and are of use.
SAFE = (
    "Draft model tokenizer does not match",
    "Received tools but model does not support",
)

# An exception whose innermost frame is here has no text in its message. There are only
# numbers by then, or a model is being loaded and there is no text yet.
NUMBERS_ONLY = (
    *("mlx.", "mlx_lm.models.", "mlx_lm.sample_utils", "mlx_lm.utils"),
    *("mlx_safe.memory", "mlx_safe.testing"),
)

_FIELDS = "mlx_safe_fields"
log = logging.getLogger("mlx_safe.server")


def fields(**values: object) -> dict[str, object]:
    """What a line says in figures and names, for ``extra=``; None is left out.

    As text they follow the message, ``name=value``; in JSON each is a member.
    """
    return {_FIELDS: {k: v for k, v in values.items() if v is not None}}


def set_up(
    level: str, form: str, file: str | None = None, name: str | None = None
) -> None:
    """Sends everything that is logged to stderr, or to a file, in one of `FORMATS`.

    Args:
        level: one of `LEVELS`; of other libraries at least INFO.
        file: where lines are appended. Where it was moved away or removed, the next
            line makes it anew: so it can be rotated.
        name: of the process, where two of them write into one log.

    Raises:
        CommandError: the file cannot be written.
    """
    handler = logging.StreamHandler() if file is None else _open(file)
    handler.setFormatter((_Json if form == "json" else _Text)(name, file is None))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(logging.INFO, getattr(logging, level)))
    logging.getLogger("mlx_safe").setLevel(level)
    logging.captureWarnings(True)
    threading.excepthook = _thread_ended
    sys.excepthook = _ended
    sys.unraisablehook = _ignored


def refuse(message: str, form: str) -> None:
    """Nothing is started, for a mistake of the user's: its one line, in ``form``."""
    if form == "json":
        set_up("INFO", form)
        logging.getLogger("mlx_safe.server").error("cannot start: %s", message)
    else:
        _output.complain(_for_journal(f"mlx-safe: {message}", logging.ERROR))


def _open(path: str) -> _File:
    try:
        return _File(path)
    except OSError as e:
        why = f"cannot be written: {e.strerror}"
        raise CommandError(f"--log-file {path}: {why}") from None


class _File(WatchedFileHandler):
    """What cannot be written into the file goes to stderr, and nobody waits for it."""

    def __init__(self, path: str) -> None:
        # Whether the log says so, and whether the line of now could not be written.
        self._is_known = self._failed = False
        super().__init__(path)

    def _open(self) -> TextIOWrapper:
        # A named pipe without a reader, or one that does not read, would be waited for:
        # each thread that logs would, the generation thread as well.
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NONBLOCK, 0o666)

        return open(self.baseFilename, "a", encoding=self.encoding, opener=opener)

    def reopenIfNeeded(self) -> None:
        try:
            super().reopenIfNeeded()
        except OSError:
            # What was moved away, and cannot be completed, keeps its room on the disk.
            stream, self.stream = self.stream, None
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
            raise
        if self.stream is None:
            self.stream = self._open()
            self._statstream()

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        try:
            super().emit(record)
        except OSError:  # it was moved away, and cannot be made anew
            self.handleError(record)
        if self._is_known and not self._failed:
            self._is_known = False
            log.warning("--log-file can be written again; what it lacks is on stderr")

    def handleError(self, record: logging.LogRecord) -> None:
        why = sys.exc_info()[1]
        if not isinstance(why, OSError):
            super().handleError(record)
            return
        if not self._is_known:
            self._is_known = True  # or this line itself would have one
            log.error("--log-file cannot be written, stderr is: %s", why.strerror)
        self._failed = True
        _output.complain(_for_journal(self.format(record), record.levelno))


# Of syslog: ``journalctl -p warning`` looks for them.
PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


def _for_journal(text: str, level: int) -> str:
    """With the priority before each line, where stderr is systemd's journal."""
    if not _is_journal():
        return text
    mark = f"<{PRIORITIES.get(logging.getLevelName(level), 6)}>"
    return "\n".join(mark + line for line in text.split("\n"))


@functools.cache
def _is_journal() -> bool:
    # As systemd.exec(5) has it: a program's own stderr may be another by then.
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


# Three that stand in the place of Python's own words, which quote the exception's
# message and are in no format.


def _ended(
    kind: type[BaseException], exc: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(exc, KeyboardInterrupt):
        sys.__excepthook__(kind, exc, trace)
    else:
        logging.getLogger("mlx_safe.server").critical(
            "the main thread has ended", exc_info=(kind, exc, trace)
        )


def _ignored(args: sys.UnraisableHookArgs) -> None:
    """Of a destructor or a callback, from which nothing can be raised."""
    if args.exc_value is not None:
        whose = getattr(args.object, "__qualname__", type(args.object).__name__)
        logging.getLogger("mlx_safe.server").error(
            "an exception was ignored",
            exc_info=args.exc_value,
            extra=fields(where=whose),
        )


def _thread_ended(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = None if args.thread is None else args.thread.name
        logging.getLogger("mlx_safe.server").error(
            "a thread has ended", exc_info=args.exc_value, extra=fields(thread=name)
        )


def take_over() -> None:
    """Has the lines of libraries that write to stderr themselves come here, once.

    transformers (4, 5) and huggingface_hub (0.30, 1) make handlers when they are
    imported, after `set_up`: without time and level, and no JSON.
    """
    for logger in logging.Logger.manager.loggerDict.values():
        for handler in list(getattr(logger, "handlers", ())):
            if type(handler) is logging.StreamHandler:
                assert isinstance(logger, logging.Logger)
                logger.removeHandler(handler)
                logger.propagate = True


def for_mlx_lm() -> SimpleNamespace:
    """Stands for the module ``logging`` in ``mlx_lm.server``."""
    own = logging.getLogger("mlx_safe.mlx_lm")

    def leave_out(message: object, *args: object, **more: object) -> None:
        pass

    def warning(message: object, *args: object, **more: object) -> None:
        if str(message).startswith(SAFE):
            own.warning("mlx-lm: %s", message)

    quiet = SimpleNamespace(
        **dict.fromkeys(("debug", "info", "error", "exception", "log"), leave_out),
        warning=warning,
        isEnabledFor=lambda level: False,  # or it makes text of each body
    )
    names = {name: getattr(logging, name) for name in LEVELS}
    return SimpleNamespace(
        **{**vars(quiet), **names},
        getLogger=lambda name=None: quiet,
        basicConfig=lambda **_: None,  # `set_up` was here
    )


def of_exception(exc: BaseException) -> str:
    """One line: the kind of ``exc``, and its message where no text can be in it."""
    kind = type(exc).__name__
    text = str(exc).strip()
    if not text or not _is_without_text(exc):
        return kind
    return f"{kind}: {text.splitlines()[0]}"


def _is_without_text(exc: BaseException) -> bool:
    from .. import errors

    if errors.from_exception(exc) is not None or errors.is_allocation_failure(exc):
        return True
    if isinstance(exc, OSError):  # its own words, and a path
        return exc.errno is not None
    last = exc.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else str(last.tb_frame.f_globals.get("__name__", ""))
    return f"{module}.".startswith(NUMBERS_ONLY)


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """``exc`` and what led to it, the first cause first."""
    found: list[BaseException] = []
    one: BaseException | None = exc
    while one is not None and one not in found:
        found.append(one)
        hidden = one.__suppress_context__
        one = one.__cause__ or (None if hidden else one.__context__)
    return reversed(found)


def trace_of(exc: BaseException) -> str:
    """As Python's own traceback, without the messages that may quote a text."""
    return "\n".join(
        "Traceback (most recent call last):\n"
        f"{''.join(traceback.format_tb(one.__traceback__))}{of_exception(one)}"
        for one in _chain(exc)
    )


def _in_one_line(text: str) -> str:
    """What clients may have chosen a part of: no line of theirs is to look like one."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


class _Formatter(logging.Formatter):
    def __init__(self, name: str | None = None, to_stderr: bool = False) -> None:
        super().__init__()
        self._name = name
        self._to_stderr = to_stderr

    def format(self, record: logging.LogRecord) -> str:
        text = self.text(record)
        return _for_journal(text, record.levelno) if self._to_stderr else text

    def text(self, record: logging.LogRecord) -> str:
        """A line, or more where a traceback follows."""
        raise NotImplementedError

    def formatException(self, ei: Any) -> str:
        return "" if ei[1] is None else trace_of(ei[1])

    def _trace(self, record: logging.LogRecord) -> str:
        # Not `exc_text`: another handler may have kept the whole of it there.
        found = self.formatException(record.exc_info) if record.exc_info else ""
        stacks = getattr(record, "stacks", None)
        return "\n".join(part for part in (found, stacks) if part)


class _Text(_Formatter):
    """``time - LEVEL - message name=value …``, and a traceback below."""

    def text(self, record: logging.LogRecord) -> str:
        message = _in_one_line(record.getMessage())
        found: Mapping[str, object] = getattr(record, _FIELDS, {})
        pairs = "".join(f" {name}={_shown(value)}" for name, value in found.items())
        who = f"{self._name} - " if self._name else ""
        begin = f"{self.formatTime(record)} - {record.levelname} - {who}"
        line = f"{begin}{message}{pairs}"
        trace = self._trace(record)
        return f"{line}\n{trace}" if trace else line


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, (list, tuple)):
        return ",".join(_shown(v) for v in value) or "-"
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' "=') and text
    return text if plain else json.dumps(text)


class _Json(_Formatter):
    """One object a line: ``time`` (UTC), ``level``, ``message``, and the fields."""

    def text(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname,
            "logger": record.name,
            **({"process": self._name} if self._name else {}),
            "message": record.getMessage(),
            **{n: _rounded(v) for n, v in getattr(record, _FIELDS, {}).items()},
        }
        trace = self._trace(record)
        if trace:
            line["trace"] = trace
        return json.dumps(line, default=str)


def _rounded(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else value
