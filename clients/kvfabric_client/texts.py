"""Sizes and times in words, for people."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(size_bytes: float) -> str:
    """Three digits and a unit: 512 B, 1.5 GiB."""
    value, index = float(size_bytes), 0
    while value >= 999.5 and index < len(_UNITS) - 1:
        value, index = value / 1024, index + 1
    digits = 0 if index == 0 or value >= 99.95 else 1
    return f"{value:.{digits}f} {_UNITS[index]}"


def duration(seconds: float) -> str:
    """The two largest units that matter: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest_s = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60} h {minutes % 60} min"
