"""Groups: what the requests of a batch share is found, kept for the batch, and let go."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence

import pytest

from kvfabric.errors import Refused
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_client import Room
from kvfabric_client.group import MAX_KEYS
from kvfabric_nodes.node import Node
from kvfabric_nodes.sequences import group_calls

from .conftest import core_of, key, payload
from .test_deadlines import eventually

SHARED = [key(number) for number in range(4)]
CHAINS = [
    [*SHARED, key(10), key(11)],
    [*SHARED, key(20)],
    [*SHARED[:2], key(30)],
    [key(40)],
]


def claims(node: Node, room: Room) -> list[int]:
    shards = core_of(node).shards
    return [shards.claims(room.id, name) for name in [*SHARED, key(10), key(40)]]


def test_what_two_requests_share_is_kept_until_the_group_ends(room: Room, node: Node) -> None:
    room.put(SHARED[:3], [payload(n, 1000) for n in range(3)])
    with room.group(CHAINS, life_s=60) as group:
        assert [shared.key for shared in group.shared] == SHARED
        assert [shared.index for shared in group.shared] == [0, 1, 2, 3]
        assert [shared.status for shared in group.shared] == [Status.OK] * 3 + [Status.MISS]
        assert [shared.node for shared in group.shared] == ["n0"] * 3 + [""]
        assert group.missing == [key(3)]
        assert group.life_s == 60
        assert claims(node, room) == [1, 1, 1, 1, 0, 0]
        room.put([key(3)], [payload(3, 1000)])
    assert claims(node, room) == [0] * 6
    assert room.match(SHARED).matched == 3  # what was there before is cache again


def test_closing_frees_what_came_meanwhile_and_nobody_else_keeps(room: Room) -> None:
    with room.group(CHAINS) as other, room.group(CHAINS[:2]) as group:
        room.put(SHARED, [payload(n, 1024) for n in range(4)])
        assert group.close() == (0, 0)  # the other one keeps them
        assert other.close() == (4, 4096)
        assert other.close() == (0, 0)
    assert room.match(SHARED).matched == 0


def test_long_chains_are_cut_to_what_they_share(room: Room) -> None:
    common = [key(number) for number in range(MAX_KEYS + 10)]
    chains = [[*common, *(key(10_000 * n + i) for i in range(3000))] for n in (1, 2)]
    with room.group(chains) as group:
        assert [shared.key for shared in group.shared] == common
        assert group.missing == common
        room.put(common[-1:], [payload(1, 64)])
        assert group.close() == (1, 64)


def test_a_batch_that_shares_nothing_has_an_empty_group(room: Room) -> None:
    with room.group([[key(1)], [key(2)]]) as group:
        assert group.shared == []
    with pytest.raises(Refused):
        room.group([[Key(b"short")], [Key(b"short")]])


def test_what_lies_elsewhere_goes_on_coming_until_the_group_ends(
    room: Room, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens the group waits only a moment for it."""
    monkeypatch.setattr(group_calls, "FETCH_S", 0.01)
    monkeypatch.setattr(group_calls, "FETCH_KEYS", 1)
    gate: asyncio.Queue[None] = asyncio.Queue()
    asked: queue.Queue[Key] = queue.Queue()

    async def places(space: NamespaceId, keys: Sequence[Key]) -> Sequence[tuple[str, ...]]:
        return [("n1",)] * len(keys)

    async def fetch_home(space: NamespaceId, keys: Sequence[Key]) -> None:
        for wanted in keys:
            asked.put(wanted)
        await gate.get()

    node.group_calls.places, node.group_calls.fetch_home = places, fetch_home

    def come() -> None:
        assert node._loop is not None
        node._loop.call_soon_threadsafe(gate.put_nowait, None)

    with room.group(CHAINS) as group:
        assert [shared.status for shared in group.shared] == [Status.EXISTS] * 4
        assert asked.get(timeout=10) == SHARED[0]
        come()
        assert asked.get(timeout=10) == SHARED[1]
    come()
    assert eventually(lambda: not node.group_calls._fetching)
    assert asked.empty()
