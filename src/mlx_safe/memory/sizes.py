"""Sizes in text. As mlx-lm's ``--prompt-cache-bytes``: G is 10^9, not 2^30."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["flag_size", "format_size", "parse_size", "parse_size_or_zero"]

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I?)?B?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of ``"20G"``, ``"1.5 GB"``, ``"512M"``, ``"36GiB"`` or ``"1000000"``.

    K, M, G and T (with or without B) are powers of 1000, KiB, MiB, GiB and TiB
    powers of 1024.

    Raises:
        ValueError: it is no size, or not over zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        unit = (match[2] or "").upper()
        size = int(Decimal(match[1]) * {**_DECIMAL, **_BINARY}[unit])
        if 0 < size < 2**63:
            return size
    raise ValueError(f"must be a size over zero such as 20G or 512M, not {text!r}")


def parse_size_or_zero(text: str) -> int:
    """As `parse_size`, and ``"0"`` is none at all."""
    return 0 if text.strip() == "0" else parse_size(text)


def format_size(size: float) -> str:
    """``size`` in the unit that suits it, such as ``"9.5 GB"``; G is 10^9."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        # From where rounding to one digit gives 1.0 of the unit.
        if abs(size) >= 0.99995 * factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def flag_size(size: int) -> str:
    """``size`` as a flag takes it, not more than it: ``"9.5G"`` or ``"2.3M"``."""
    for unit, factor in (("G", 10**9), ("M", 10**6)):
        if size >= factor:
            return f"{size * 10 // factor / 10:g}{unit}"
    return str(size)
