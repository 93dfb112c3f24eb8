"""Rounds: each measures every case and its limit once, side by side; medians are reported.

What slows the machine for a while then slows both, and their ratio stands.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvfabric.errors import Refused
from kvfabric_client.bench.report import Row, Target

MIN_ROUNDS = 5

Measure = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Case:
    """A figure to measure, in `unit`, and how to measure its limit."""

    name: str
    size_bytes: int
    unit: str
    measure: Measure
    limit: Measure
    target: Target | None = None


def together(both: Callable[[], tuple[float, float]]) -> tuple[Measure, Measure]:
    """A figure and its limit that are taken in one go, for a `Case` that asks for one by one."""
    kept: dict[int, list[float]] = {0: [], 1: []}

    def take(which: int) -> float:
        if not kept[which]:
            for each, figure in enumerate(both()):
                kept[each].append(figure)
        return kept[which].pop(0)

    return lambda: take(0), lambda: take(1)


def run_rounds(
    cases: Sequence[Case], rounds: int, advance: Callable[[Case], None] = lambda case: None
) -> list[Row]:
    """One row per case, from `rounds` rounds after one that only warms up.

    Which of the two comes first changes from round to round. `advance` is called after
    each case of each round, the warm-up's too. Refused below MIN_ROUNDS.
    """
    if rounds < MIN_ROUNDS:
        raise Refused(f"{rounds} rounds make no median; give at least {MIN_ROUNDS}")
    values: list[list[float]] = [[] for _ in cases]
    limits: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds + 1):
        for index, case in enumerate(cases):
            pair = [(case.measure, values[index]), (case.limit, limits[index])]
            for measure, figures in pair if turn % 2 else reversed(pair):
                figures.append(measure())
            advance(case)
    return [
        Row(
            case.name,
            case.size_bytes,
            statistics.median(values[index][1:]),
            case.unit,
            statistics.median(limits[index][1:]),
            case.target,
        )
        for index, case in enumerate(cases)
    ]
