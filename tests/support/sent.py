"""What is sent to Metal, by MLX and by the native hosts that stand in for it.

The simulated Metal writes a trace (`metalsim_trace` in tests/metalsim/metalsim.h).
Compared is what the hooks depend on: everything that is sent to queues, command
buffers and events, and the beginnings, ends and dispatches of encoders. What a
kernel is given, reference counts and pools are left out.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

# VERSION.txt: what that version and those after it send, up to the next file's.
RECORDED = Path(__file__).parents[1] / "metalsim" / "sent"
KINDS = {
    "CommandQueue": "queue",
    "CommandBuffer": "buffer",
    "ComputeContext": "encoder",
    "SharedEvent": "event",
    "Device": "device",
}
CLASS = re.compile(rf"\w*?({'|'.join(KINDS)})$")
OF_ENCODERS = re.compile(r"dispatch|endEncoding")
OF_DEVICES = re.compile(r"newSharedEvent$")
# Of the hosts, the first round: how many operations fit into a command buffer.
WORKLOADS = {
    "basic": 40,
    "midgraph": 8,
    "two_queues": 40,
    "gpu_cpu_gpu": 40,
    "fences": 40,
    "sync": 8,
}
# Those with one queue also with a fault in the first command buffer. Of several
# queues, whose handlers run first differs from run to run.
FAILING = ("basic", "midgraph")
Trace = dict[str, list[str]]


def message(class_name: str, selector: str) -> str | None:
    """``buffer commit``; None: it is not compared."""
    found = CLASS.match(class_name)
    if found is None or selector in ("retain", "release", "autorelease"):
        return None
    kind = KINDS[found[1]]
    if kind == "encoder":
        if not OF_ENCODERS.match(selector):
            return None
        # The simulator's own, or one of Metal's.
        selector = "dispatch" if selector.startswith("dispatch") else selector
    if kind == "device" and not OF_DEVICES.match(selector):
        return None
    return f"{kind} {selector}"


def read(text: str) -> Trace:
    """What each thread sends, in order; the CPU streams' by what they begin with."""
    threads: dict[str, list[str]] = defaultdict(list)
    for line in text.splitlines():
        thread, class_name, selector = line.split()
        if (said := message(class_name, selector)) is not None:
            threads[thread].append(said)
    handlers = threads.pop("handlers", [])
    first, *others = threads.values()
    found = {"evaluation": first}
    for number, sent in enumerate(sorted(others), 1):
        found[f"CPU stream {number}"] = sent
    if handlers:
        found["handlers"] = handlers
    return found


def written(traces: dict[str, Trace]) -> str:
    """As it is recorded: repeated lines once, with how often."""
    lines = []
    for name, trace in traces.items():
        for thread, sent in trace.items():
            lines += ["", f"[{name}: {thread}]"]
            count = 0
            for i, said in enumerate(sent):
                count += 1
                if sent[i + 1 : i + 2] != [said]:
                    lines.append(said if count == 1 else f"{said} *{count}")
                    count = 0
    return "\n".join(lines[1:]) + "\n"


def all_of(traced: Callable[[str, int], str]) -> str:
    """What is recorded of one version.

    Args:
        traced: the trace of a workload, and of one whose nth buffer fails.
    """
    traces = {name: read(traced(name, 0)) for name in WORKLOADS}
    for name in FAILING:
        traces[f"{name}, the first buffer fails"] = read(traced(name, 1))
    return written(traces)


def recorded(version: str) -> Path:
    """The file that says what a version of MLX sends."""
    return max(
        (f for f in RECORDED.glob("*.txt") if order(f.stem) <= order(version)),
        key=lambda file: order(file.stem),
    )


def order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def differences(expected: str, found: str) -> str:
    """Nothing, or the lines that differ, with some around them."""
    lines = difflib.unified_diff(
        expected.splitlines(), found.splitlines(), "recorded", "sent", lineterm=""
    )
    return "\n".join(lines)
