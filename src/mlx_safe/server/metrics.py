"""The metrics of ``/metrics``. Thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from .._install import installed_versions
from .._version import __version__
from ..metrics import Collector as ProcessMetrics
from .exchange import Exchange
from .live import Live

if TYPE_CHECKING:
    from ..kv.store import Store
    from ..kv.writer import Writer
    from .mlx_lm.prompt_cache import PromptCache

__all__ = ["CONTENT_TYPE", "Metrics", "samples_of"]

# A sample more for each series, the time of its first: nobody reads it, and the process
# is this server's own.
disable_created_metrics()  # type: ignore[no-untyped-call]

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
    "not_cheaper": "Restores left out, as reading the prompt took less time",
    "written": "Files written",
    "written_bytes": "Bytes written",
    "not_written": "Not written: no room, over the bound, withdrawn, too dear",
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

# By `Headroom.gauges`; what MLX and the process have besides, `mlx_safe.metrics` tells.
MEMORY_GAUGES = {
    "ceiling": "Bytes that may be active now",
    "ceiling_static": "Bytes that may be active when faults are forgotten",
    "model": "Bytes of the model",
    "other": "Bytes that other programs hold, of the card or of the RAM",
    "prompt_cache_limit": "Bytes that the prompt cache may hold",
}

# In seconds: from a small model on a fast machine to a long prompt on a slow one.
LONG_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)


class _One(CollectorRegistry):
    """A registry of one family that has been collected."""

    def __init__(self, family: Metric) -> None:
        super().__init__()
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


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


class _Live(Collector):
    """The queue, the states and the step, read all at once."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def collect(self) -> Iterable[GaugeMetricFamily]:
        states, (waiting, oldest) = self._live.states(), self._live.queue()
        yield GaugeMetricFamily(
            "mlx_safe_requests_in_flight",
            "Requests that have come and not ended",
            sum(states.values()),
        )
        family = GaugeMetricFamily(
            "mlx_safe_requests_in_state", "Of those, by state", labels=["state"]
        )
        for state, count in states.items():
            family.add_metric([state], count)
        yield family
        name = "mlx_safe_queue"
        yield GaugeMetricFamily(
            f"{name}_requests", "Requests whose prompt is not being read", waiting
        )
        yield GaugeMetricFamily(
            f"{name}_oldest_seconds",
            "How long the one has waited that waits longest",
            oldest,
        )
        yield GaugeMetricFamily(
            "mlx_safe_requests_held",
            "Of them, those that wait for memory",
            states["held"],
        )
        family = GaugeMetricFamily(
            "mlx_safe_step_age_seconds",
            "How long the running step has taken so far; 0 where none runs",
            labels=["kind"],
        )
        for kind, seconds in self._live.steps().items():
            family.add_metric([kind], seconds)
        yield family


