"""Sets of token positions, as runs: (first, end) pairs, ascending, apart from each other.

`within`, of `kvfabric.attention.masks`, is what two have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Run = tuple[int, int]
Runs = list[Run]


def joined(runs: Iterable[Run]) -> Runs:
    """The union of any runs, in any order."""
    found: Runs = []
    for first, end in sorted(runs):
        if first >= end:
            continue
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return found


def without(ours: Sequence[Run], theirs: Sequence[Run]) -> Runs:
    """What is in `ours` alone."""
    found: Runs = []
    j = 0
    for first, end in ours:
        while j < len(theirs) and theirs[j][1] <= first:
            j += 1
        at, k = first, j
        while k < len(theirs) and theirs[k][0] < end:
            if at < theirs[k][0]:
                found.append((at, theirs[k][0]))
            at = max(at, theirs[k][1])
            k += 1
        if at < end:
            found.append((at, end))
    return found


def count(runs: Iterable[Run]) -> int:
    return sum(end - first for first, end in runs)
