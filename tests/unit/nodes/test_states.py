"""States: one head, many snapshots, and of two who swap at once one wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.errors import Denied, Refused, Retry
from kvfabric.types import Key
from kvfabric_nodes.sequences.states import NO_HEAD, Head, StateLimits, States
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents

from .conftest import SEGMENT_BYTES, SEGMENTS, SHARD_BYTES, Desk, key, namespace

Keys = Callable[..., list[Key]]
SLOTS = SEGMENTS * SEGMENT_BYTES // SHARD_BYTES
NAME = b"n" * 32


@pytest.fixture
def states(core: NodeCore) -> Iterator[States]:
    states = States(
        core, StateLimits(states=4, states_of_namespace=3, snapshots=2), first_version=10
    )
    yield states
    states.check()
    for name, count in states.claims().items():
        assert core.shards.claims(*name) == count


def swap(states: States, desk: Desk, version: int, new: Key, name: bytes = NAME) -> Head | None:
    """The new head, or None where another was first."""
    swapped, head = states.swap(desk.session, desk.namespace, name, version, new, desk.now_s)
    return head if swapped else None


def test_who_saw_the_head_may_replace_it(states: States, desk: Desk, keys: Keys) -> None:
    desk.put(keys(1, 2, 3))

    first = swap(states, desk, 0, key(1))
    assert first == Head(10, key(1))
    assert swap(states, desk, 0, key(2)) is None
    second = swap(states, desk, 10, key(2))

    assert second == Head(11, key(2))
    assert swap(states, desk, 10, key(3)) is None
    assert states.read(desk.session, desk.namespace, NAME) == second


def test_of_many_who_saw_the_same_head_one_wins(states: States, desk: Desk, keys: Keys) -> None:
    desk.put(keys(*range(6)))
    head = swap(states, desk, 0, key(0))
    assert head is not None

    answers = [swap(states, desk, head.version, key(number)) for number in range(1, 6)]

    assert [answer is not None for answer in answers] == [True, False, False, False, False]


def test_a_removed_state_does_not_come_back_as_the_old_one(
    states: States, desk: Desk, keys: Keys
) -> None:
    desk.put(keys(1, 2))
    first = swap(states, desk, 0, key(1))
    assert first is not None

    assert swap(states, desk, first.version, Key(b"")) == NO_HEAD
    assert desk.holds(keys(1)) == [False]
    second = swap(states, desk, 0, key(2))

    assert second is not None
    assert second.version > first.version
    assert swap(states, desk, first.version, key(2)) is None


def test_the_head_stays_and_what_it_was_goes(states: States, desk: Desk, keys: Keys) -> None:
    desk.put(keys(1, 2))
    swap(states, desk, 0, key(1))
    for number in range(100, 100 + SLOTS):
        desk.put(keys(number))
    assert desk.holds(keys(1)) == [True]

    desk.put(keys(2))
    swap(states, desk, 10, key(2))

    assert desk.holds(keys(1, 2)) == [False, True]


def test_a_snapshot_is_shared_by_readers_while_the_head_moves_on(
    states: States, desk: Desk, core: NodeCore, keys: Keys
) -> None:
    desk.put(keys(1, 2, 3))
    swap(states, desk, 0, key(1))
    first = desk.lease(keys(1))

    swap(states, desk, 10, key(2))
    second = Desk(core).lease(keys(1))  # told of it by the first reader
    swap(states, desk, 11, key(3))

    states.tick(0.0)
    assert desk.holds(keys(1, 2, 3)) == [True, False, True]
    core.release(desk.session, [first])
    states.tick(0.0)
    assert desk.holds(keys(1)) == [True]
    for session in core.sessions.values():
        core.release(session, [second])
    states.tick(0.0)
    assert desk.holds(keys(1)) == [False]


def test_of_too_many_snapshots_the_oldest_are_left_to_eviction(
    states: States, desk: Desk, keys: Keys
) -> None:
    desk.put(keys(0, 1, 2, 3))
    leases = [desk.lease(keys(number)) for number in range(4)]
    version = 0
    for number in range(4):
        head = swap(states, desk, version, key(number))
        assert head is not None
        version = head.version

    desk.core.release(desk.session, leases)
    states.tick(0.0)

    assert desk.holds(keys(0, 1, 2, 3)) == [True, False, False, True]


def test_a_head_must_be_here_and_states_are_bounded(
    states: States, desk: Desk, other: Desk, keys: Keys
) -> None:
    desk.put(keys(1))
    other.put(keys(1))
    with pytest.raises(Refused, match="write it to this node"):
        swap(states, desk, 0, key(2))
    for number in range(3):
        assert swap(states, desk, 0, key(1), bytes([number]) * 32)
    with pytest.raises(Refused, match="at most 3 states"):
        swap(states, desk, 0, key(1), b"x" * 32)
    assert swap(states, other, 0, key(1))
    with pytest.raises(Retry, match="4 states"):
        swap(states, other, 0, key(1), b"x" * 32)
    with pytest.raises(Denied):
        states.read(other.session, desk.namespace, NAME)


def test_a_purged_head_is_a_miss_and_can_be_replaced(
    states: States, desk: Desk, keys: Keys
) -> None:
    desk.put(keys(1, 2))
    swap(states, desk, 0, key(1))

    desk.core.purge(desk.session, desk.namespace, keys(1), "", 0.0)

    assert states.read(desk.session, desk.namespace, NAME) == Head(10, key(1))
    assert desk.holds(keys(1)) == [False]
    assert swap(states, desk, 10, key(2)) == Head(11, key(2))


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.integers(-1, 4), st.booleans(), st.booleans()),
        max_size=40,
    )
)
def test_heads_are_a_dict_that_is_compared_before_it_is_set(
    steps: list[tuple[int, int, bool, bool]],
) -> None:
    core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES))
    states = States(core)
    desk = Desk(core)
    twin: dict[bytes, Head] = {}
    seen = {0}
    for number, new, stale, lease in steps:
        name = bytes([number]) * 32
        desk.put([key(new)] if new >= 0 else [])
        if lease and new >= 0:
            desk.lease([key(new)], lease_s=1.0)
        known = twin.get(name, NO_HEAD)
        version = max(seen) + 1 if stale else known.version
        swapped, head = states.swap(
            desk.session, namespace("a"), name, version, key(new) if new >= 0 else Key(b""), 0.0
        )
        assert swapped == (version == known.version)
        if swapped:
            assert head.version not in seen - {0}
            twin.pop(name, None)
            if new >= 0:
                twin[name] = head
            seen.add(head.version)
        else:
            assert head == known
        desk.wait(0.3)
        states.tick(desk.now_s)
        states.check()
        core.check()
        assert {n: h for room in states.heads.values() for n, h in room.items()} == twin
        assert all(desk.holds([head.key]) == [True] for head in twin.values())
