"""The listing of all nodes is asked for seldom, and an old one is better than none."""

from __future__ import annotations

import time

from kvfabric.errors import Unreachable
from kvfabric.rpc.v1 import control_pb2
from kvfabric_client.deadline import Deadline
from kvfabric_client.fleet import VAIN_S, Fleet

SOON = Deadline(time.monotonic() + 3600)


class Manager:
    """Lists what it is told, at the time that it is told."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked = 0
        self.away = False
        self.infos = [control_pb2.NodeInfo(node="n0", alive=True)]

    def nodes(self, deadline: Deadline) -> list[control_pb2.NodeInfo]:
        self.asked += 1
        if self.away:
            raise Unreachable("the manager is away")
        return self.infos


def test_a_listing_serves_until_it_is_too_old() -> None:
    manager = Manager()
    fleet = Fleet(manager.nodes, lambda: manager.now_s)
    assert list(fleet.nodes(SOON, 10.0)) == ["n0"]
    manager.now_s = 10.0
    fleet.nodes(SOON, 10.0)
    assert manager.asked == 1
    manager.now_s = 10.5
    fleet.nodes(SOON, 10.0)
    assert manager.asked == 2


def test_a_node_that_is_not_listed_is_looked_for_anew() -> None:
    manager = Manager()
    fleet = Fleet(manager.nodes, lambda: manager.now_s)
    assert fleet.node("n0", SOON, 10.0) is not None
    manager.infos = [control_pb2.NodeInfo(node="n1", alive=True), control_pb2.NodeInfo(node="n0")]
    manager.now_s = 1.0
    assert fleet.node("n1", SOON, 10.0) is not None
    assert manager.asked == 2
    assert fleet.node("n0", SOON, 10.0) is None  # it is listed, but dead


def test_while_the_manager_is_away_the_last_listing_stands() -> None:
    manager = Manager()
    fleet = Fleet(manager.nodes, lambda: manager.now_s)
    fleet.nodes(SOON, 1.0)
    manager.away, manager.now_s = True, 5.0
    assert list(fleet.nodes(SOON, 1.0)) == ["n0"]
    fleet.nodes(SOON, 1.0)
    assert manager.asked == 2  # it is left alone for a while
    manager.away, manager.now_s = False, 5.0 + VAIN_S
    manager.infos = []
    assert list(fleet.nodes(SOON, 1.0)) == []
