"""A `Report` in plain words: what happened, what to do, what came before.

Text only; `render` brings it to a terminal.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any

from .. import _core, errors
from ..memory.sizes import format_size
from .records import CommandBuffer, Report

__all__ = [
    *("Section", "advice", "headline", "sections", "server_of", "size", "when"),
]

_SIGNALS = {
    "SIGABRT": "it aborted itself",
    "SIGBUS": "a bad memory access",
    "SIGFPE": "a bad arithmetic operation",
    "SIGILL": "a bad instruction",
    "SIGSEGV": "a bad memory access",
    "SIGTRAP": "a check in the code failed",
}
_LINE_MAX = 160
_MANGLED_MAX = 1024
# What writes once more what a name has written before: thirty of them in a row make
# gigabytes of a name of 300 bytes. Names of MLX have twelve at most, but for a few.
_AGAIN = re.compile(r"[ST][0-9A-Z]*_|Dp")
_AGAIN_MAX = 20
_TIMELINE_MAX = 60
_CHART_ROWS = 6
# Above so many times the most that was active, a ceiling is named and not drawn.
_CHART_FAR = 3
# Above this share, memory is what one looks at first.
_NEARLY_FULL = 0.9
_LESS = "less prompt cache, shorter prompts, or fewer requests at a time."


@dataclass(frozen=True, slots=True)
class Section:
    """A title and rows of equally many cells."""

    title: str
    rows: list[tuple[str, ...]]


def sections(report: Report) -> list[Section]:
    """All there is to show, the most telling first; nothing empty."""
    found = [
        Section("What happened", _happened(report)),
        Section("Problems with this report", [(p,) for p in report.problems]),
        Section("Memory over time", [(line,) for line in chart(report)]),
        Section("Memory", _memory(report)),
        Section("Requests in flight", _requests(report)),
        Section("Time line (seconds before and after)", _timeline(report)),
        Section("Command buffers", _timeless(report)),
        Section("Native stack", _native_stack(report)),
        Section(
            "Python stacks",
            [(line,) for line in (report.python_stacks or "").splitlines()],
        ),
        Section("Versions", _versions(report)),
    ]
    return [section for section in found if section.rows]


def headline(report: Report) -> str:
    """What happened, in one line."""
    if report.why == "fault":
        if report.kind is not None and issubclass(report.kind.error, errors.CudaError):
            return f"the GPU failed: {report.kind.name} (code {report.kind.code})"
        return f"the GPU failed a command buffer: {_fault(report.code)}"
    if report.why == "terminate":
        cause = _exception(report) if report.kind is None else _fault(report.code)
        return f"an exception that nothing caught ended the process: {cause}"
    if report.why == "signal":
        return f"the process crashed: {_signal(report)}"
    if report.why == "stall":
        return "a generation step made no progress, and the process was given up"
    if report.why == "died" and report.unwritten:
        return "the process crashed, and could not write its report: the disk was full"
    if report.why == "died":
        return "the process was killed, or the machine stopped"
    if report.why == "running":
        return "no report: what a process says of itself while it runs"
    if report.problems:
        return f"a report that cannot be read in full: {report.problems[0]}"
    return "a report that does not say why it was written"


def server_of(report: Report) -> str:
    """Which server it is of, by its port and model; "" when it is of none."""
    server = report.context.get("server")
    if not isinstance(server, dict):
        return ""
    return _one_line(f"on port {server.get('port')} with {server.get('model')}")


def advice(report: Report) -> str:
    """What to do about it, in a sentence or two."""
    if report.unwritten:
        return "Make room where the reports go; the next crash can tell more then."
    if report.kind is not None:
        return report.kind.advice
    sender = None if report.signal is None else report.signal.sent_by
    if report.why == "signal" and sender not in (None, report.pid):
        return f"Process {sender} ended it: look in the system's log for what that was."
    full = _machine_is_full(report)
    memory = ""
    if full:
        memory = f"The machine's memory was nearly full: {_LESS} "
    elif _is_near_its_limit(report):
        memory = f"It was near its own limit for active memory: {_LESS} "
    return (
        memory
        + {
            "terminate": "The stacks show where it was thrown; please report it.",
            "signal": "A defect of native code: the stacks show where. "
            "Please report it.",
            "stall": "The Python stacks show where it stood; a step that is only "
            "slow needs a smaller --step-seconds or a larger --stall-timeout.",
            "fault": "The server's log of that moment says what failed.",
            "died": "Look in the system's log for who ended the process"
            + (": the machine's memory was not nearly full." if full is False else "."),
        }.get(report.why or "", "")
    ).strip()


def when(seconds: float | None) -> str:
    """Unix time as local time; what no calendar holds as the number it is."""
    if seconds is None:
        return "?"
    try:
        return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f}"


def size(count: int | None) -> str:
    """As everywhere: ``"9.5 GB"``; what is not known is ``"?"``."""
    return "?" if count is None else format_size(count)


def _fault(code: int | None) -> str:
    if code is None or code < 0:
        return "an unknown error"
    kind = errors.kind_of(code)
    if code not in errors.FAULT_KINDS:
        return f"an error that is not known (code {_number(code)})"
    return (
        f"{kind.slug.removeprefix('metal_').replace('_', ' ')} (code {_number(code)})"
    )


def _number(code: int) -> str:
    return str(code) if code < 10 else f"{code:#x}"


def _exception(report: Report) -> str:
    parts = (_demangled(report.exception_type or ""), report.exception_message)
    return _one_line(": ".join(p for p in parts if p)) or "unknown"


def _signal(report: Report) -> str:
    number = report.signal
    if number is None:
        return "by a signal"
    name = number.name or f"signal {number.number}"
    meaning = f", {_SIGNALS[name]}" if name in _SIGNALS else ""
    if number.sent_by is not None and number.sent_by != report.pid:
        return _one_line(f"{name}, sent by process {number.sent_by}")
    address = f" at {number.address}" if number.address else ""
    return _one_line(f"{name}{meaning}{address}")


def _demangled(name: str) -> str:
    """A type or function of C++ as it is written; other names as they are."""
    # Longer ones are of no use to a reader, and may become longer still.
    if len(name) > _MANGLED_MAX or _growth(name) > _AGAIN_MAX:
        return name
    return _core.demangle(name) or name


def _growth(name: str) -> int:
    # A pack is written once for each of its members.
    return sum(10 if again == "Dp" else 1 for again in _AGAIN.findall(name))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LINE_MAX else line[: _LINE_MAX - 1] + "…"


def _seconds(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / 1e9


def _happened(report: Report) -> list[tuple[str, ...]]:
    rows = [
        ("what", headline(report)),
        ("advice", advice(report)),
        ("when", when(_seconds(report.time_ns))),
        ("process", _process(report)),
        ("server", server_of(report)),
        ("requests", _named(report)),
        ("ran for", _ran_for(report)),
    ]
    if report.exception_message or report.exception_type:
        label = "exception" if report.exception_type else "message"
        rows.append((label, _exception(report)))
    if report.policy == "drain":
        rows.append(("then", "its clients were answered, it left with status 75"))
    if report.second:
        rows.append(("note", "written after a crash while a report was being written"))
    return [row for row in rows if row[1]]


def _named(report: Report) -> str:
    """Those that were in flight, by the ids that their clients and the log have."""
    return _one_line(", ".join(r.id for r in report.requests if r.id))


def _process(report: Report) -> str:
    if report.pid is None:
        return ""
    name = f" ({report.argv0})" if report.argv0 else ""
    thread = f", thread {report.thread}" if report.thread is not None else ""
    if thread and report.python_thread:
        thread += f" (in Python {_as_in_stacks(report.python_thread)})"
    return f"{report.pid}{name}{thread}"


def _as_in_stacks(thread: str) -> str:
    """faulthandler writes sixteen digits."""
    return f"0x{thread.removeprefix('0x'):0>16}"


def _ran_for(report: Report) -> str:
    if report.started_ns is None or report.time_ns is None:
        return ""
    ran_ns = report.time_ns - report.started_ns
    if ran_ns < 0:
        return "not known: the clock was set back meanwhile"
    minutes, seconds = divmod(ran_ns // 10**9, 60)
    return f"{minutes // 60} h {minutes % 60} min {seconds} s"


def _is_near_its_limit(report: Report) -> bool:
    """The ceiling is for MLX's live arrays, not for the rest of the process."""
    memory = report.memory
    share = None if memory is None else _share(memory.active, memory.ceiling)
    return share is not None and share > _NEARLY_FULL


