"""A crash report as typed records, made of any value that JSON can hold.

The annotations of the records are the schema: `decode` takes what fits and names
the rest. ``docs/reports.md`` says what each member means and where it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import errors

__all__ = [
    "SCHEMA",
    "WHY",
    "Breadcrumb",
    "CommandBuffer",
    "FaultEntry",
    "Frame",
    "Memory",
    "MemoryPoint",
    "Report",
    "RequestEntry",
    "Signal",
    "Unreadable",
    "decode",
]

SCHEMA = 1
# "running" is in run files alone, of processes that live.
WHY = ("fault", "terminate", "signal", "stall", "died", "running")

# More than any writer makes; a damaged or hostile file is not to fill the
# memory of who reads it with problems and rows.
_PROBLEMS_MAX = 20
_ROWS_MAX = 4096


@dataclass(slots=True)
class Frame:
    """One frame of the native stack."""

    address: str | None = None
    image: str | None = None
    offset: str | None = None
    symbol: str | None = None


@dataclass(slots=True)
class Signal:
    """The signal that ended the process. sent_by: a process; None: none did."""

    number: int | None = None
    name: str | None = None
    sent_by: int | None = None
    address: str | None = None


class _Sample:
    __slots__ = ()

    def __post_init__(self) -> None:
        for name in _annotations(type(self)):  # the writer says -1 for unknown
            value = getattr(self, name)
            if value is not None and value < 0:
                setattr(self, name, None)


@dataclass(slots=True)
class Memory(_Sample):
    """Bytes; None where unknown. time_ns: Unix time of the sample."""

    time_ns: int | None = None
    active: int | None = None
    peak: int | None = None
    cache: int | None = None
    footprint: int | None = None
    ceiling: int | None = None
    system_total: int | None = None
    system_available: int | None = None


@dataclass(slots=True)
class MemoryPoint(_Sample):
    """A sample of the past: Unix time in ns, bytes, bytes."""

    time_ns: int | None = None
    active: int | None = None
    ceiling: int | None = None


@dataclass(slots=True)
class RequestEntry:
    """A request that was in flight. Counts of tokens; age in ms."""

    id: str | None = None
    path: str | None = None
    prompt_tokens: int | None = None
    prefilled: int | None = None
    tokens: int | None = None
    age_ms: int | None = None


@dataclass(slots=True)
class Breadcrumb:
    """What the program said of itself. time_ns: Unix time."""

    time_ns: int | None = None
    thread: int | None = None
    kind: str | None = None
    text: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class CommandBuffer:
    """A command buffer that completed.

    time_ns: Unix time. gpu_*_s: seconds of Metal's own clock, 0 if unknown.
    """

    number: int | None = None
    queue: str | None = None
    label: str | None = None
    status: str | None = None
    code: int | None = None
    time_ns: int | None = None
    gpu_start_s: float | None = None
    gpu_end_s: float | None = None


@dataclass(slots=True)
class FaultEntry:
    """A fault, with what Metal said of its command buffer."""

    number: int | None = None
    code: int | None = None
    message: str | None = None
    source: str | None = None
    time_ns: int | None = None
    thread: int | None = None
    buffer: int | None = None
    queue: str | None = None
    label: str | None = None
    gpu_start_s: float | None = None
    gpu_end_s: float | None = None


@dataclass(slots=True)
class Report:
    """One crash report. None and empty lists: unknown, or lost with the cut.

    Attributes:
        problems: one line for each thing that is wrong with the file; empty for
            a sound one.
        other: members that this version does not know.
        complete: the writer reached the end.
        second: written after a crash while the first report was being written.
        unwritten: it crashed and could not write its report.

    The rest are the members of the file, in its order.
    """

    schema: int | None = None
    why: str | None = None
    time_ns: int | None = None
    pid: int | None = None
    thread: int | None = None
    python_thread: str | None = None
    argv0: str | None = None
    started_ns: int | None = None
    signal: Signal | None = None
    exception_type: str | None = None
    exception_message: str | None = None
    code: int | None = None
    name: str | None = None
    policy: str | None = None
    epoch: int | None = None
    second: bool = False
    unwritten: bool = False
    memory: Memory | None = None
    memory_history: list[MemoryPoint] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)
    requests: list[RequestEntry] = field(default_factory=list)
    breadcrumbs: list[Breadcrumb] = field(default_factory=list)
    command_buffers: list[CommandBuffer] = field(default_factory=list)
    faults: list[FaultEntry] = field(default_factory=list)
    native_stack: list[Frame] = field(default_factory=list)
    python_stacks: str | None = None
    complete: bool = False
    other: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def kind(self) -> errors.FaultKind | None:
        """The fault that the report is about; None when it is about none.

        The message tells the backend: CUDA's numbers mean other things than Metal's.
        """
        if self.code is None or self.code < 0:
            return None
        said = errors.kind_in_message(self.exception_message or "")
        if said is not None and said.code == self.code:
            return said
        return errors.kind_of(self.code)

    def as_dict(self) -> dict[str, Any]:
        """The attributes as a dict of JSON-able values."""
        return dataclasses.asdict(self)

    def members(self) -> dict[str, Any]:
        """Those of `as_dict` that a file has, without what is not known."""
        found = dataclasses.asdict(self, dict_factory=_without_unknown)
        del found["other"], found["problems"]
        found["memory_history"] = [
            [-1 if value is None else value for value in dataclasses.astuple(point)]
            for point in self.memory_history
        ]
        return {
            name: value
            for name, value in found.items()
            if value is not None and value is not False and value not in ([], {})
        }


class Unreadable(Report):
    """Of what is no file, or none that may be read: nothing, and the reason."""

    __slots__ = ()


def _without_unknown(members: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in members if value is not None}


_NOT_IN_THE_FILE = ("other", "problems")


def decode(value: Any) -> Report:
    """The report that ``value``, what the json module returned, stands for.

    A member of the wrong type is left out and named in ``problems``. Never
    raises.
    """
    problems: list[str] = []
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        return Report(problems=[f"expected a JSON object, found {found}"])
    report: Report = _record(Report, value, "", problems)
    known = _annotations(Report)
    report.other = {
        _plain(name): _json(member)
        for name, member in value.items()
        if name not in known or name in _NOT_IN_THE_FILE
    }
    if report.schema is not None and report.schema > SCHEMA:
        problems.append(
            f"schema {report.schema} is newer than this mlx-safe knows ({SCHEMA}): "
            "some of it may be missing here"
        )
    if report.why is None:
        problems.append("why: missing")
    elif report.why not in WHY:
        problems.append(f"why: {report.why!r} is none of {', '.join(WHY)}")
    if report.kind is not None and report.name is None:
        report.name = report.kind.name
    if len(problems) > _PROBLEMS_MAX:
        left = len(problems) - _PROBLEMS_MAX
        problems[_PROBLEMS_MAX:] = [f"and {left} more like these"]
    report.problems = problems
    return report


# Reading annotations is slow: once for each class.
_annotations: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _record(cls: Any, value: dict[str, Any], where: str, problems: list[str]) -> Any:
    taken = {}
    for name, annotation in _annotations(cls).items():
        if value.get(name) is None or (not where and name in _NOT_IN_THE_FILE):
            continue
        try:
            taken[name] = _take(annotation, value[name], f"{where}{name}", problems)
        except _Mismatch as e:
            problems.append(f"{where}{name}: {e}")
    return cls(**taken)


def _take(annotation: Any, value: Any, where: str, problems: list[str]) -> Any:
    """``value`` as ``annotation`` asks for.

    Raises:
        _Mismatch: it is something else; says what was expected.
    """
    if typing.get_origin(annotation) is list:
        return _rows(typing.get_args(annotation)[0], value, where, problems)
    options = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    wanted: Any = options[0] if len(options) == 1 else annotation
    if wanted in _RECORDS:
        if not isinstance(value, dict):
            raise _wrong("an object", value)
        return _record(wanted, value, f"{where}.", problems)
    convert: Callable[[Any], Any] = _SCALARS.get(wanted, _fields)
    return convert(value)


def _rows(cls: Any, value: Any, where: str, problems: list[str]) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong("a list", value)
    if len(value) > _ROWS_MAX:
        problems.append(f"{where}: {len(value)} entries; the last {_ROWS_MAX} are read")
        value = value[-_ROWS_MAX:]
    rows = []
    for i, row in enumerate(value):
        if isinstance(row, list):  # a point is written as its values alone
            row = dict(zip(_annotations(cls), row, strict=False))
        if isinstance(row, dict):
            rows.append(_record(cls, row, f"{where}[{i}].", problems))
        else:
            problems.append(f"{where}[{i}]: {_wrong('an object', row)}")
    return rows


class _Mismatch(Exception):
    """A value that is not what the schema asks for."""


def _wrong(expected: str, value: Any) -> _Mismatch:
    return _Mismatch(f"expected {expected}, found {_NAMES.get(type(value), 'nothing')}")


_RECORDS = (Signal, Memory)  # members that are one record

_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong("a whole number", value)
    if not math.isfinite(value) or value != int(value) or abs(value) >= 1 << 64:
        raise _Mismatch("expected a whole number of 64 bits")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong("a number", value)
    return float(value) if math.isfinite(value) else 0.0


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong("true or false", value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong("a text", value)
    return _plain(value)


def _fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong("an object", value)
    return {_plain(name): _json(member) for name, member in value.items()}


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    int: _whole,
    float: _number,
    bool: _flag,
    str: _text,
}

# What would move a terminal's cursor or colour it, but for tab and newline, and
# what would turn the direction of the text around.
_CONTROLS = dict.fromkeys(
    [
        *range(9),
        *range(11, 32),
        *range(127, 160),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    ],
    "\ufffd",
)


def _plain(text: str) -> str:
    """``text`` as it can go to any terminal: no controls, no lone surrogates."""
    return text.translate(_CONTROLS).encode("utf-8", "replace").decode()


def _json(value: Any) -> Any:
    """A free-form member, its texts made plain."""
    if isinstance(value, dict):
        return {_plain(name): _json(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_json(member) for member in value]
    return _plain(value) if isinstance(value, str) else value
