"""In which order replicas are named."""

from __future__ import annotations

from tests.unit.manager.talking_nodes import Talker

from kvfabric.directory import Place, Replica
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.nearness import best_first
from kvfabric.types import NodeId, Tier

A, B, C, GONE = (NodeId(name) for name in ("a", "b", "c", "gone"))


def fabric() -> ManagerCore:
    """a and b on one host, c in the same zone, d in none."""
    core = ManagerCore(5.0, 0.0)
    for name, host, zone in (("a", "one", "z"), ("b", "one", "z"), ("c", "two", "z")):
        Talker(core, name, host=host, zone=zone).register(0.0)
    return core


def order(core: ManagerCore, asker: str | None, place: Place) -> list[NodeId]:
    (found,) = best_first(core.cluster, NodeId(asker) if asker else None, [place])
    assert sorted(found) == sorted(place)
    return [replica.node for replica in found]


def test_the_nearest_replica_comes_first() -> None:
    place = (Replica(C, Tier.DRAM), Replica(A, Tier.DRAM), Replica(GONE, Tier.DRAM))
    assert order(fabric(), "b", place) == [A, C, GONE]
    assert order(fabric(), "c", place) == [C, A, GONE]


def test_of_equally_near_ones_the_faster_tier_comes_first() -> None:
    place = (Replica(A, Tier.FILE), Replica(B, Tier.DRAM))
    assert order(fabric(), "c", place) == [B, A]
    assert order(fabric(), None, place) == [B, A]


def test_of_these_the_least_busy_comes_first() -> None:
    core = fabric()
    talker = Talker(core, "a")
    talker.beat(0.1, free_bytes=0, leases=9)
    place = (Replica(A, Tier.DRAM), Replica(B, Tier.DRAM))
    assert order(core, None, place) == [B, A]
    assert order(core, "c", place) == [B, A]
    assert order(core, "a", place) == [A, B]


def test_an_unknown_asker_is_far_from_all() -> None:
    place = (Replica(A, Tier.DRAM), Replica(C, Tier.DRAM))
    assert order(fabric(), "stranger", place) == [A, C]
