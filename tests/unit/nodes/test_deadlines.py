"""No heap of the core grows with promises that were settled, or shards that are gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.store.core import EXPIRED_AT_ONCE, NodeCore
from kvfabric_nodes.store.deadlines import SWEEP_ENTRIES
from kvfabric_nodes.store.extents import Extents
from kvfabric_nodes.store.promises import Limits
from kvfabric_nodes.store.shards import SWEEP_ENTRIES as GONE_ENTRIES

if TYPE_CHECKING:
    from collections.abc import Callable

    Keys = Callable[..., list[Key]]
    Desk = Any

ROOM = NamespaceId(b"n" * 32)
KEY = Key(b"k" * 32)


def test_released_leases_do_not_wait_for_their_deadline() -> None:
    core = NodeCore(Extents(1, 1 << 16))
    session = core.open_session("default", "default")
    core.open_namespaces(session, [ROOM])
    reservation, _ = core.reserve(session, ROOM, [KEY], [None], [4096], 1, 30.0, 0.0, 0.0)
    assert reservation is not None
    core.seal(reservation, 0, [1], 0.0)
    kept, _ = core.acquire(session, ROOM, [KEY], 600.0, 0.0)
    assert kept is not None

    for _ in range(10 * SWEEP_ENTRIES):
        lease, _ = core.acquire(session, ROOM, [KEY], 30.0, 0.0)
        assert lease is not None
        core.release(session, [lease.id])

    assert len(core._deadlines) <= 2 * SWEEP_ENTRIES
    core.tick(599.0)
    assert not kept.expired
    core.tick(600.0)
    assert kept.expired
    core.check()


def test_unpinning_again_and_again_adds_no_deadlines(desk: Desk, keys: Keys) -> None:
    desk.put(keys(1), ttl_s=60.0)
    before = len(desk.core._lives)
    for _ in range(100):
        desk.core.pin(desk.session, desk.namespace, keys(1))
        desk.core.unpin(desk.session, desk.namespace, keys(1), desk.now_s)
    assert len(desk.core._lives) == before

    desk.wait(60.0)
    assert desk.holds(keys(1)) == [False]


def test_many_shards_whose_time_ends_at_once_hold_nobody_up() -> None:
    core = NodeCore(Extents(8, 1 << 20))
    session = core.open_session("default", "default")
    core.open_namespaces(session, [ROOM])
    keys = [Key(number.to_bytes(32, "big")) for number in range(2 * EXPIRED_AT_ONCE + 1)]
    for key in keys:
        reservation, _ = core.reserve(session, ROOM, [key], [None], [64], 1, 30.0, 5.0, 0.0)
        assert reservation is not None
        core.seal(reservation, 0, [1], 0.0)
    lease, _ = core.acquire(session, ROOM, keys[-1:], 4.0, 0.0)
    assert lease is not None

    left = []
    while core.shards.count:
        core.tick(5.0)
        assert lease.expired  # what binds somebody ends in time
        left.append(core.shards.count)
    assert left == [EXPIRED_AT_ONCE + 1, 1, 0]
    core.release(session, [lease.id])
    core.check()


def test_shards_that_ended_without_an_eviction_are_forgotten(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0))
    for number in range(1, 2 * GONE_ENTRIES):
        desk.put(keys(number), ttl_s=1.0)
        desk.wait(1.0)
        desk.core.check()
    queued = sum(map(len, desk.core.shards._queues.values()))
    assert queued <= GONE_ENTRIES + 4
    assert desk.core.shards.coldest((desk.session.tenant, 1024)).key == keys(0)[0]


def test_namespaces_that_other_nodes_tell_of_are_forgotten_in_the_end() -> None:
    core = NodeCore(Extents(1, 1 << 16), Limits(namespaces=4))
    for number in range(10):
        core.learn(NamespaceId(number.to_bytes(32, "big")), "default")
    assert len(core.namespaces_of("default")) == 4
