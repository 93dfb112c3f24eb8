"""Rounds measure a case and its limit side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from kvfabric.errors import Refused
from kvfabric_client.bench.rounds import MIN_ROUNDS, Case, run_rounds, together


def _figures(log: list[str], name: str, figures: Iterable[float]) -> Callable[[], float]:
    coming = iter(figures)

    def measure() -> float:
        log.append(name)
        return next(coming)

    return measure


def test_rows_are_medians_without_the_warm_up() -> None:
    log: list[str] = []
    case = Case(
        "put",
        1024,
        "GB/s",
        _figures(log, "value", [99.0, 5.0, 1.0, 3.0, 2.0, 4.0]),
        _figures(log, "limit", [0.1, 6.0, 6.0, 6.0, 5.0, 7.0]),
    )
    (row,) = run_rounds([case], 5)
    assert (row.name, row.size_bytes, row.unit) == ("put", 1024, "GB/s")
    assert (row.value, row.limit) == (3.0, 6.0)


def test_a_case_and_its_limit_take_turns_in_going_first() -> None:
    log: list[str] = []
    case = Case("put", 0, "us", _figures(log, "v", [1.0] * 6), _figures(log, "l", [1.0] * 6))
    run_rounds([case], 5)
    assert "".join(log) == "lv" + "vl" + "lv" + "vl" + "lv" + "vl"


def test_all_cases_are_measured_in_every_round_and_progress_is_told() -> None:
    log: list[str] = []
    cases = [
        Case(name, 0, "us", _figures(log, name, [1.0] * 6), _figures([], "", [1.0] * 6))
        for name in "ab"
    ]
    told: list[str] = []
    run_rounds(cases, 5, lambda case: told.append(case.name))
    assert log == ["a", "b"] * 6
    assert told == ["a", "b"] * 6


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(Refused, match=f"at least {MIN_ROUNDS}"):
        run_rounds([], MIN_ROUNDS - 1)


def test_a_figure_and_its_limit_can_be_taken_in_one_go() -> None:
    pairs = iter([(1.0, 10.0), (2.0, 20.0)])
    measure, limit = together(lambda: next(pairs))
    assert (limit(), measure(), measure(), limit()) == (10.0, 1.0, 2.0, 20.0)
