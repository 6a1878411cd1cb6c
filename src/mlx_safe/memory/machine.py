"""What the machine, the process and MLX say about memory, read at call time."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import _core

__all__ = ["Machine", "Usage", "others_hold", "read_machine", "sysctl", "usage"]

Sysctl = Callable[[str], "int | None"]


@dataclass(frozen=True)
class Machine:
    """Facts that do not change while the process runs. Sizes in bytes.

    Attributes:
        system: ``sys.platform``.
        device: name of the device that MLX computes on.
        gpu: that device is a GPU.
        total: memory that the process could use at most: RAM, or less in a
            container.
        recommended: Metal's recommendedMaxWorkingSetSize; None without Metal.
        wired_limit: ``iogpu.wired_limit_mb`` in bytes; None when it is 0, the
            system's own choice, or there is none.
        card: memory of the CUDA card; None where MLX computes on none.
    """

    system: str
    device: str
    gpu: bool
    total: int
    recommended: int | None = None
    wired_limit: int | None = None
    card: int | None = None


@dataclass(frozen=True)
class Usage:
    """What is used now. Bytes.

    Attributes:
        active: held by live MLX arrays.
        peak: the most since the last
            ``mx.reset_peak_memory``.
        pool: freed, but kept by MLX for reuse.
        footprint: the process, as the system counts it (macOS phys_footprint,
            which jetsam compares; Linux RSS); None where it cannot be read.
        available: what the system could still give; None where unknown.
        card_free: what the CUDA card could still give to any program, as its
            driver sees it; None where MLX computes on none.
    """

    active: int
    peak: int
    pool: int
    footprint: int | None
    available: int | None
    card_free: int | None = None

    @property
    def card_share(self) -> int | None:
        """What this process can have of the card: what is free, and what it holds."""
        if self.card_free is None:
            return None
        return self.card_free + self.active + self.pool

    @property
    def overhead(self) -> int:
        """What the process holds beside MLX's arrays and pool."""
        if self.footprint is None:
            return 0
        return max(0, self.footprint - self.active - self.pool)


def others_hold(machine: Machine, now: Usage) -> int | None:
    """Bytes of the card, or of the RAM, that other programs hold; None: not known."""
    if machine.card is not None and now.card_free is not None:
        return max(0, machine.card - now.card_free - now.active - now.pool)
    if now.available is None or not machine.total:
        return None
    own = now.footprint if now.footprint is not None else now.active + now.pool
    return max(0, machine.total - now.available - own)


def sysctl(name: str) -> int | None:
    """An integer of macOS's sysctl; None where there is no such name."""
    if sys.platform != "darwin":
        return None
    libc: Any = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
    # Integers have 4 or 8 bytes; both are little-endian on all that runs MLX.
    value = ctypes.c_uint64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    failed = libc.sysctlbyname(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return None if failed else int(value.value)


def _device_info() -> dict[str, Any]:
    import mlx.core as mx

    # mx.metal.device_info is deprecated since MLX 0.30 and warns on each call.
    read = getattr(mx, "device_info", None) or mx.metal.device_info
    return dict(read())


def _card(info: dict[str, Any]) -> tuple[int | None, int | None]:
    """Total and free memory of a CUDA card; Metal and the CPU name neither.

    MLX 0.31 to 0.32 asks the driver (NVML) at each call, other programs counted.
    """
    total, free = info.get("total_memory"), info.get("free_memory")
    if total is None or free is None:
        return None, None
    return int(total), int(free)


def read_machine(
    sysctl: Sysctl = sysctl, device_info: Callable[[], dict[str, Any]] = _device_info
) -> Machine:
    """The machine of this process. Imports MLX; the arguments are for tests."""
    info = device_info()
    recommended = info.get("max_recommended_working_set_size")
    wired_mb = sysctl("iogpu.wired_limit_mb")
    card, _ = _card(info)
    return Machine(
        system=sys.platform,
        device=str(info.get("device_name") or info.get("architecture") or "unknown"),
        gpu=recommended is not None or card is not None,
        total=sysctl("hw.memsize") or max(0, _core.system_memory()[1]),
        recommended=int(recommended) if recommended else None,
        wired_limit=wired_mb * 2**20 if wired_mb else None,
        card=card,
    )


def usage() -> Usage:
    """What MLX and this process use now. Any thread; some microseconds.

    On a CUDA card the driver is asked, which takes longer.
    """
    import mlx.core as mx

    footprint, _, available = _core.system_memory()
    card_free = None
    if mx.default_device().type == mx.gpu and not mx.metal.is_available():
        card_free = _card(_device_info())[1]
    return Usage(
        active=int(mx.get_active_memory()),
        peak=int(mx.get_peak_memory()),
        pool=int(mx.get_cache_memory()),
        footprint=footprint if footprint >= 0 else None,
        available=available if available >= 0 else None,
        card_free=card_free,
    )
