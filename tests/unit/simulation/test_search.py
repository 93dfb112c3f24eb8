"""Hundreds of short runs in which much fails; the same seed is the same run; and the auditor
finds what is broken on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest

from kvfabric.simulation.faults import POINTS
from kvfabric.simulation.nodes import factory
from kvfabric.simulation.search import Found, search
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.simulated import memory as simulated_memory
from kvfabric_nodes.simulated import pulls as simulated_pulls
from kvfabric_nodes.simulated.node import SimulatedNode
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.shards import Shard

RUNS, PART = 200, 20
# Runs that found something once.
FORMER = (114,)


def violations(seeds: Sequence[int]) -> list[str]:
    """What the runs found, each with the command that repeats it and with its faults."""
    found = [search(seed, factory()) for seed in seeds]
    return [
        f"kvfabric simulate --faults --seed {each.seed}: {each.violation}; {each.history}"
        for each in found
        if each.violation
    ]


@pytest.mark.parametrize("first", range(1, RUNS + 1, PART), ids=lambda first: f"from {first}")
def test_no_fault_breaks_a_book_a_byte_or_a_promise(first: int) -> None:
    seeds = range(first, first + PART)
    assert violations(seeds) == []


@pytest.mark.parametrize("seed", FORMER)
def test_what_was_found_once_stays_mended(seed: int) -> None:
    assert violations([seed]) == []


def test_every_step_at_which_faults_strike_is_reached() -> None:
    reached: Counter[str] = Counter()
    for seed in range(1, 21):
        reached += search(seed, factory()).reached
    assert set(POINTS) <= set(reached)


def test_readers_find_blocks_at_home_and_where_they_were_lent() -> None:
    found = [search(seed, factory()) for seed in range(1, 6)]
    assert sum(each.reads.home for each in found) > 100
    assert sum(each.reads.lent for each in found) > 20


# One seed, one history


def test_a_seed_repeats_its_history() -> None:
    first, again = search(3, factory()), search(3, factory())
    assert (first.digest, first.events) == (again.digest, again.events)
    assert first.digest != search(4, factory()).digest


def test_a_seed_repeats_its_history_in_another_process() -> None:
    """Nothing hangs on the order of sets or on addresses."""
    program = (
        "from kvfabric.simulation.nodes import factory\n"
        "from kvfabric.simulation.search import search\n"
        "print(search(3, factory()).digest)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert ran.stdout.strip() == search(3, factory()).digest


# What is broken on purpose is found


def first_violation(seeds: Sequence[int]) -> Found | None:
    for seed in seeds:
        found = search(seed, factory())
        if found.violation:
            return found
    return None


def test_bytes_that_changed_on_their_way_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: object, peer: str, lease: int, key: Key) -> bytes:
        return b"something else"

    monkeypatch.setattr(simulated_pulls.Sources, "read", damaged)
    for module in (simulated_pulls, simulated_memory):  # and nobody looks
        monkeypatch.setattr(module, "checksum", lambda payload: 0)
    found = first_violation(range(1, 10))
    assert found is not None
    assert "wrong bytes" in found.violation


def test_a_loan_that_nobody_remembers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: SimulatedNode, namespace: NamespaceId, key: Key) -> None:
        return None

    monkeypatch.setattr(SimulatedNode, "whereabouts", forget)
    monkeypatch.setattr("kvfabric.simulation.auditor.Auditor._known", lambda *arguments: [])
    found = first_violation(range(1, 10))
    assert found is not None
    assert "is lost" in found.violation or "a hole" in found.violation


def test_a_claim_that_is_never_ended_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    end_of_claim, calls = NodeCore.end_of_claim, [0]

    def leak(self: NodeCore, namespace: NamespaceId, key: Key, now_s: float) -> None:
        calls[0] += 1
        if calls[0] % 40:
            end_of_claim(self, namespace, key, now_s)

    monkeypatch.setattr(NodeCore, "end_of_claim", leak)
    found = first_violation(range(1, 10))
    assert found is not None


def test_a_shard_that_goes_while_it_is_needed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    drop, calls = NodeCore.drop, [0]

    def lose(self: NodeCore, shard: Shard, what: str, why: str, now_s: float) -> None:
        drop(self, shard, what, why, now_s)
        calls[0] += 1
        if what == "lent" and calls[0] % 5 == 0:  # and another one, that was not lent
            for other in list(self.shards):
                if self.shards.claimed(other) and not other.extent.holders and not other.pinned:
                    drop(self, other, "evicted", "by mistake", now_s)
                    return

    monkeypatch.setattr(NodeCore, "drop", lose)
    found = first_violation(range(1, 20))
    assert found is not None
