"""What /metrics tells Prometheus. Thread-safe."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from .. import _core

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
        self._gauge("mlx_safe_faults", "Faults of the GPU so far", _core.epoch)
        self._gauge(
            "mlx_safe_faults_dropped", "Faults whose record was lost", _core.dropped
        )
        self._gauge("mlx_safe_requests_in_flight", "Requests taken", in_flight)
        self._gauge("mlx_safe_ready", "1 while requests can be served", ready)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)

    def render(self) -> bytes:
        """The registry in Prometheus's text format."""
        return generate_latest(self.registry)
