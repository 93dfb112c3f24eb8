"""Eviction: least recently used, leaf first, and slabs that move where demand has gone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from kvfabric.types import Key, Status
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.eviction import LOOK_AGAIN_S
from kvfabric_nodes.store.extents import Extents, Pool
from kvfabric_nodes.store.shards import Shard

from . import conftest

if TYPE_CHECKING:
    from collections.abc import Callable

    Keys = Callable[..., list[Key]]
    Desk = Any


def test_the_coldest_goes_first(desk: Desk, keys: Keys) -> None:
    desk.put(keys(*range(16)))
    desk.core.match(desk.session, desk.namespace, keys(0))
    desk.put(keys(100, 101))
    assert desk.holds(keys(0, 1, 2, 3)) == [True, False, False, True]


def test_reading_counts_as_use(desk: Desk, keys: Keys) -> None:
    desk.put(keys(*range(16)))
    desk.core.release(desk.session, [desk.lease(keys(0))])
    desk.put(keys(100))
    assert desk.holds(keys(0, 1)) == [True, False]


def test_a_chain_is_evicted_from_its_leaf(desk: Desk, keys: Keys) -> None:
    desk.chain(keys(*range(16)))
    for number in range(5):
        desk.put(keys(100 + number))
        assert desk.holds(keys(*range(16))) == [n < 15 - number for n in range(16)]


def test_a_root_stays_while_any_branch_of_it_is_held(desk: Desk, keys: Keys) -> None:
    # Two branches of one root, the second pinned.
    desk.put(keys(0, 1, 2), parents=[None, *keys(0, 0)])
    desk.core.pin(desk.session, desk.namespace, keys(2))
    desk.put(keys(*range(100, 140)))
    assert desk.holds(keys(0, 1, 2)) == [True, False, True]


def test_a_chain_sealed_from_its_end_is_still_evicted_from_its_leaf(desk: Desk, keys: Keys) -> None:
    chain = keys(*range(16))
    reservation, _ = desk.reserve(chain, parents=[None, *chain[:-1]])
    for index in reversed(range(16)):
        desk.core.seal(reservation, index, (), 0.0)
    desk.put(keys(100))
    assert desk.holds(chain) == [True] * 15 + [False]


def test_a_chain_that_bites_its_tail_can_be_evicted(desk: Desk, keys: Keys) -> None:
    ring = keys(0, 1, 2)
    desk.put(ring, parents=keys(2, 0, 1))
    desk.put(keys(3), parents=keys(3))
    for number in range(100, 120):
        assert desk.put(keys(number)) == [Status.OK]
    assert desk.holds(keys(0, 1, 2, 3)) == [False] * 4


def test_purging_within_a_ring_ends(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0, 1, 2), parents=keys(2, 0, 1))
    shards, _ = desk.core.purge(desk.session, desk.namespace, keys(0, 1, 2), "", 0.0)
    assert shards == 3


def test_an_orphan_is_a_leaf_of_its_own(desk: Desk, keys: Keys) -> None:
    desk.put(keys(1), parents=keys(0))
    desk.put(keys(*range(100, 120)))
    assert desk.holds(keys(1)) == [False]


def test_slabs_move_to_the_size_that_is_asked_for(desk: Desk, keys: Keys) -> None:
    desk.put(keys(*range(16)))
    assert desk.put(keys(100, 101, 102, 103), 4096) == [Status.OK] * 4
    assert desk.holds(keys(*range(16))) == [False] * 16
    assert desk.put(keys(*range(16))) == [Status.OK] * 16


def test_a_slab_with_a_pinned_or_leased_shard_does_not_move(desk: Desk, keys: Keys) -> None:
    desk.put(keys(*range(16)))
    desk.core.pin(desk.session, desk.namespace, keys(0))
    desk.lease(keys(15))
    assert desk.put(keys(*range(100, 104)), 4096).count(Status.OK) == 2
    assert desk.holds(keys(0, 15)) == [True, True]
    assert sum(desk.holds(keys(100, 101, 102, 103))) == 2


def test_a_slab_does_not_move_from_under_a_pinned_continuation(desk: Desk, keys: Keys) -> None:
    # The chain's root lies in a slab of small shards, its pinned leaf in another one.
    desk.put(keys(0), 1024)
    desk.put(keys(1), 4096, parents=keys(0))
    desk.core.pin(desk.session, desk.namespace, keys(1))
    desk.put(keys(*range(100, 104)), 2048)
    desk.core.pin(desk.session, desk.namespace, keys(*range(100, 104)))
    assert desk.put(keys(104), 2048) == [Status.RETRY]
    assert desk.holds(keys(0, 1)) == [True, True]

    desk.core.unpin(desk.session, desk.namespace, keys(1), 0.0)
    assert desk.put(keys(104), 2048) == [Status.OK]


def test_all_slabs_are_looked_through_again_only_when_something_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node whose shards are needed is asked for room all the time: with a hundred thousand of
    them, every look would hold all calls up for a tenth of a second."""
    core = NodeCore(Extents(4, 64 << 10))
    desk = conftest.Desk(core)
    names = [conftest.key(number) for number in range(1024)]
    desk.put(names, 256)
    rooted = [shard for shard in core.shards if shard.extent.offset == 0]
    assert len(rooted) == 4
    for shard in rooted:
        core.shards.claim(shard.namespace, shard.key)
    looks: list[Pool] = []
    look = core._eviction._coldest_slab

    def counted(pool: Pool, older_than: int | None) -> list[Shard] | None:
        looks.append(pool)
        return look(pool, older_than)

    monkeypatch.setattr(core._eviction, "_coldest_slab", counted)

    for number in range(20):
        assert desk.put([conftest.key(2000 + number)], 2048) == [Status.RETRY]
    assert len(looks) == 1
    desk.wait(LOOK_AGAIN_S)
    assert desk.put([conftest.key(3000)], 2048) == [Status.RETRY]
    assert len(looks) == 2

    core.end_of_claim(rooted[0].namespace, rooted[0].key, desk.now_s)
    desk.core.purge(desk.session, desk.namespace, names[-17:], "", desk.now_s)
    assert desk.put([conftest.key(3001)], 2048) == [Status.OK]
    core.check()