def _machine_is_full(report: Report) -> bool | None:
    """By this process or by all of them; None when that is not known."""
    memory = report.memory
    if memory is None or not memory.system_total:
        return None
    shares = [_share(memory.footprint, memory.system_total)]
    if memory.system_available is not None:
        shares.append(1 - memory.system_available / memory.system_total)
    known = [share for share in shares if share is not None]
    return max(known) > _NEARLY_FULL if known else None


def _share(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _memory(report: Report) -> list[tuple[str, ...]]:
    memory = report.memory
    if memory is None:
        return []
    rows: list[tuple[str, ...]] = []
    # What MLX keeps for reuse it gives back before it goes over the ceiling.
    for name, whole, of in (
        ("active", memory.ceiling, "the ceiling"),
        ("peak", memory.ceiling, "the ceiling"),
        ("cache", None, ""),
        ("footprint", memory.system_total, "the machine's memory"),
    ):
        value = getattr(memory, name)
        share = _share(value, whole)
        if value is not None:
            part = "" if share is None else f", {share:.0%} of {of}"
            rows.append((name, size(value) + part))
    if memory.ceiling:
        rows.append(("ceiling", size(memory.ceiling)))
    if memory.system_total:
        free = size(memory.system_available)
        rows.append(("system", f"{size(memory.system_total)}, {free} available"))
    return rows


def chart(report: Report) -> list[str]:
    """Active memory over time as bars, the ceiling as a line above them.

    One that is far above would leave the bars flat, and the chart blank.
    """
    points = [p for p in report.memory_history if p.active is not None][-64:]
    most = max((p.active or 0 for p in points), default=0)
    ceiling = max((p.ceiling or 0 for p in points), default=0)
    is_far = ceiling > _CHART_FAR * most
    top = most if is_far else max(most, ceiling)
    if len(points) < 2 or top <= 0:
        return []
    eighths = _CHART_ROWS * 8
    lines = []
    for row in range(_CHART_ROWS - 1, -1, -1):
        cells = ""
        for point in points:
            bar = (point.active or 0) * eighths // top - row * 8
            line = ((point.ceiling or 0) * eighths // top - 1) // 8
            if bar > 0:
                cells += " ▁▂▃▄▅▆▇█"[min(bar, 8)]
            else:
                cells += "─" if point.ceiling and line == row else " "
        lines.append(cells)
    lines[0] += f" {size(top)}"
    first, last = points[0].time_ns, points[-1].time_ns
    if first is not None and last is not None:
        far = f"; the ceiling is far above, at {size(ceiling)}" if is_far else ""
        lines.append(f"the last {(last - first) / 1e9:.0f} s of active memory{far}")
    return lines


def _requests(report: Report) -> list[tuple[str, ...]]:
    if not report.requests:
        return []
    rows: list[tuple[str, ...]] = [
        ("request", "path", "prompt", "prefilled", "answered", "age")
    ]
    for r in report.requests:
        age = "?" if r.age_ms is None else f"{r.age_ms / 1000:.1f} s"
        counts = (r.prompt_tokens, r.prefilled, r.tokens)
        shown = ("?" if c is None else str(c) for c in counts)
        rows.append((r.id or "?", r.path or "?", *shown, age))
    return rows


def _timeline(report: Report) -> list[tuple[str, ...]]:
    """Breadcrumbs, faults and command buffers in the order of their time."""
    placed = [
        (b.time_ns, b.kind or "note", _crumb(b.text, b.fields))
        for b in report.breadcrumbs
        if b.time_ns is not None
    ]
    placed += [
        (f.time_ns, "fault", _one_line(f"{_fault(f.code)} {f.label or ''}"))
        for f in report.faults
        if f.time_ns is not None
    ]
    placed += [
        (b.time_ns, "buffer", _buffer(b))
        for b in report.command_buffers
        if b.time_ns is not None
    ]
    if not placed:
        return []
    event = report.time_ns if report.time_ns is not None else max(p[0] for p in placed)
    placed.append((event, report.why or "report", headline(report)))
    outcome = placed[-1]  # of what is shown at the same millisecond
    placed.sort(key=lambda p: (round((p[0] - event) / 1e6), p is outcome, p[0]))
    rows: list[tuple[str, ...]]
    rows = [(f"{(t - event) / 1e9:+.3f}", kind, text) for t, kind, text in placed]
    left = len(rows) - _TIMELINE_MAX
    if left > 0:
        rows[:left] = [("…", "", f"{left} earlier ones; --json has all")]
    return rows


def _timeless(report: Report) -> list[tuple[str, ...]]:
    """The command buffers that have no place in the time line."""
    return [(_buffer(b),) for b in report.command_buffers if b.time_ns is None]


def _crumb(text: str | None, fields: dict[str, object]) -> str:
    shown = (f"{name}={value}" for name, value in fields.items())
    return _one_line(" ".join([text or "", *shown]))


def _buffer(b: CommandBuffer) -> str:
    took = ""
    if b.gpu_start_s and b.gpu_end_s:
        took = f", {(b.gpu_end_s - b.gpu_start_s) * 1000:.1f} ms"
    failed = f", {_fault(b.code)}" if b.code is not None and b.code > 0 else ""
    name = " ".join(p for p in (b.queue, b.label) if p)
    return _one_line(f"{b.number} {name}: {b.status or '?'}{took}{failed}")


def _native_stack(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for i, frame in enumerate(report.native_stack):
        image = (frame.image or "?").rpartition("/")[2]
        place = f"{image} + {frame.offset or frame.address or '?'}"
        # Without the prefix it is C's: "f" is a function, and no float.
        symbol = frame.symbol or ""
        name = _demangled(symbol) if symbol.startswith("_Z") else symbol
        rows.append((str(i), _one_line(name), place))
    return rows


def _versions(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, str]] = []
    for name, value in report.context.items():
        if isinstance(value, dict):
            rows += _settings(name, value)
        elif value is not None:
            rows.append((name, _one_line(str(value))))
    return [*rows]


def _settings(title: str, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What is on and what is off in a line each, then what has a value."""
    on = [name for name, value in settings.items() if value is True]
    off = [name for name, value in settings.items() if value is False]
    rows = [(title, ", ".join(on)), (f"{title}: not", ", ".join(off))]
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += _settings(f"{title}.{name}", value)
        elif isinstance(value, list):
            rows += [(f"{title}.{name}", str(entry)) for entry in value]
        elif not isinstance(value, bool) and value is not None:
            rows.append((f"{title}.{name}", str(value)))
    return [(name, _one_line(text)) for name, text in rows if text]
