"""Who is named to a node that asks to borrow, and what the manager knows of loans."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.manager.talking_nodes import GIB, MIB, Talker, held

from kvfabric.errors import Conflict, Refused
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.lending import Borrowing
from kvfabric.rpc.v1.control_pb2 import Link
from kvfabric.types import NodeId


@pytest.fixture
def core() -> Iterator[ManagerCore]:
    core = ManagerCore(5.0, 0.0)
    yield core
    core.check()


def joined(core: ManagerCore, *names: str, zone: str = "") -> list[Talker]:
    talkers = [Talker(core, name, zone=zone) for name in names]
    for each in talkers:
        each.register(0.0)
    return talkers


def names(found: Borrowing) -> list[str]:
    return [member.node for member in found.creditors]


def borrow(core: ManagerCore, node: str, size_bytes: int, *exclude: str) -> Borrowing:
    return core.lending.borrow(NodeId(node), 1, size_bytes, {NodeId(each) for each in exclude}, 1.0)


def test_creditors_are_named_with_what_they_could_lend(core: ManagerCore) -> None:
    joined(core, "a", "b")
    found = borrow(core, "a", GIB)
    assert names(found) == ["b"]
    assert found.free_bytes == [32 * GIB]
    assert found.creditors[0].endpoints.host == "host of b"
    assert borrow(core, "a", GIB, "b").creditors == []


def test_cache_that_nobody_needs_is_room_and_what_is_claimed_is_not(core: ManagerCore) -> None:
    _, b, c = joined(core, "a", "b", "c")
    b.beat(0.5, free_bytes=0, claimed_bytes=60 * GIB)
    c.beat(0.5, free_bytes=0, claimed_bytes=10 * GIB)
    found = borrow(core, "a", GIB)
    assert names(found) == ["c", "b"] or names(found) == ["b", "c"]
    assert dict(zip(names(found), found.free_bytes, strict=True)) == {"b": 4 * GIB, "c": 32 * GIB}
    b.beat(0.5, free_bytes=0, claimed_bytes=64 * GIB)
    assert names(borrow(core, "a", GIB)) == ["c"]


def test_two_who_ask_at_one_moment_do_not_get_the_same_room(core: ManagerCore) -> None:
    _, _, c, d = joined(core, "a", "b", "c", "d")
    for each in (c, d):
        each.beat(0.1, free_bytes=3 * GIB)
    first = names(borrow(core, "a", 2 * GIB, "b"))[0]
    second = names(borrow(core, "b", 2 * GIB, "a"))[0]
    assert {first, second} == {"c", "d"}
    for each in (c, d):  # what they tell anew is the truth
        each.beat(0.2, free_bytes=3 * GIB)
    assert set(names(borrow(core, "a", 2 * GIB, "b"))) == {"c", "d"}


def test_a_drained_a_silent_and_an_owing_node_are_avoided(core: ManagerCore) -> None:
    a, b, c, d = joined(core, "a", "b", "c", "d")
    core.cluster.draining.add(b.node)
    for at_s in (2.0, 4.0, 5.5):
        core.tick(at_s)
        for each in (a, b, d):
            each.beat(at_s)
    d.beat(5.5, loans=[held("d", "a", MIB)])
    core.tick(6.0)
    assert not core.cluster.alive(c.node)
    assert names(borrow(core, "a", GIB)) == ["d"]  # rather one that owes than nobody


def test_a_stranger_and_an_old_incarnation_are_told_so(core: ManagerCore) -> None:
    (a,) = joined(core, "a")
    with pytest.raises(Conflict, match="not registered"):
        borrow(core, "nobody", GIB)
    a.register(1.0, incarnation=2)
    with pytest.raises(Conflict):
        borrow(core, "a", GIB)
    with pytest.raises(Refused, match="cannot be borrowed"):
        borrow(core, "a", 0)


def test_why_nobody_lends_is_told_and_remembered(core: ManagerCore) -> None:
    joined(core, "a")
    found = borrow(core, "a", GIB)
    assert "no other node" in found.reason
    asked = [each for each in core.cluster.journal._events if each.what == "asked to borrow"]
    assert [each.node for each in asked] == ["a"]
    assert found.reason in asked[0].why


def test_loans_are_booked_and_go_with_their_node(core: ManagerCore) -> None:
    a, b = joined(core, "a", "b")
    loan = held("a", "b", MIB)
    a.beat(0.1, loans=[loan])
    b.beat(0.1, loans=[loan])
    ledger = core.cluster.ledger
    assert ledger.lent_bytes() == ledger.borrowed_bytes() == MIB
    a.beat(0.2)  # says nothing of its loans: they are as they were
    assert ledger.borrowed_bytes(a.node) == MIB
    b.register(0.3, incarnation=2)
    assert ledger.lent_bytes() == 0


def test_links_are_what_nodes_measured_in_either_direction(core: ManagerCore) -> None:
    a, b = joined(core, "a", "b")
    a.beat(0.1, links=[Link(peer="b", bytes_per_s=1000), Link(peer="b", bytes_per_s=0)])
    links = core.cluster.links
    assert links.rate(b.node, a.node) == 1000
    assert links.rate(a.node, b.node) == 1000  # nothing else is known of it
    a.beat(0.2, links=[Link(peer="b", bytes_per_s=2000)])
    assert links.rate(b.node, a.node) == pytest.approx(1300)
    b.beat(0.2, links=[Link(peer="a", bytes_per_s=50)])
    assert links.rate(a.node, b.node) == 50
    assert sorted(links.known()) == [(a.node, b.node, 50.0), (b.node, a.node, 1300.0)]


def test_a_node_is_told_that_it_is_drained(core: ManagerCore) -> None:
    (a,) = joined(core, "a")
    assert not a.beat(0.1).draining
    core.cluster.draining.add(a.node)
    assert a.beat(0.2).draining


@pytest.mark.parametrize(("cap_bytes", "lendable"), [(None, [32 * GIB]), (GIB, [GIB]), (0, [])])
def test_a_node_lends_up_to_the_cap_that_it_tells_else_half(
    core: ManagerCore, cap_bytes: int | None, lendable: list[int]
) -> None:
    _, b = joined(core, "a", "b")
    b.beat(0.1, free_bytes=60 * GIB, lend_cap_bytes=cap_bytes)
    assert borrow(core, "a", MIB).free_bytes == lendable