def test_a_mixed_workload_wastes_little_and_keeps_what_is_warm() -> None:
    """Demand moves over three sizes: what is taken of the arena stays within 5 % of what the
    shards' slots need, and the shards in use at the time stay."""
    from kvfabric.types import NamespaceId

    segment = 256 << 10
    core = NodeCore(Extents(32, segment))
    session = core.open_session("a", "a")
    space = NamespaceId(bytes(32))
    core.open_namespaces(session, [space])
    chance = random.Random(7)
    number = 0
    for phase in range(6):
        sizes = [[4096], [4096, 20_000], [60_000], [60_000, 4096], [20_000], [20_000, 60_000]][
            phase
        ]
        warm: list[Key] = []
        stored = 0
        while stored < 3 * 32 * segment:
            size_bytes = chance.choice(sizes)
            number += 1
            key = Key(number.to_bytes(32, "big"))
            reservation, [grant] = core.reserve(
                session, space, [key], [None], [size_bytes], 1, 10, 0, 0.0
            )
            assert grant.status is Status.OK, f"phase {phase}: {grant.reason}"
            assert reservation is not None
            core.seal(reservation, 0, (), 0.0)
            stored += size_bytes
            warm = [*warm, key][-20:]
            assert core.match(session, space, warm) == len(warm), "a warm shard was evicted"
        core.check()
        books = core.books()
        taken = sum(s.size_bytes for s in core.extents.all_slabs() if s.used)
        slots = books.held_bytes / core.shards.size_bytes
        assert slots <= 1.05
        assert core.shards.size_bytes >= 0.80 * taken, "slabs lie idle"


def test_two_sizes_in_balance_do_not_thrash() -> None:
    """A working set that fits goes round and round: nothing of it is evicted once it is in."""
    from kvfabric.types import NamespaceId

    segment = 64 << 10
    core = NodeCore(Extents(8, segment))
    session = core.open_session("a", "a")
    space = NamespaceId(bytes(32))
    core.open_namespaces(session, [space])
    working_set = [(Key(n.to_bytes(32, "big")), 4096 if n % 2 else 16384) for n in range(36)]
    dropped = []
    for _ in range(20):
        for key, size_bytes in working_set:
            if core.match(session, space, [key]):
                continue
            reservation, [grant] = core.reserve(
                session, space, [key], [None], [size_bytes], 1, 10, 0, 0.0
            )
            assert grant.status is Status.OK
            assert reservation is not None
            core.seal(reservation, 0, (), 0.0)
        dropped.append(core.tally.dropped_shards["evicted"])
    assert dropped[-1] == dropped[3], "still evicting its own working set"
    core.check()


def test_a_tenant_that_left_its_shards_behind_makes_room_for_another(
    core: Any, desk: Desk, other: Desk, keys: Keys
) -> None:
    desk.put(keys(*range(16)))
    core.close_session(desk.session, desk.now_s)
    assert other.put(keys(1)) == [Status.OK]


def test_a_tenant_whose_client_maps_its_memory_loses_one_slab_at_a_time(
    core: Any, desk: Desk, other: Desk, keys: Keys
) -> None:
    desk.put(keys(*range(16)))
    desk.session.mapped.update(core.extents.segments)
    for number in range(5):
        assert other.put(keys(number)) == [Status.RETRY]
    assert sum(desk.holds(keys(*range(16)))) == 12

    core.unmapped(desk.session, list(core.extents.retired))
    assert other.put(keys(1)) == [Status.OK]


def test_the_warmer_tenant_keeps_its_shards(desk: Desk, other: Desk, keys: Keys) -> None:
    for number in range(12):
        desk.put(keys(number))
    other.put(keys(*range(4)))
    for number in range(50, 60):
        desk.core.match(desk.session, desk.namespace, keys(*range(12)))
        assert other.put(keys(number)) == [Status.OK]
    assert all(desk.holds(keys(*range(12))))
