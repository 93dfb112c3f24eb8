"""What the rates of a run let expect, and from which length on attending far away is faster."""

from __future__ import annotations

from collections.abc import Sequence


def expected_ratio(fetch_s: float, kernel_s: float, round_trip_s: float, calls: int) -> float:
    """How many times faster it is to attend remotely than to fetch the same and attend it at home,
    where nothing costs more than bare bytes, kernels and round trips."""
    attend_s = kernel_s + calls * round_trip_s
    return (fetch_s + attend_s) / attend_s


def crossover(lengths: Sequence[int], fetch_s: Sequence[float], attend_s: Sequence[float]) -> float:
    """The tokens from which on attending remotely is faster at every length that was measured.

    Between two lengths it is where lines through their times meet. The first length, if it is
    faster there already; beyond the last, the last.
    """
    gains = [fetch - attend for fetch, attend in zip(fetch_s, attend_s, strict=True)]
    slower = max((index for index, gain in enumerate(gains) if gain < 0), default=-1)
    if slower < 0:
        return float(lengths[0])
    if slower == len(lengths) - 1:
        return float(lengths[-1])
    share = -gains[slower] / (gains[slower + 1] - gains[slower])
    return lengths[slower] + share * (lengths[slower + 1] - lengths[slower])
