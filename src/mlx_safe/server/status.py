"""What ``/status.json`` says: the server now, and its memory over time.

Nothing is kept here but samples of what others own: the scheduler's requests, the
counters of `metrics`, the prompt cache, the fault log. No text of a prompt or an
answer is anywhere in it. The format is documented in docs/status.md.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _faults, _install, _paths
from .._version import __version__
from ..forensics import reader, store, words
from . import supervisor
from .health import Health
from .metrics import Metrics, samples_of
from .mlx_lm.protocols.opaque import Json

if TYPE_CHECKING:
    from prometheus_client import Counter

    from .mlx_lm.kv_tier import KVTier
    from .mlx_lm.prompt_cache import PromptCache

__all__ = ["HISTORIES", "VERSION", "Sources", "Status", "disk_of", "versions"]

# Of the format: grows when a field goes or changes its meaning, not when one comes.
VERSION = 1

REQUESTS_MAX = 256
REPORTS_MAX = 5
REPORTS_EVERY_S = 10.0
MARKS_MAX = 500

FIELDS = (
    *("time", "model", "caches", "prompt_cache", "pool", "other", "ceiling"),
    *("in_flight", "waiting", "tokens"),
)


@dataclass(frozen=True)
class _Span:
    """How often a sample is kept, in seconds, and how many."""

    every_s: float
    count: int


# 15 minutes, and 12 hours.
HISTORIES = {"short": _Span(2.0, 450), "long": _Span(120.0, 360)}

# Counters that leave a mark on the time line when they grow.
MARKED = ("replays", "evictions", "preempted", "refused", "resets")


@dataclass(frozen=True)
class Sources:
    """Whose state is shown. All of it may be read by any thread.

    Attributes:
        requests: a snapshot of those in flight, oldest first.
        memory: as `Headroom.gauges`. lowered: why the ceiling is low; None: it is not.
        counts: how often so far, by name. tokens: tokens passed on so far.
        about: facts that do not change. model: its name.
        disk: of the KV caches on disk; None: there is none.
    """

    health: Health
    requests: Callable[[], list[Json]]
    memory: Callable[[], dict[str, float]]
    lowered: Callable[[], str | None]
    prompt_cache: PromptCache
    metrics: Metrics
    events: Callable[[], Mapping[str, int]]
    tokens: Callable[[], int]
    model: Callable[[], str | None]
    about: Mapping[str, object]
    disk: Callable[[], Json | None]


class Status:
    """Samples, and the answer to ``/status.json``.

    `sample` is called by one thread; `read` by any.
    """

    def __init__(self, sources: Sources) -> None:
        self._from = sources
        self._started = time.time()
        # What does not change is JSON at once: an answer has thousands of numbers.
        self._samples: dict[str, deque[str]] = {
            name: deque(maxlen=span.count) for name, span in HISTORIES.items()
        }
        self._due = dict.fromkeys(HISTORIES, 0.0)
        self._marks: deque[str] = deque(maxlen=MARKS_MAX)
        self._counted = self._counts()
        self._failures: dict[str, int] = {}
        self._reports: list[Json] = []
        self._reports_due = 0.0
        self._told: dict[str, dict[str, str]] = {}
        self._mark(self._started, "start", 1, "the server was started")

    # -- the thread of the samples ---------------------------------------------------

    def sample(self) -> None:
        """Keeps what is now, when a sample is due; called about once a second."""
        now = time.monotonic()
        due = [name for name in HISTORIES if now >= self._due[name]]
        if due:
            taken = _json(self._sample())
            for name in due:
                self._samples[name].append(taken)
                self._due[name] = now + HISTORIES[name].every_s - 0.5
        self._look_for_marks()
        if now >= self._reports_due:
            self._reports = self._last_reports()
            self._reports_due = now + REPORTS_EVERY_S

    def _sample(self) -> list[float]:
        memory = self._memory(self._from.memory())
        shown = [memory["parts"][name] for name in FIELDS[1:6]]
        requests = self._from.requests()
        return [
            round(time.time(), 1),
            *shown,
            memory["ceiling"],
            len(requests),
            sum(r["waits"] for r in requests),
            self._from.tokens(),
        ]

    def _look_for_marks(self) -> None:
        # As the server has noticed them, on every backend.
        failures = _by_label(self._from.metrics.failures, "code")
        for code, count in failures.items():
            if (more := count - self._failures.get(code, 0)) > 0:
                self._mark(time.time(), "fault", more, code.replace("_", " "))
        self._failures = failures
        counts, before = self._counts(), self._counted
        for name in MARKED:
            if (more := counts[name] - before[name]) > 0:
                self._mark(time.time(), name, int(more), "")
        self._counted = counts

    def _mark(self, at: float, kind: str, count: int, text: str) -> None:
        mark = {"time": round(at, 1), "kind": kind, "count": count, "text": text}
        self._marks.append(_json(mark))

    def _last_reports(self) -> list[Json]:
        directory = _paths.report_dir()
        try:
            newest = store.entries(directory)[-REPORTS_MAX:]
        except OSError:
            return []
        self._told = {e.id: self._told.get(e.id) or _told(e.path) for e in newest}
        return [
            {"id": e.id, "time": e.seconds, **self._told[e.id]}
            for e in reversed(newest)
        ]

    # -- any thread --------------------------------------------------------------------

    def read(self, history: str | None = "short") -> bytes:
        """The answer, as JSON.

        Args:
            history: which of `HISTORIES`; None: without one.
        """
        health = self._from.health
        requests, memory = self._from.requests(), self._from.memory()
        # mlx-lm's default is 2**63 - 1, which it is until a model is there.
        limit = min(memory["prompt_cache_limit"], memory["ceiling"])
        found: Json = {
            "version": VERSION,
            "time": round(time.time(), 3),
            "server": {
                "state": health.state,
                "reason": health.reason,
                "model": self._from.model(),
                "started": round(self._started, 1),
                "pid": os.getpid(),
                "supervised": supervisor.is_supervised(),
                "mlx_safe": __version__,
                **self._from.about,
            },
            "memory": self._memory(memory),
            "requests": {
                "in_flight": len(requests),
                "waiting": sum(r["waits"] for r in requests),
                "list": requests[:REQUESTS_MAX],
                "left_out": max(0, len(requests) - REQUESTS_MAX),
                "outcomes": _by_label(self._from.metrics.requests, "outcome"),
                "tokens": self._from.tokens(),
            },
            "counts": self._counts(),
            "prompt_cache": {
                "bytes": int(self._from.prompt_cache.nbytes),
                "limit": int(limit),
                "entries": len(self._from.prompt_cache),
            },
            "disk": self._from.disk(),
            "reports": self._reports,
        }
        more = {"marks": _array(self._marks)}
        if history is not None:
            kept = {"every_s": HISTORIES[history].every_s, "fields": FIELDS}
            samples = _array(self._samples[history])
            more["history"] = _with(_json(kept), {"samples": samples})
        return _with(_json(found), more).encode()

    def _memory(self, now: Mapping[str, float]) -> Json:
        stored = int(self._from.prompt_cache.nbytes)
        used = now["active"] - now["model"] - stored
        parts = {
            "model": min(now["model"], now["active"]),
            "caches": max(0.0, used),
            "prompt_cache": float(stored),
            "pool": now["pool"],
            "other": now.get("other", 0.0),
        }
        kept = ("ceiling", "ceiling_static", "active", "peak", "footprint", "total")
        return {
            **{name: int(now[name]) for name in kept if name in now},
            "parts": {name: int(size) for name, size in parts.items()},
            "lowered": self._from.lowered(),
        }

    def _counts(self) -> dict[str, int]:
        cache, metrics = dict(self._from.prompt_cache.events), self._from.metrics
        events = dict(self._from.events())
        found = {
            "faults": _faults.epoch(),
            "failures": sum(value for _, value in samples_of(metrics.failures)),
            "replays": sum(value for _, value in samples_of(metrics.replays)),
            "resets": sum(value for _, value in samples_of(metrics.resets)),
            **{n: events.get(n, 0) for n in ("held", "preempted", "refused")},
            **{n: cache.get(n, 0) for n in ("evictions", "hits", "misses")},
        }
        return {name: int(value) for name, value in found.items()}


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _array(encoded: Iterable[str]) -> str:
    return f"[{','.join(encoded)}]"


def _with(members: str, more: Mapping[str, str]) -> str:
    """An object of JSON that has some, with more of them."""
    added = "".join(f',"{name}":{value}' for name, value in more.items())
    return f"{members[:-1]}{added}}}"


def _told(path: Path) -> dict[str, str]:
    """What a crash report says, and of whom: several servers may have one directory."""
    report = reader.read(path)
    return {"headline": words.headline(report), "server": words.server_of(report)}


def disk_of(tier: KVTier | None) -> Json | None:
    """The KV caches on disk, of a `KVTier`; None: there is none."""
    if tier is None:
        return None
    events = dict(tier.store.events)
    shown = ("restored", "restored_tokens", "written", "evicted", "damaged")
    return {
        "bytes": tier.store.nbytes,
        "limit": tier.store.limits.size,
        "files": len(tier.store),
        "waiting_bytes": tier.writer.waiting,
        "off": tier.store.off,
        **{name: events.get(name, 0) for name in shown},
    }


def versions() -> dict[str, str | None]:
    """Of what computes."""
    from .mlx_lm.requirements import installed_version

    return {"mlx": _install.mlx_version(), "mlx_lm": installed_version()}


def _by_label(counter: Counter, label: str) -> dict[str, int]:
    """The values of a counter, by one of its labels."""
    found: dict[str, int] = {}
    for labels, value in samples_of(counter):
        name = labels.get(label, "")
        found[name] = found.get(name, 0) + int(value)
    return found
