"""Debts that should end early: in a circle, of a creditor in need, of a debtor with room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.manager.talking_nodes import GIB, MIB, Talker, held

from kvfabric.lending.loans import Loan
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.repaying import AGAIN_S, CIRCLE_RECALL_S, REPAY_BYTES
from kvfabric.rpc.v1.control_pb2 import Command

FULL = 1 * GIB  # free bytes of a node without room, but not in need


@pytest.fixture
def core() -> Iterator[ManagerCore]:
    core = ManagerCore(5.0, 0.0)
    yield core
    core.check()


def settle(talkers: list[Talker], now_s: float, loans: list[Loan], free_bytes: int) -> None:
    """All report their loans and that they have so much left, all of the rest in use."""
    for each in talkers:
        mine = [loan for loan in loans if each.name in (loan.debtor, loan.creditor)]
        each.beat(now_s, free_bytes=free_bytes, loans=mine)


def joined(core: ManagerCore, *names: str) -> list[Talker]:
    talkers = [Talker(core, name) for name in names]
    for each in talkers:
        each.register(0.0, free_bytes=FULL)
    return talkers


def taken(talkers: list[Talker], now_s: float) -> dict[str, list[Command]]:
    found = {each.name: list(each.beat(now_s).commands) for each in talkers}
    return {name: commands for name, commands in found.items() if commands}


def test_who_owes_in_a_circle_is_asked_to_bring_the_least_debt_home(core: ManagerCore) -> None:
    nodes = joined(core, "a", "b", "c")
    loans = [held("a", "b", 3 * MIB, 1), held("b", "a", 2 * MIB, 2), held("c", "a", MIB, 3)]
    settle(nodes, 1.0, loans, FULL)
    core.tick(1.0)

    told = taken(nodes, 1.1)
    assert told.keys() == {"a", "b"}
    assert told["a"][0].bring_home == Command.BringHome(loan=1, size_bytes=2 * MIB)
    assert told["b"][0].bring_home == Command.BringHome(loan=2, size_bytes=2 * MIB)
    assert told["a"][0].why == "a circle of debts: a owes b owes a"


def test_the_same_debt_is_asked_for_again_only_after_a_while(core: ManagerCore) -> None:
    nodes = joined(core, "a", "b")
    settle(nodes, 1.0, [held("a", "b", MIB, 1), held("b", "a", MIB, 2)], FULL)
    core.tick(1.0)
    assert taken(nodes, 1.1).keys() == {"a", "b"}
    core.tick(4.0)
    assert taken(nodes, 4.1) == {}
    core.tick(1.0 + AGAIN_S + 1)
    assert taken(nodes, 17.1).keys() == {"a", "b"}


def test_a_large_debt_is_repaid_in_pieces(core: ManagerCore) -> None:
    nodes = joined(core, "a", "b")
    settle(nodes, 1.0, [held("a", "b", 9 * GIB, 1), held("b", "a", 9 * GIB, 2)], FULL)
    core.tick(1.0)
    assert taken(nodes, 1.1)["a"][0].bring_home.size_bytes == REPAY_BYTES


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_circle_that_stays_is_recalled_if_the_debtor_can_go_elsewhere(
    core: ManagerCore, elsewhere: bool
) -> None:
    nodes = joined(core, "a", "b")
    if elsewhere:
        nodes += joined(core, "c")
    loans = [held("a", "b", MIB, 1), held("b", "a", MIB, 2)]
    now_s = 1.0
    while now_s < 1.0 + CIRCLE_RECALL_S + AGAIN_S:
        settle(nodes[:2], now_s, loans, 0)
        if elsewhere:
            nodes[2].beat(now_s, free_bytes=32 * GIB)
        core.tick(now_s)
        told = taken(nodes, now_s)
        now_s += 2.0
        if now_s > CIRCLE_RECALL_S and told:
            break
    assert bool(told) == elsewhere
    if elsewhere:
        recall = told["b"][0].recall
        assert (recall.debtor, recall.loan, recall.size_bytes) == ("a", 1, MIB)
        assert recall.endpoints.host == "host of a"
        assert recall.deadline_ms > 0


def test_a_creditor_with_a_queue_and_no_room_gets_its_memory_back(core: ManagerCore) -> None:
    a, b, c = nodes = joined(core, "a", "b", "c")
    settle(nodes, 1.0, [held("a", "b", 2 * MIB)], 0)
    b.beat(1.0, waiting=3)
    c.beat(1.0, free_bytes=20 * GIB)
    core.tick(1.0)
    told = taken(nodes, 1.1)
    assert told.keys() == {"b"}
    assert told["b"][0].recall.loan == 1
    assert "3 requests wait at b" in told["b"][0].why
    assert a.beat(1.2).commands == ()


def test_a_creditor_in_need_waits_where_its_debtor_has_nowhere_to_go(core: ManagerCore) -> None:
    nodes = joined(core, "a", "b", "c")
    settle(nodes, 1.0, [held("a", "b", 2 * MIB)], 0)
    nodes[1].beat(1.0, waiting=3)
    core.tick(1.0)
    assert taken(nodes, 1.1) == {}


def test_a_debtor_with_room_again_brings_its_blocks_home(core: ManagerCore) -> None:
    a, b = nodes = joined(core, "a", "b")
    settle(nodes, 1.0, [held("a", "b", 2 * MIB, 4)], FULL)
    core.tick(1.0)
    assert taken(nodes, 1.1) == {}
    a.beat(3.0, free_bytes=40 * GIB)
    b.beat(3.0)
    core.tick(3.0)
    told = taken(nodes, 3.1)
    assert told.keys() == {"a"}
    assert told["a"][0].bring_home == Command.BringHome(loan=4, size_bytes=2 * MIB)


@pytest.mark.parametrize("reason", ["queue", "drained"])
def test_a_debtor_with_a_queue_or_that_is_drained_brings_nothing_home(
    core: ManagerCore, reason: str
) -> None:
    a, _ = nodes = joined(core, "a", "b")
    settle(nodes, 1.0, [held("a", "b", 2 * MIB, 4)], 40 * GIB)
    if reason == "queue":
        a.beat(1.0, waiting=1)
    else:
        core.cluster.draining.add(a.node)
    core.tick(1.0)
    assert taken(nodes, 1.1) == {}
