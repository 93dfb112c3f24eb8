"""Requests: as many and as long as their parameters say, and the same for the same seed."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import pytest

from kvfabric.simulation.parameters import MIXED, UNIFORM, Engine, Lengths
from kvfabric.simulation.workload import requests


def test_one_seed_gives_one_list() -> None:
    first = list(requests(MIXED, 16, 500, 7))
    assert first == list(requests(MIXED, 16, 500, 7))
    assert first != list(requests(MIXED, 16, 500, 8))


def test_arrivals_are_poisson_at_the_stated_rate_at_every_instance() -> None:
    found = list(requests(UNIFORM, 4, 8000, 1))
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(found)]
    mean = 1 / (4 * UNIFORM.per_second)
    assert statistics.fmean(gaps) == pytest.approx(mean, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(mean, rel=0.1)  # exponential: equal to it
    counts = Counter(each.node for each in found)
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 1800


def test_kinds_come_in_their_shares_and_where_they_belong() -> None:
    found = list(requests(MIXED, 10, 40_000, 1))
    counts = Counter(each.kind for each in found)
    assert counts["long"] / len(found) == pytest.approx(0.008, rel=0.2)
    assert {each.node for each in found if each.kind == "long"} == {0, 2, 4, 6, 8}
    assert {each.node for each in found if each.kind == "short"} == set(range(10))
    assert all(220_000 <= e.prompt <= 300_000 for e in found if e.kind == "long")


@pytest.mark.parametrize(
    ("lengths", "median"),
    [
        (Lengths("log-normal", 100, 161), 100.0),
        (Lengths("log-uniform", 1000, 100_000), 10_000.0),
        (Lengths("constant", 12), 12.0),
    ],
    ids=["log-normal", "log-uniform", "constant"],
)
def test_lengths_have_the_stated_median_and_mean(lengths: Lengths, median: float) -> None:
    steps = 20_001
    normal = statistics.NormalDist()
    drawn = [
        lengths.at(part, normal.inv_cdf(part))
        for part in (number / steps for number in range(1, steps))
    ]
    assert statistics.median(drawn) == pytest.approx(median, rel=0.01)
    assert statistics.fmean(drawn) == pytest.approx(lengths.mean, rel=0.03)


def test_an_instance_is_as_large_and_as_fast_as_the_table_says() -> None:
    engine = Engine()
    assert engine.token_bytes == 327_680
    assert engine.kv_bytes == pytest.approx(142e9, rel=0.001)
    assert engine.step_s(1, 0) == pytest.approx(138e9 / (4 * 2039e9 * 0.8))
    full = engine.kv_bytes / engine.token_bytes
    assert engine.step_s(1, full) == pytest.approx((138e9 + 142e9) / (4 * 2039e9 * 0.8), rel=0.001)
