"""The greedy plan: who lends to whom, how much, and when nobody should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.lending.placement import LinkClass, Site, link_class
from kvfabric.lending.planner import UNKNOWN, Contexts, Decision, Instances, Rules, _classes, plan
from kvfabric.lending.stepmodel import DEFAULT, StepModel
from kvfabric.types import NodeId

GIB = 1024**3
TOKEN_BYTES = 128 * 1024
BLOCK_BYTES = 128 * TOKEN_BYTES


@dataclass(frozen=True)
class Node:
    """One instance, with its sequences in tokens."""

    sequences: tuple[int, ...] = ()
    waiting: int = 0
    capacity: float = 64.0  # GiB
    room: float | None = None  # GiB; None: what its sequences leave
    lendable: float | None = None  # GiB; None: half the capacity, as far as there is room
    borrowed: float = 0.0
    draining: bool = False
    host: int = UNKNOWN
    rack: int = UNKNOWN
    zone: int = UNKNOWN
    model: StepModel = DEFAULT

    @property
    def room_bytes(self) -> float:
        if self.room is not None:
            return self.room * GIB
        return max(0.0, self.capacity * GIB - sum(self.sequences) * TOKEN_BYTES)

    @property
    def lendable_bytes(self) -> float:
        most = self.capacity / 2 if self.lendable is None else self.lendable
        return min(self.room_bytes, most * GIB)


def columns(nodes: Sequence[Node]) -> tuple[Instances, Contexts]:
    def floats(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array(values, dtype=np.float64)

    def ints(values: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array(values, dtype=np.int64)

    instances = Instances(
        [NodeId(f"n{number}") for number in range(len(nodes))],
        ints([each.host for each in nodes]),
        ints([each.rack for each in nodes]),
        ints([each.zone for each in nodes]),
        capacity_bytes=floats([each.capacity * GIB for each in nodes]),
        room_bytes=floats([each.room_bytes for each in nodes]),
        lendable_bytes=floats([each.lendable_bytes for each in nodes]),
        borrowed_bytes=floats([each.borrowed * GIB for each in nodes]),
        draining=np.array([each.draining for each in nodes], dtype=bool),
        batch=floats([len(each.sequences) for each in nodes]),
        waiting=floats([each.waiting for each in nodes]),
        tokens=floats([sum(each.sequences) for each in nodes]),
        step_s=floats([each.model.step_s for each in nodes]),
        request_s=floats([each.model.request_s for each in nodes]),
        token_s=floats([each.model.token_s for each in nodes]),
    )
    rows = [(index, tokens) for index, each in enumerate(nodes) for tokens in each.sequences]
    local = [tokens * TOKEN_BYTES // BLOCK_BYTES * BLOCK_BYTES for _, tokens in rows]
    contexts = Contexts(
        ints([index for index, _ in rows]),
        np.arange(100, 100 + len(rows), dtype=np.uint64),
        floats([tokens for _, tokens in rows]),
        floats(local),
        np.zeros(len(rows)),
        np.full(len(rows), float(BLOCK_BYTES)),
    )
    return instances, contexts


def planned(
    *nodes: Node,
    rates: Mapping[tuple[int, int], float] | None = None,
    rules: Rules | None = None,
) -> list[Decision]:
    return plan(*columns(nodes), rates, rules)


LONG = 400_000  # tokens: 49 GiB
FULL = Node((LONG, *[4_000] * 24), waiting=20)
IDLE = Node()


def test_a_full_node_with_a_queue_lends_its_longest_sequence_out_to_an_idle_one() -> None:
    found = planned(FULL, IDLE, rates={(0, 1): 10.0 * GIB})
    first = found[0]
    assert (first.debtor, first.creditor, first.sequence) == ("n0", "n1", 100)
    assert first.gain > 0
    assert first.size_bytes % BLOCK_BYTES == 0
    assert first.size_bytes >= 4_000 * TOKEN_BYTES  # at least one more request fits
    assert "20 requests wait beside a batch of 25" in first.why
    assert "400,000 tokens" in first.why
    assert f"{first.gain:+.1f} tokens/s" in first.why


def test_with_no_queue_and_room_nothing_is_planned() -> None:
    assert planned(Node((LONG,), room=20.0), IDLE) == []


def test_with_an_empty_queue_a_move_makes_room_against_pressure_and_no_more() -> None:
    rules = Rules()
    found = planned(Node((LONG, 1000), room=1.0), IDLE, rates={(0, 1): 10.0 * GIB})
    assert [each.sequence for each in found] == [100]
    made = 1.0 + found[0].size_bytes / GIB
    assert made >= rules.relief * 64 - BLOCK_BYTES / GIB
    assert made < rules.relief * 64 + 1
    assert "no room left" in found[0].why


def test_a_queue_that_waits_for_something_else_than_memory_moves_nothing() -> None:
    roomy = Node((1_000,) * 8, waiting=3, room=40.0)
    rules = Rules(attend_at_creditor=False)
    assert planned(roomy, IDLE, rules=rules) == []


def test_a_plan_stops_when_nothing_gains_any_more() -> None:
    found = planned(replace(FULL, waiting=2), IDLE, rules=Rules(attend_at_creditor=False))
    moved = sum(each.size_bytes for each in found)
    assert moved + GIB >= 2 * 4_000 * TOKEN_BYTES  # the two that wait fit
    assert moved < 3 * 4_000 * TOKEN_BYTES + 2 * BLOCK_BYTES


def test_the_smallest_batch_is_served_first() -> None:
    large = Node((LONG, *[4_000] * 24), waiting=20)
    small = Node((LONG, 90_000), waiting=20)
    found = planned(large, small, Node(), rules=Rules(max_decisions=1))
    assert [each.debtor for each in found] == ["n1"]


def test_everybodys_longest_comes_before_anybodys_next() -> None:
    busy = Node((200_000, 190_000, *[4_000] * 24), waiting=50)
    found = planned(busy, busy, IDLE, IDLE)
    assert [each.sequence for each in found[:2]] == [100, 126]


@pytest.mark.parametrize(
    "never",
    [
        Node(draining=True, lendable=0.0),
        Node(lendable=0.0),
        Node(borrowed=1.0),
        Node(room=2.0),  # keeps that for itself
        Node((4_000,) * 8, waiting=200, room=20.0),  # its own queue needs it
    ],
    ids=["drained", "at its cap", "owes", "nearly full", "has a queue"],
)
def test_who_cannot_spare_memory_is_no_creditor(never: Node) -> None:
    assert [each for each in planned(FULL, never) if each.creditor == "n1"] == []


def test_of_equal_creditors_the_nearer_is_taken() -> None:
    here = replace(FULL, host=0, rack=0, zone=0)
    found = planned(
        here,
        Node(host=1, rack=1, zone=1),
        Node(host=2, rack=0, zone=0),
        Node(host=3, rack=2, zone=0),
    )
    assert found[0].creditor == "n2"
    assert "in the same rack" in found[0].why


def test_a_busy_neighbour_is_passed_over_for_an_idle_node_further_away() -> None:
    here = replace(FULL, host=0, rack=0, zone=0)
    busy = Node((16_000,) * 16, room=30.0, host=0, rack=0, zone=0)
    same = {(0, 1): 1.0 * GIB, (0, 2): 1.0 * GIB}
    found = planned(here, busy, Node(host=5, rack=5, zone=0), rates=same)
    assert found[0].creditor == "n2"


def test_a_link_carries_no_more_than_its_budget() -> None:
    rules = Rules(carry_s=2.0, link_share=0.5)
    found = planned(FULL, IDLE, rates={(0, 1): 2.0 * GIB}, rules=rules)
    assert 0 < sum(each.size_bytes for each in found) <= 2 * GIB


def test_nothing_is_planned_for_one_node_or_without_sequences() -> None:
    assert planned(FULL) == []
    assert planned(Node(waiting=9), IDLE) == []


def test_no_limit_on_decisions_is_passed() -> None:
    nodes = [FULL] * 8 + [IDLE] * 8
    assert len(planned(*nodes, rules=Rules(max_decisions=5))) == 5


def test_the_columns_are_not_changed() -> None:
    instances, contexts = columns([FULL, IDLE])
    before = instances.room_bytes.copy(), instances.lendable_bytes.copy(), instances.tokens.copy()
    assert plan(instances, contexts)
    after = instances.room_bytes, instances.lendable_bytes, instances.tokens
    for one, other in zip(before, after, strict=True):
        assert (one == other).all()


some_nodes = st.lists(
    st.builds(
        Node,
        st.lists(st.integers(0, LONG), max_size=6).map(tuple),
        waiting=st.integers(0, 40),
        borrowed=st.sampled_from([0.0, 0.0, 1.0]),
        draining=st.booleans(),
        room=st.none() | st.floats(0, 64),
        host=st.integers(UNKNOWN, 2),
        rack=st.integers(UNKNOWN, 1),
        zone=st.integers(UNKNOWN, 1),
        model=st.sampled_from([DEFAULT, StepModel(0.0, 0.0, 1e-6), StepModel(0.5, 0.0, 0.0)]),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(some_nodes, st.booleans())
def test_whatever_is_known_a_plan_keeps_to_what_there_is(nodes: list[Node], attend: bool) -> None:
    rules = Rules(attend_at_creditor=attend)
    instances, contexts = columns(nodes)
    found = plan(instances, contexts, rules=rules)
    assert found == plan(instances, contexts, rules=rules)
    names = list(instances.nodes)
    lent = dict.fromkeys(names, 0)
    for each in found:
        row = int(np.flatnonzero(contexts.sequence == each.sequence)[0])
        debtor, creditor = names.index(each.debtor), names.index(each.creditor)
        assert contexts.instance[row] == debtor != creditor
        assert 0 < each.size_bytes < contexts.local_bytes[row]
        assert not instances.draining[creditor]
        assert instances.borrowed_bytes[creditor] == 0
        if instances.waiting[debtor]:
            assert each.gain > 0
        lent[each.creditor] += each.size_bytes
    for index, name in enumerate(names):
        assert lent[name] <= instances.lendable_bytes[index]
    assert not {each.debtor for each in found} & {each.creditor for each in found}
    assert len({each.sequence for each in found}) == len(found)


@given(st.lists(st.tuples(*[st.integers(UNKNOWN, 1)] * 3), min_size=2, max_size=5))
def test_columns_of_link_classes_are_those_of_placement(where: list[tuple[int, int, int]]) -> None:
    def name(kind: str, number: int) -> str:
        return "" if number == UNKNOWN else f"{kind}{number}"

    # As the manager numbers them: a rack counts within its zone.
    racks = {(zone, rack): index for index, (_, rack, zone) in enumerate(where)}
    nodes = [
        Node(host=host, rack=UNKNOWN if rack == UNKNOWN else racks[zone, rack], zone=zone)
        for host, rack, zone in where
    ]
    instances, _ = columns(nodes)
    sites = [
        Site(NodeId(f"n{index}"), name("h", host), name("r", rack), name("z", zone))
        for index, (host, rack, zone) in enumerate(where)
    ]
    for one, mine in enumerate(sites):
        assert [LinkClass(each) for each in _classes(instances, one).tolist()] == [
            link_class(mine, other) for other in sites
        ]
