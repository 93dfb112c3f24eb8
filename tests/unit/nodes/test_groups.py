"""Groups: what a batch shares stays for its life, and what came for it goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvfabric.errors import Denied, Refused, Retry
from kvfabric.types import Key
from kvfabric_nodes.sequences.groups import GroupLimits, Groups, shared
from kvfabric_nodes.store.core import NodeCore

from .conftest import SEGMENT_BYTES, SEGMENTS, SHARD_BYTES, Desk

Keys = Callable[..., list[Key]]
SLOTS = SEGMENTS * SEGMENT_BYTES // SHARD_BYTES
LIFE_S = 50.0


@pytest.fixture
def groups(core: NodeCore) -> Iterator[Groups]:
    groups = Groups(core, GroupLimits(groups=3, life_s=LIFE_S))
    yield groups
    groups.check()
    for name, count in groups.claims().items():
        assert core.shards.claims(*name) == count


def press(desk: Desk, keys: Keys) -> None:
    """So many new shards that everything goes that can."""
    for number in range(1000, 1000 + SLOTS):
        desk.put(keys(number))


def test_shared_is_what_two_chains_have(keys: Keys) -> None:
    chains = keys(1, 2, 3, 1, 2, 4, 1, 5, 5)

    assert shared(chains, [3, 3, 3]) == [0, 1]  # a chain that has a key twice does not share it
    assert shared(chains, [9]) == []
    with pytest.raises(Refused, match="8 keys in all, but 9"):
        shared(chains, [4, 4])


def test_shared_prefixes_stay_for_the_groups_life(groups: Groups, desk: Desk, keys: Keys) -> None:
    desk.chain(keys(1, 2, 3))
    group = groups.open(desk.session, desk.namespace, keys(1, 2), LIFE_S, 0.0)

    press(desk, keys)
    assert desk.holds(keys(1, 2, 3)) == [True, True, False]

    assert groups.close(desk.session, group.id, 0.0) == (0, 0)  # as before the group: cache
    press(desk, lambda *numbers: keys(*(n + SLOTS for n in numbers)))
    assert desk.holds(keys(1, 2)) == [False, False]


def test_what_came_for_the_group_is_freed_with_it(groups: Groups, desk: Desk, keys: Keys) -> None:
    desk.put(keys(1))
    group = groups.open(desk.session, desk.namespace, keys(1, 2, 3), LIFE_S, 0.0)
    assert group.found == frozenset(keys(1))
    desk.put(keys(2, 3))

    assert groups.close(desk.session, group.id, 0.0) == (2, 2 * SHARD_BYTES)

    assert desk.holds(keys(1, 2, 3)) == [True, False, False]
    with pytest.raises(Refused, match="no group"):
        groups.close(desk.session, group.id, 0.0)


def test_what_others_need_outlives_the_group(groups: Groups, desk: Desk, keys: Keys) -> None:
    first = groups.open(desk.session, desk.namespace, keys(1, 2, 3), LIFE_S, 0.0)
    desk.put(keys(1, 2, 3))
    second = groups.open(desk.session, desk.namespace, keys(1), LIFE_S, 0.0)
    desk.core.pin(desk.session, desk.namespace, keys(2))

    assert groups.close(desk.session, first.id, 0.0) == (1, SHARD_BYTES)

    assert desk.holds(keys(1, 2, 3)) == [True, True, False]
    assert groups.close(desk.session, second.id, 0.0) == (0, 0)


def test_a_group_ends_with_its_life_or_its_session(
    groups: Groups, desk: Desk, core: NodeCore, keys: Keys
) -> None:
    dying = Desk(core)
    groups.open(desk.session, desk.namespace, keys(1), 1000.0, 0.0)  # longer than the limit
    groups.open(dying.session, dying.namespace, keys(2), LIFE_S, 0.0)
    desk.put(keys(1, 2))

    core.close_session(dying.session, 1.0)
    assert desk.holds(keys(1, 2)) == [True, False]
    groups.tick(LIFE_S - 1)
    assert desk.holds(keys(1)) == [True]
    groups.tick(LIFE_S)

    assert desk.holds(keys(1)) == [False]
    assert groups.all == {}


def test_groups_are_bounded_and_only_of_ones_own_namespace(
    groups: Groups, desk: Desk, other: Desk, keys: Keys
) -> None:
    for _ in range(3):
        group = groups.open(desk.session, desk.namespace, keys(1), LIFE_S, 0.0)
    with pytest.raises(Retry, match="3 groups are open"):
        groups.open(desk.session, desk.namespace, keys(1), LIFE_S, 0.0)
    with pytest.raises(Denied):
        groups.open(other.session, desk.namespace, keys(1), LIFE_S, 0.0)
    with pytest.raises(Refused, match="no group"):
        groups.close(other.session, group.id, 0.0)
