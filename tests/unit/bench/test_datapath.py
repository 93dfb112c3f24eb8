"""The whole data path bench, small, on a real node and a real peer."""

from __future__ import annotations

from kvfabric_client.bench import datapath
from kvfabric_client.bench.plan import NAMES, Plan

KIB = 1 << 10
SMALL = Plan(sizes=[256 * KIB], rounds=5, memory_bytes=64 << 20)


def test_a_run_gives_every_figure_beside_its_limit() -> None:
    told: list[str] = []
    report = datapath.run(SMALL, lambda case: told.append(case.name))
    assert [row.name for row in report.rows] == list(NAMES)
    assert all(row.value > 0 and row.limit > 0 for row in report.rows)
    assert {row.unit for row in report.rows} == {"GB/s", "us"}
    assert len(told) == SMALL.steps
