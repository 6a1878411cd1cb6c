"""Prometheus metrics of a process under mlx_safe: `register` them with a registry.

For servers and programs of one's own; ``mlx-safe serve`` has them, and many more, on
its ``/metrics``. What each is and what to alert on: docs/metrics.md. Needs
``prometheus-client``, which is imported when `register` is called.
"""

from __future__ import annotations

import sys
import threading

from . import _core, _reports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["Collector", "register"]

COUNTERS = {
    "mlx_safe_faults": "Faults of the GPU",
    "mlx_safe_faults_dropped": "Faults whose record was lost",
    "mlx_safe_faults_injected": "Faults that mlx_safe.testing has injected",
    "mlx_safe_reports_written": "Crash reports written",
    "mlx_safe_reports_failed": "Crash reports that could not be written",
    "mlx_safe_reports_suppressed": "Crash reports not written, as there were enough",
}
GAUGES = {
    "mlx_safe_hooks_verified": "1 while faults of Metal are caught, as a test has seen",
    "mlx_safe_memory_active_bytes": "Bytes that MLX's arrays hold",
    "mlx_safe_memory_peak_bytes": "Most bytes that were active since the start",
    "mlx_safe_memory_pool_bytes": "Bytes that MLX keeps for reuse",
    "mlx_safe_memory_footprint_bytes": "Bytes of the process as the system counts them",
    "mlx_safe_memory_available_bytes": "Bytes that the machine could give to programs",
}


class Collector:
    """A collector of ``prometheus_client``. Each scrape reads anew; any thread.

    Attributes:
        peak: bytes; the most that was active where somebody resets MLX's own peak.
            Any thread.
    """

    def __init__(self) -> None:
        self.peak: Callable[[], int] = lambda: 0

    def collect(self) -> Iterator[Any]:
        """One family for each name of `COUNTERS` and `GAUGES` that is known here."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counts, gauges = self._counts(), self._gauges()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(name, text, counts[name])
        for name, text in GAUGES.items():
            if name in gauges:
                yield GaugeMetricFamily(name, text, gauges[name])

    @staticmethod
    def _counts() -> dict[str, float]:
        written, failed = _core.report_counts()
        testing = sys.modules.get("mlx_safe.testing")
        return {
            "mlx_safe_faults": _core.epoch(),
            "mlx_safe_faults_dropped": _core.dropped(),
            "mlx_safe_faults_injected": 0 if testing is None else testing.fired(),
            "mlx_safe_reports_written": written,
            "mlx_safe_reports_failed": failed,
            "mlx_safe_reports_suppressed": _reports.suppressed(),
        }

    def _gauges(self) -> dict[str, float]:
        prefix = "mlx_safe_memory"
        found: dict[str, float] = {
            "mlx_safe_hooks_verified": float(_core.metal_status()["verified"]),
        }
        footprint, _, available = _core.system_memory()
        if footprint >= 0:
            found[f"{prefix}_footprint_bytes"] = footprint
        if available >= 0:
            found[f"{prefix}_available_bytes"] = available
        mx = sys.modules.get("mlx.core")
        if mx is not None and hasattr(mx, "get_active_memory"):
            found[f"{prefix}_active_bytes"] = mx.get_active_memory()
            found[f"{prefix}_peak_bytes"] = max(self.peak(), mx.get_peak_memory())
            found[f"{prefix}_pool_bytes"] = mx.get_cache_memory()
        return found


_registered: list[Any] = []
_registering = threading.Lock()


def register(registry: Any = None) -> None:
    """Has ``registry`` tell of this process: faults, reports, hooks and memory.

    Calling it again for the same registry changes nothing.

    Args:
        registry: a ``prometheus_client.CollectorRegistry``; None: the default one.

    Raises:
        ModuleNotFoundError: prometheus-client is not installed.
    """
    import prometheus_client

    registry = prometheus_client.REGISTRY if registry is None else registry
    with _registering:
        if not any(known is registry for known in _registered):
            registry.register(Collector())
            _registered.append(registry)
