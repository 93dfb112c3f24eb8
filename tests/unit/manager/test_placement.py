"""Ranking of nodes for loans, moves and replicas."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.lending.placement import (
    Candidate,
    LinkClass,
    Site,
    creditors,
    destinations,
    link_class,
    spread,
)
from kvfabric.types import NodeId

GIB = 1024**3
ME = Site(NodeId("me"), "h0", "r0", "z0")


def site(name: str, host: str = "", rack: str = "", zone: str = "") -> Site:
    return Site(NodeId(name), host or f"host of {name}", rack, zone)


def node(name: str, free_gib: float = 32, **given: Any) -> Candidate:
    place = {key: given.pop(key) for key in ("host", "rack", "zone") if key in given}
    return Candidate(site(name, **place), 64 * GIB, int(free_gib * GIB), **given)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (site("a"), site("a"), LinkClass.SELF),
        (site("a", "h"), site("b", "h"), LinkClass.HOST),
        (site("a", "h", "r", "z"), site("b", "i", "r", "z"), LinkClass.RACK),
        (site("a", "h", "r", "z"), site("b", "i", "r", "y"), LinkClass.FAR),
        (site("a", "h", "r", "z"), site("b", "i", "s", "z"), LinkClass.ZONE),
        (site("a", "h", "r"), site("b", "i", "r"), LinkClass.RACK),
        (site("a"), site("b"), LinkClass.FAR),
        (Site(NodeId("a")), Site(NodeId("b")), LinkClass.FAR),
    ],
)
def test_link_classes(one: Site, other: Site, expected: LinkClass) -> None:
    assert link_class(one, other) is expected
    assert link_class(other, one) is expected


def test_the_nearest_of_equal_creditors_comes_first() -> None:
    near = node("near", host="h0")
    rack = node("rack", rack="r0", zone="z0")
    zone = node("zone", zone="z0")
    far = node("far", zone="z1")
    assert creditors(ME, [far, zone, rack, near], GIB).nodes == ["near", "rack", "zone", "far"]


def test_who_has_free_memory_comes_before_who_would_evict() -> None:
    full = node("full", 0, evictable_bytes=60 * GIB, host="h0")
    free = node("free", 8, zone="z1")
    assert creditors(ME, [full, free], GIB).nodes == ["free", "full"]


def test_of_equally_near_nodes_the_one_with_most_room_comes_first() -> None:
    found = creditors(ME, [node("some", 10), node("much", 50), node("more", 30)], GIB)
    assert found.nodes == ["much", "more", "some"]


def test_of_nodes_with_like_room_the_idle_one_comes_first() -> None:
    found = creditors(ME, [node("busy", 32, load=9.0), node("idle", 32, load=0.0)], GIB)
    assert found.nodes == ["idle", "busy"]


def test_a_measured_link_counts_more_than_load() -> None:
    slow = node("slow", bytes_per_s=100_000_000)
    fast = node("fast", bytes_per_s=3_000_000_000, load=5.0)
    assert creditors(ME, [slow, fast], GIB).nodes == ["fast", "slow"]


def test_who_owes_is_asked_last_and_who_is_drained_or_refused_never() -> None:
    found = creditors(
        ME,
        [
            node("owes", borrowed_bytes=1, host="h0"),
            node("drained", draining=True),
            node("refused"),
            node("good"),
            Candidate(ME, 64 * GIB, 64 * GIB),
        ],
        GIB,
        exclude=[NodeId("refused")],
    )
    assert found.nodes == ["good", "owes"]


def test_nobody_lends_beyond_its_cap() -> None:
    half = node("half", 40, lent_bytes=32 * GIB)
    told = node("told", 40, lend_cap_bytes=GIB, lent_bytes=GIB)
    assert half.lendable_bytes == told.lendable_bytes == 0
    found = creditors(ME, [half, told], GIB)
    assert found.nodes == []
    assert "have lent what they may" in found.reason


def test_who_can_lend_a_part_is_named_after_those_that_can_lend_all() -> None:
    part, whole = node("part", 1, host="h0"), node("whole", 20)
    assert creditors(ME, [part, whole], 8 * GIB).nodes == ["whole", "part"]


def test_what_others_were_promised_is_no_room() -> None:
    asked = node("asked", 10, promised_bytes=9 * GIB)
    assert asked.room_bytes == asked.lendable_bytes == GIB
    assert creditors(ME, [asked, node("other", 10)], 2 * GIB).nodes == ["other", "asked"]


def test_without_any_other_node_the_reason_says_so() -> None:
    assert "no other node" in creditors(ME, [], GIB).reason
    assert "1 refused" in creditors(ME, [], GIB, exclude=[NodeId("x")]).reason


def test_askers_of_one_moment_are_sent_to_different_nodes() -> None:
    equal = [node(f"n{number}") for number in range(8)]
    first = {creditors(site(f"asker{number}"), equal, GIB).nodes[0] for number in range(64)}
    assert len(first) > 4


def test_a_move_goes_only_where_all_of_it_has_room() -> None:
    small, large = node("small", 2), node("large", 20)
    assert destinations(ME, [small, large], 8 * GIB).nodes == ["large"]
    found = destinations(ME, [small], 8 * GIB)
    assert found.nodes == []
    assert f"{8 * GIB:,} bytes" in found.reason


def test_replicas_are_spread_over_zones_then_racks_then_hosts() -> None:
    holder = site("holder", "h0", "r0", "z0")
    found = spread(
        [holder],
        [
            node("same host", 60, host="h0", rack="r0", zone="z0"),
            node("same rack", 60, rack="r0", zone="z0"),
            node("same zone", 60, rack="r1", zone="z0"),
            node("zone 1", 10, rack="r9", zone="z1"),
            node("zone 1 too", 9, rack="r9", zone="z1"),
            node("zone 2", 8, rack="r7", zone="z2"),
            node("no room", 0, zone="z3"),
            node("drained", 60, zone="z3", draining=True),
        ],
        GIB,
        count=9,
    )
    assert found[:2] == ["zone 1", "zone 2"]
    assert found[2:] == ["same zone", "zone 1 too", "same rack", "same host"]


def test_a_node_that_holds_a_replica_gets_no_second() -> None:
    assert spread([site("a")], [node("a"), node("b")], GIB, 2) == ["b"]


candidates = st.lists(
    st.builds(
        node,
        st.sampled_from([f"n{number}" for number in range(9)]),
        st.integers(0, 64),
        evictable_bytes=st.integers(0, 64 * GIB),
        lent_bytes=st.integers(0, 64 * GIB),
        borrowed_bytes=st.sampled_from([0, GIB]),
        promised_bytes=st.sampled_from([0, 9 * GIB]),
        draining=st.booleans(),
        load=st.floats(0, 10),
    ),
    unique_by=lambda each: each.site.node,
)


@given(candidates, st.integers(1, 64 * GIB), st.randoms(use_true_random=False))
def test_a_ranking_names_only_who_can_and_does_not_depend_on_the_order_of_asking(
    known: list[Candidate], size_bytes: int, random: Any
) -> None:
    found = creditors(ME, known, size_bytes).nodes
    by_name = {each.site.node: each for each in known}
    assert len(set(found)) == len(found)
    assert all(by_name[each].lendable_bytes > 0 for each in found)
    assert not any(by_name[each].draining for each in found)
    shuffled = [dataclasses.replace(each) for each in known]
    random.shuffle(shuffled)
    assert creditors(ME, shuffled, size_bytes).nodes == found
    for each in destinations(ME, known, size_bytes).nodes:
        assert by_name[each].room_bytes >= size_bytes