def samples_of(counter: Counter) -> list[tuple[dict[str, str], float]]:
    """The labels and the value of each of a counter's samples. Any thread."""
    return [
        (sample.labels, sample.value)
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    ]


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        live: what goes on now. tokens: those made so far.
        ready: 1 while requests can be served.
    """

    def __init__(
        self,
        live: Live,
        tokens: Callable[[], int],
        ready: Callable[[], float],
    ) -> None:
        self.registry = CollectorRegistry()
        # By the family's name: its samples, and the text that was made of them.
        self._texts: dict[str, tuple[list[Sample], bytes]] = {}
        self.requests = Counter(
            "mlx_safe_requests",
            "Answers by how they ended, the code of the error and the HTTP status",
            ["outcome", "code", "status"],
            registry=self.registry,
        )
        self.failures = Counter(
            "mlx_safe_generation_failures",
            "Steps and answers that failed, by the code of the error response",
            ["code"],
            registry=self.registry,
        )
        self.replays = self._counter(
            "mlx_safe_replays", "Requests run again after a failure"
        )
        self._replayed = self._counter(
            "mlx_safe_requests_replayed", "Answers that were whole after a replay"
        )
        self.resets = self._counter(
            "mlx_safe_resets", "Times the generation state was reset"
        )
        self.truncations = self._counter(
            "mlx_safe_prompts_truncated", "Prompts that were cut to --max-prompt-tokens"
        )
        self._prompt_tokens = self._counter(
            "mlx_safe_prompt_tokens", "Tokens of prompts, as usage counts them"
        )
        self._cached_tokens = self._counter(
            "mlx_safe_prompt_tokens_cached", "Of them, those in the prompt cache"
        )
        self._make_times()
        self.process = ProcessMetrics()
        self.registry.register(self.process)
        self.registry.register(_Live(live))
        self._count(
            "mlx_safe",
            {"generated_tokens": "Tokens of answers"},
            lambda: {"generated_tokens": tokens()},
        )
        self._gauge("mlx_safe_ready", "1 while requests can be served", ready)
        self._make_info()

    def _make_times(self) -> None:
        self._duration = self._histogram(
            "mlx_safe_request_duration_seconds",
            "From a request to the end of its answer, of those that were to generate",
            LONG_S,
        )
        self._first_token = self._histogram(
            "mlx_safe_time_to_first_token_seconds",
            "From a request to its first token",
            LONG_S,
        )
        self._token = self._histogram(
            "mlx_safe_time_per_token_seconds",
            "From one token to the next, averaged over an answer",
            TOKEN_S,
        )

    def _make_info(self) -> None:
        info = Gauge(
            "mlx_safe_build_info",
            "Always 1; the labels say what runs",
            ["version", "mlx", "mlx_lm"],
            registry=self.registry,
        )
        versions = installed_versions("mlx", "mlx_lm")
        info.labels(__version__, versions["mlx"], versions["mlx_lm"]).set(1)

    def count(self, exchange: Exchange) -> None:
        """An answer has ended: once for each."""
        status = "none" if exchange.status is None else str(exchange.status)
        self.requests.labels(exchange.outcome, exchange.code, status).inc()
        if not exchange.requests:
            return
        self._replayed.inc(exchange.outcome == "ok" and exchange.replays > 0)
        self._prompt_tokens.inc(exchange.prompt_tokens or 0)
        self._cached_tokens.inc(exchange.cached_tokens or 0)
        self._duration.observe(exchange.duration)
        if exchange.first_token_s is not None:
            self._first_token.observe(exchange.first_token_s)
        if exchange.token_s is not None:
            self._token.observe(exchange.token_s)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=bounds, registry=self.registry)

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

    def watch_prompt_cache(self, cache: PromptCache) -> None:
        """``cache``: a `prompt_cache.PromptCache`; read at each scrape."""
        name = "mlx_safe_prompt_cache"
        self._count(name, PROMPT_CACHE_EVENTS, lambda: cache.events)
        self._gauge(f"{name}_bytes", "Bytes of its entries", lambda: cache.nbytes)
        self._gauge(f"{name}_entries", "Entries in it", lambda: len(cache))

    def watch_kv_disk(self, store: Store, writer: Writer) -> None:
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
        peak: Callable[[], int],
    ) -> None:
        """Read at each scrape.

        Args:
            events, gauges: by the names above. peak: bytes; MLX's own is reset.
        """
        self._count("mlx_safe_memory", MEMORY_EVENTS, events)

        def read() -> Mapping[str, float]:
            return {f"{name}_bytes": value for name, value in gauges().items()}

        self.process.peak = peak
        texts = {f"{name}_bytes": text for name, text in MEMORY_GAUGES.items()}
        self.registry.register(
            _Values(GaugeMetricFamily, "mlx_safe_memory", texts, read)
        )

    def render(self) -> bytes:
        """The registry in Prometheus's text format."""
        return b"".join(map(self._text, self.registry.collect()))

    def _text(self, family: Metric) -> bytes:
        """Of one family. Most have the samples of the scrape before, and its text.

        To write all of them takes prometheus_client (0.26) 1 ms of the GIL's time.
        """
        samples, text = self._texts.get(family.name, (None, b""))
        if samples != family.samples:
            text = generate_latest(_One(family))
            self._texts[family.name] = (family.samples, text)
        return text
