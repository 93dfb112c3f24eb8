"""The bench of attention, small, on real nodes: one of them behind a network of its own, where
this machine allows that."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from kvfabric.errors import Refused
from kvfabric_client.bench.attention.hosts import FarHost, why_not
from kvfabric_client.bench.attention.plan import (
    ADDED,
    CROSSOVER,
    LIMITED,
    RACE,
    SDK,
    TOTAL,
    WIRE,
    Plan,
)
from kvfabric_client.bench.attention.run import run

MIB = 1 << 20
KERNEL = "kernel_bf16_d64_g3_16k"
HERE = [KERNEL, ADDED, TOTAL, SDK, RACE, CROSSOVER, "stacked_16x8k_bf16", WIRE]


def test_a_run_gives_every_figure_beside_its_limit() -> None:
    told: list[str] = []
    plan = Plan(HERE, rounds=5, memory_bytes=128 * MIB)
    report = run(plan, lambda case: told.append(case.name))
    assert [row.name for row in report.rows] == HERE
    assert all(row.value > 0 and row.limit > 0 for row in report.rows)
    chosen = report.machine["kernels"]
    assert isinstance(chosen, dict)
    assert chosen.keys() == {KERNEL}
    assert len(told) == plan.steps


def test_a_slower_network_is_made_where_the_machine_allows_it_and_ends_with_the_bench() -> None:
    names = [RACE + LIMITED]
    report = run(Plan(names, rounds=5, memory_bytes=128 * MIB))
    assert [row.name for row in report.rows] == names or report.skipped.keys() == set(names)


@pytest.mark.skipif(bool(why_not()), reason="needs root and iproute2 for network namespaces")
def test_the_far_host_goes_with_its_holder() -> None:
    try:
        host = FarHost(10)
    except Refused as error:
        pytest.skip(str(error))
    with contextlib.closing(host):
        assert host.link in _interfaces()
    assert host.link not in _interfaces()


def _interfaces() -> list[str]:
    return [path.name for path in Path("/sys/class/net").iterdir()]
