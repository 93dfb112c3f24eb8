"""Which node has a state: what was heard, what is about to be made, and what is not known yet."""

from __future__ import annotations

import pytest
from tests.unit.manager.small_fabric import ROOM, SmallFabric

from kvfabric.moves.heads import HERE, MAKING_S, Heads
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
NAME = (ROOM, b"n" * 32)


def told(*names: bytes, gone: bool = False, node: str = "") -> control_pb2.Heads:
    return control_pb2.Heads(namespace_id=ROOM, names=b"".join(names), gone=gone, node=node)


@pytest.fixture
def fabric() -> SmallFabric:
    made = SmallFabric()
    for name in "abc":
        made.add(name)
    made.run(1)
    return made


@pytest.fixture
def heads(fabric: SmallFabric) -> Heads:
    return Heads(fabric.core.cluster, 10.0)


def test_who_has_it_is_named_and_the_asker_first(heads: Heads) -> None:
    heads.heard(A, [told(NAME[1])], full=True)
    assert heads.find(NAME, B, 0.0, create=True) == A
    heads.heard(B, [told(NAME[1])], full=False)  # adopted, not let go of yet
    assert (heads.find(NAME, B, 0.0, create=False), heads.find(NAME, C, 0.0, create=False)) == (
        B,
        A,
    )
    assert (heads.count(A), heads.count(B), heads.count(C)) == (1, 1, 0)
    heads.check()


def test_where_it_went_is_known_before_it_is_heard_there(heads: Heads) -> None:
    heads.heard(A, [told(NAME[1])], full=True)
    heads.heard(A, [told(NAME[1], gone=True, node="b")], full=False)
    assert heads.find(NAME, C, 0.0, create=True) == B
    assert heads.count(A) == 0
    heads.heard(A, [], full=True)
    assert heads.find(NAME, C, 20.0, create=False) == HERE
    heads.check()


def test_what_a_lost_node_had_or_got_is_gone(heads: Heads, fabric: SmallFabric) -> None:
    heads.heard(A, [told(NAME[1], gone=True, node="b")], full=True)
    heads.heard(B, [told(NAME[1])], full=True)
    fabric.kill("b")
    fabric.run(10)
    heads.lost(B)
    assert heads.find(NAME, C, 20.0, create=False) == HERE
    heads.check()


def test_two_do_not_make_the_same_state(heads: Heads) -> None:
    assert heads.find(NAME, A, 20.0, create=False) == HERE
    assert heads.find(NAME, A, 20.0, create=True) == HERE
    assert heads.find(NAME, B, 20.0, create=True) == A
    assert heads.find(NAME, A, 20.0, create=True) == A
    heads.tick(20.0 + MAKING_S)
    assert heads.find(NAME, B, 20.0 + MAKING_S, create=True) == HERE
    heads.check()


def test_what_was_not_heard_yet_is_not_known(heads: Heads) -> None:
    assert heads.find(NAME, A, 9.9, create=True) is None
    assert heads.find(NAME, A, 10.0, create=True) == HERE


def test_a_drained_nodes_states_are_handed_over_to_one_after_the_other(
    fabric: SmallFabric,
) -> None:
    fabric.core.moving.heads.heard(A, [told(b"1" * 32, b"2" * 32)], full=True)
    fabric.drain("a")
    fabric.run(6)
    assert "2 states" in fabric.drained("a").waiting
    destinations = [what.destination for what in fabric.handed]
    assert set(destinations) == {"b", "c"}

    fabric.core.moving.heads.heard(A, [told(b"1" * 32, b"2" * 32, gone=True, node="b")], full=False)
    fabric.until_empty("a")
    count = len(fabric.handed)
    fabric.run(6)
    assert len(fabric.handed) == count
