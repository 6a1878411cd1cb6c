"""What /metrics tells Prometheus. Thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .. import _core, _reports

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


PROMPT_CACHE_EVENTS = {
    "hits": "Requests that found part of their prompt in the prompt cache",
    "misses": "Requests that found nothing in the prompt cache",
    "reused_tokens": "Prompt tokens that were in the prompt cache",
    "evictions": "Entries of the prompt cache that went to make room",
    "too_large": "Entries over the limit by themselves, which were not stored",
    "dropped": "Entries dropped after a failure",
}


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
    "prompt_cache_limit": "Bytes that the prompt cache may hold",
    "held": "Requests that wait for memory now",
    "running": "Requests that were admitted and run now",
}


class _Events(Collector):
    """Events of a `collections.Counter` that somebody else counts in."""

    def __init__(
        self, prefix: str, texts: Mapping[str, str], events: Mapping[str, int]
    ) -> None:
        self._prefix = prefix
        self._texts = texts
        self._events = events

    def collect(self) -> Iterable[CounterMetricFamily]:
        for event, text in self._texts.items():
            name = f"mlx_safe_{self._prefix}_{event}"
            yield CounterMetricFamily(name, text, self._events[event])


class _Gauges(Collector):
    """Values that are read all at once."""

    def __init__(
        self,
        prefix: str,
        texts: Mapping[str, str],
        read: Callable[[], Mapping[str, float]],
    ) -> None:
        self._prefix = prefix
        self._texts = texts
        self._read = read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        values = self._read()
        for name, text in self._texts.items():
            if name in values:
                full = f"mlx_safe_{self._prefix}_{name}"
                yield GaugeMetricFamily(full, text, values[name])


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
            "Generation steps that failed, by the code that clients were told",
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
        self._gauge("mlx_safe_faults", "Faults of the GPU so far", _core.epoch)
        self._gauge(
            "mlx_safe_faults_dropped", "Faults whose record was lost", _core.dropped
        )
        for name, value in (
            ("written", lambda: _core.report_counts()[0]),
            ("failed", lambda: _core.report_counts()[1]),
            ("suppressed", _reports.suppressed),
        ):
            self._gauge(f"mlx_safe_reports_{name}", f"Crash reports {name}", value)
        self._gauge("mlx_safe_requests_in_flight", "Requests taken", in_flight)
        self._gauge("mlx_safe_ready", "1 while requests can be served", ready)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)

    def watch_prompt_cache(self, cache: Any) -> None:
        """``cache``: a `prompt_cache.PromptCache`; read at each scrape."""
        self.registry.register(
            _Events("prompt_cache", PROMPT_CACHE_EVENTS, cache.events)
        )
        name = "mlx_safe_prompt_cache"
        self._gauge(f"{name}_bytes", "Bytes of its entries", lambda: cache.nbytes)
        self._gauge(f"{name}_entries", "Entries in it", lambda: len(cache))

    def watch_memory(self, admission: Any) -> None:
        """``admission``: an `admission.Admission`; read at each scrape."""
        events, gauges = MEMORY_EVENTS, MEMORY_GAUGES
        self.registry.register(_Events("memory", events, admission.events))
        self.registry.register(_Gauges("memory", gauges, admission.gauges))

    def render(self) -> bytes:
        """The registry in Prometheus's text format."""
        return generate_latest(self.registry)
