"""The metrics of ``/metrics``. Thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .. import _core, _reports

__all__ = ["CONTENT_TYPE", "Metrics", "samples_of"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


PROMPT_CACHE_EVENTS = {
    "hits": "Requests that found part of their prompt in the prompt cache",
    "misses": "Requests that found nothing in the prompt cache",
    "reused_tokens": "Prompt tokens that were in the prompt cache",
    "evictions": "Entries of the prompt cache that went to make room",
    "too_large": "Entries not stored: over the limit by themselves, or in the way",
    "dropped": "Entries dropped after a failure",
}


KV_DISK_EVENTS = {
    "restored": "Requests that began from KV caches on disk",
    "restored_tokens": "Prompt tokens that came from disk",
    "restored_bytes": "Bytes read from disk",
    "written": "Files written",
    "written_bytes": "Bytes written",
    "not_written": "Blocks not written: no room, over the bound, or withdrawn",
    "evicted": "Files that went to make room",
    "damaged": "Files that were not what they should be, and went",
    "dropped": "Files that went because they were damaged, or after a stray write",
    "suspects": "Files that were being restored when a process died, and went",
}


def _kv_events(events: Mapping[str, int]) -> dict[str, float]:
    found: dict[str, float] = {**events}
    lost = [n for name, n in found.items() if name.startswith("not_written_")]
    return {**found, "not_written": sum(lost)}


MEMORY_EVENTS = {
    "held": "Requests that had to wait for memory",
    "refused": "Requests refused for want of memory that would fit later",
    "too_long": "Requests refused because they can never fit",
    "preempted": "Running requests that were put back to wait for memory",
}

MEMORY_GAUGES = {
    "active": "Bytes that MLX's arrays hold",
    "peak": "Most bytes that were active since the start",
    "pool": "Bytes that MLX keeps for reuse",
    "footprint": "Bytes of the process as the system counts them",
    "ceiling": "Bytes that may be active now",
    "ceiling_static": "Bytes that may be active when faults are forgotten",
    "model": "Bytes of the model",
    "other": "Bytes that other programs hold, of the card or of the RAM",
    "prompt_cache_limit": "Bytes that the prompt cache may hold",
    "held": "Requests that wait for memory now",
    "running": "Requests that were admitted and run now",
}


PROCESS_EVENTS = {
    "faults": "Faults of the GPU",
    "faults_dropped": "Faults whose record was lost",
    "reports_written": "Crash reports written",
    "reports_failed": "Crash reports that could not be written",
    "reports_suppressed": "Crash reports not written, as there were enough",
}


class _Values(Collector):
    """Values that somebody else keeps, read all at once when they are asked for."""

    def __init__(
        self,
        family: type[CounterMetricFamily] | type[GaugeMetricFamily],
        prefix: str,
        texts: Mapping[str, str],
        read: Callable[[], Mapping[str, float]],
    ) -> None:
        self._family = family
        self._prefix = prefix
        self._texts = texts
        self._read = read

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        values = self._read()
        for name, text in self._texts.items():
            if name in values:
                yield self._family(f"{self._prefix}_{name}", text, values[name])


def samples_of(counter: Counter) -> list[tuple[dict[str, str], float]]:
    """The labels and the value of each of a counter's samples. Any thread."""
    return [
        (sample.labels, sample.value)
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    ]


def _process_events() -> dict[str, float]:
    written, failed = _core.report_counts()
    return {
        "faults": _core.epoch(),
        "faults_dropped": _core.dropped(),
        "reports_written": written,
        "reports_failed": failed,
        "reports_suppressed": _reports.suppressed(),
    }


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, in_flight: Callable[[], float], ready: Callable[[], float]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_safe_requests",
            "Completion requests by how they ended",
            ["outcome"],
            registry=self.registry,
        )
        self.failures = Counter(
            "mlx_safe_generation_failures",
            "Steps and answers that failed, by the code of the error response",
            ["code"],
            registry=self.registry,
        )
        self.replays = Counter(
            "mlx_safe_replays",
            "Requests run again after a failure",
            registry=self.registry,
        )
        self.resets = Counter(
            "mlx_safe_resets",
            "Times the generation state was reset",
            registry=self.registry,
        )
        self.truncations = Counter(
            "mlx_safe_prompts_truncated",
            "Prompts that were cut to --max-prompt-tokens",
            registry=self.registry,
        )
        self._count("mlx_safe", PROCESS_EVENTS, _process_events)
        self._gauge("mlx_safe_requests_in_flight", "Requests taken", in_flight)
        self._gauge("mlx_safe_ready", "1 while requests can be served", ready)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)

    def _count(
        self,
        prefix: str,
        texts: Mapping[str, str],
        read: Callable[[], Mapping[str, float]],
    ) -> None:
        def counts() -> Mapping[str, float]:
            return {**dict.fromkeys(texts, 0), **read()}  # what never happened is 0

        self.registry.register(_Values(CounterMetricFamily, prefix, texts, counts))

    def watch_prompt_cache(self, cache: Any) -> None:
        """``cache``: a `prompt_cache.PromptCache`; read at each scrape."""
        name = "mlx_safe_prompt_cache"
        self._count(name, PROMPT_CACHE_EVENTS, lambda: cache.events)
        self._gauge(f"{name}_bytes", "Bytes of its entries", lambda: cache.nbytes)
        self._gauge(f"{name}_entries", "Entries in it", lambda: len(cache))

    def watch_kv_disk(self, store: Any, writer: Any) -> None:
        """``store``, ``writer``: of `mlx_safe.kv`; read at each scrape."""
        name = "mlx_safe_kv_disk"
        self._count(name, KV_DISK_EVENTS, lambda: _kv_events(store.events))
        self._gauge(f"{name}_bytes", "Bytes of all files there", lambda: store.nbytes)
        self._gauge(f"{name}_files", "Files there", lambda: len(store))
        self._gauge(
            f"{name}_on", "1 while the tier works", lambda: float(store.off is None)
        )
        self._gauge(
            f"{name}_waiting_bytes", "Bytes still to write", lambda: writer.waiting
        )

    def watch_memory(
        self,
        events: Callable[[], Mapping[str, float]],
        gauges: Callable[[], Mapping[str, float]],
    ) -> None:
        """``events``, ``gauges``: by the names above; read at each scrape."""
        name, texts = "mlx_safe_memory", MEMORY_GAUGES
        self._count(name, MEMORY_EVENTS, events)
        self.registry.register(_Values(GaugeMetricFamily, name, texts, gauges))

    def render(self) -> bytes:
        """The registry in Prometheus's text format."""
        return generate_latest(self.registry)
