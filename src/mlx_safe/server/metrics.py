"""What /metrics tells Prometheus. Thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily
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


class _Events(Collector):
    """One event of a `collections.Counter` that somebody else counts in."""

    def __init__(self, events: Mapping[str, int], event: str, text: str) -> None:
        self._events = events
        self._event = event
        self._text = text

    def collect(self) -> Iterable[CounterMetricFamily]:
        name = f"mlx_safe_prompt_cache_{self._event}"
        yield CounterMetricFamily(name, self._text, self._events[self._event])


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
        for event, text in PROMPT_CACHE_EVENTS.items():
            self.registry.register(_Events(cache.events, event, text))
        name = "mlx_safe_prompt_cache"
        self._gauge(f"{name}_bytes", "Bytes of its entries", lambda: cache.nbytes)
        self._gauge(f"{name}_entries", "Entries in it", lambda: len(cache))

    def render(self) -> bytes:
        """The registry in Prometheus's text format."""
        return generate_latest(self.registry)
