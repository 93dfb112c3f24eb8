"""When plans are made, what becomes of them, and how a node's engines are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.manager.talking_nodes import BLOCK_BYTES, GIB, Talker

from kvfabric.manager.core import ManagerCore
from kvfabric.manager.outlook import STALE_S
from kvfabric.manager.planning import HOLD_S, PLAN_S
from kvfabric.rpc.v1.control_pb2 import Command

LONG = (7, 2000, 0)  # sequence 7: 31 GiB here


@pytest.fixture
def core() -> Iterator[ManagerCore]:
    core = ManagerCore(5.0, 0.0)
    yield core
    core.check()


@pytest.fixture
def a(core: ManagerCore) -> Talker:
    """Full, with a queue."""
    a = Talker(core, "a", host="one")
    a.register(0.0, free_bytes=0)
    a.beat(0.1, free_bytes=0, waiting=12, sequences=[LONG, (8, 10, 0)])
    return a


@pytest.fixture
def b(core: ManagerCore) -> Talker:
    """Empty."""
    b = Talker(core, "b", host="one")
    b.register(0.0, free_bytes=64 * GIB)
    b.beat(0.1, free_bytes=64 * GIB)
    return b


def lend_outs(commands: tuple[Command, ...]) -> list[Command.LendOut]:
    return [each.lend_out for each in commands if each.WhichOneof("what") == "lend_out"]


def test_a_node_in_need_is_told_to_lend_its_longest_sequence_out(
    core: ManagerCore, a: Talker, b: Talker
) -> None:
    ordered = core.planning.round(1.0)
    assert ordered[0].debtor == "a"
    commands = a.beat(1.1).commands
    (first, *_) = lend_outs(commands)
    assert (first.sequence, first.creditor) == (7, "b")
    assert first.endpoints.host == "one"
    assert 0 < first.size_bytes < 2000 * BLOCK_BYTES
    assert commands[0].why == ordered[0].why
    assert a.beat(1.2).commands == ()
    assert b.beat(1.2).commands == ()


def test_a_plan_is_remembered_with_its_reason(core: ManagerCore, a: Talker, b: Talker) -> None:
    core.planning.round(1.0)
    plan = core.planning.plans[0]
    assert (plan.at_s, plan.decision.creditor) == (1.0, "b")
    told = [each for each in core.cluster.journal._events if each.what == "told to lend out"]
    assert told[0].node == "a"
    assert told[0].why == plan.decision.why
    assert core.planning.decisions == len(core.planning.plans)
    assert core.planning.planned_bytes == sum(e.decision.size_bytes for e in core.planning.plans)


def test_nobody_is_told_twice_before_the_first_is_seen(
    core: ManagerCore, a: Talker, b: Talker
) -> None:
    (first, *_) = core.planning.round(1.0)
    assert core.planning.round(2.0) == []
    blocks = first.size_bytes // BLOCK_BYTES
    a.beat(2.5, waiting=12, sequences=[(7, 2000 - blocks // 2, blocks // 2)])
    assert core.planning.round(3.0) == []
    a.beat(3.5, waiting=12, sequences=[(7, 2000 - blocks, blocks)])
    assert core.planning.round(4.0)[0].sequence == 7


def test_who_does_nothing_is_told_again_after_a_while(
    core: ManagerCore, a: Talker, b: Talker
) -> None:
    core.planning.round(1.0)
    late_s = 1.0 + HOLD_S
    for talker in (a, b):
        talker.beat(late_s - 0.5)
    core.tick(late_s - 0.1)
    assert core.planning.demand(late_s - 0.1) is None
    a.beat(late_s, waiting=12)
    core.tick(late_s)
    assert core.planning.round(late_s) != []


def test_a_sequence_that_ended_is_waited_for_no_longer(
    core: ManagerCore, a: Talker, b: Talker
) -> None:
    core.planning.round(1.0)
    a.beat(1.5, waiting=12, sequences=[(9, 1500, 0)])
    assert {each.sequence for each in core.planning.round(2.0)} == {9}


def test_a_node_that_borrows_by_plan_is_no_creditor_meanwhile(
    core: ManagerCore, a: Talker, b: Talker
) -> None:
    core.planning.round(1.0)
    a.beat(1.5, free_bytes=60 * GIB)
    c = Talker(core, "c", host="one")
    c.register(1.5, free_bytes=0)
    c.beat(1.6, free_bytes=0, waiting=9, sequences=[(1, 1000, 0)])
    b.beat(1.6, free_bytes=0)
    assert core.planning.round(2.0) == []


def test_what_a_lost_or_drained_creditor_was_planned_for_is_not_ordered(
    core: ManagerCore, a: Talker, b: Talker
) -> None:
    demand = core.planning.demand(1.0)
    assert demand is not None
    decisions = core.planning.round(1.0)
    core.planning.lost(a.node, 1.0)
    core.cluster.draining.add(b.node)
    assert core.planning.adopt(decisions, 1.1) == []


def test_an_engine_that_is_silent_has_no_queue(core: ManagerCore, a: Talker, b: Talker) -> None:
    assert core.planning.waiting(a.node) == 12
    core.tick(0.2 + STALE_S)
    assert core.planning.waiting(a.node) == 0
    assert core.planning.waiting(b.node) == 0


def test_a_lost_node_is_not_planned_for(core: ManagerCore, a: Talker, b: Talker) -> None:
    for at_s in (2.0, 4.0, 5.2):
        core.tick(at_s)
        b.beat(at_s)
    assert not core.cluster.alive(a.node)
    assert core.planning.round(5.3) == []


def test_nothing_is_gathered_while_nobody_is_in_need(core: ManagerCore, b: Talker) -> None:
    b.beat(0.2, free_bytes=50 * GIB, waiting=0, sequences=[(1, 100, 0)])
    assert core.planning.demand(1.0) is None


def test_a_round_is_due_once_in_its_time(core: ManagerCore) -> None:
    assert core.planning.due(1.0)
    assert not core.planning.due(1.0 + PLAN_S / 2)
    assert core.planning.due(1.0 + PLAN_S)
