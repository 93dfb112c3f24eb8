"""Which keys a query row sees: position t where t < hi and (t >= lo or t < sinks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfabric.errors import Refused

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sight:
    """What the query rows of one call see: int64 arrays of a bound per row, and the sinks."""

    lo: Positions
    hi: Positions
    sinks: int = 0

    def sees(self, row: int, position: int) -> bool:
        return position < self.hi[row] and (position >= self.lo[row] or position < self.sinks)


def sight(
    rows: int, positions: Sequence[int] | Positions, visible: int, window: int = 0, sinks: int = 0
) -> Sight:
    """The bounds of rows at these absolute positions, before `visible`.

    A row sees keys up to its own position (causal within a chunk), of these the last `window`
    (0: all; its own position counts), and the first `sinks` of the context all the same. No
    positions: every row sees all before `visible`, as if it stood right behind.
    """
    if len(positions) not in (0, rows):
        raise Refused(f"{len(positions)} positions for {rows} query rows; give none or one each")
    if min(visible, window, sinks) < 0:
        raise Refused(f"visible {visible}, window {window}, sinks {sinks}: none may be negative")
    if not len(positions) and not window:
        return Sight(np.zeros(rows, np.int64), np.full(rows, visible, np.int64))
    at = np.asarray(positions, np.int64) if len(positions) else np.full(rows, visible, np.int64)
    lo = at - window + 1 if window else np.zeros(rows, np.int64)
    return Sight(np.maximum(lo, 0), np.minimum(at + 1, visible), sinks if window else 0)


def seen(sight: Sight) -> list[tuple[int, int]]:
    """What the rows of one query see at most, as ascending (first, end): the sinks, and all from
    the lowest bound to the highest. What lies outside is neither attended nor missed."""
    if not len(sight.hi):
        return []
    low, high = min(sight.lo.tolist()), max(sight.hi.tolist())  # of few rows, faster than numpy's
    sinks = min(sight.sinks, low, high)
    return [(first, end) for first, end in ((0, sinks), (low, high)) if first < end]


def within(
    ranges: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The positions that lie in a range of both; each has ascending ranges that do not overlap."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(ranges) and j < len(others):
        first, end = max(ranges[i][0], others[j][0]), min(ranges[i][1], others[j][1])
        if first < end:
            found.append((first, end))
        if ranges[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found
