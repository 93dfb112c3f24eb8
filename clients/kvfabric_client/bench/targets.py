"""What the data path has set itself, as a share of its limits: without checksums, and with."""

from __future__ import annotations

from typing import Final

from kvfabric_client.bench.report import AtLeast, AtMostOver, Target

UNCHECKED: Final = "_unchecked"
KIB: Final = 1 << 10
MIB: Final = 1 << 20

_SPEEDS: Final = {  # as it comes, unchecked
    ("shm_put", MIB): (0.50, 0.80),
    ("shm_put", 4 * MIB): (0.55, 0.92),
    ("shm_get", None): (0.70, 0.85),
    ("tcp_put", None): (0.80, 0.85),
    ("tcp_get", None): (0.80, 0.85),
    ("move_unthrottled", None): (0.80, 0.80),
    ("readers_during_throttled_move", None): (0.75, 0.75),
}
_TIMES_US: Final = {"shm_view": 40.0, "match_400": 250.0}  # over a bare round trip


def target_of(name: str, size_bytes: int) -> Target | None:
    """The target of a row; None where there is none."""
    if name in _TIMES_US:
        return AtMostOver(_TIMES_US[name])
    base = name.removesuffix(UNCHECKED)
    pair = _SPEEDS.get((base, size_bytes)) or _SPEEDS.get((base, None))
    return AtLeast(pair[name != base]) if pair else None
