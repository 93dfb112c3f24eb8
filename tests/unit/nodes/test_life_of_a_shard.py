"""Each rule of a shard's life, by example: reserve, seal, lease, pin, expire, purge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvfabric.errors import Denied, Refused
from kvfabric.types import Key, Status
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.promises import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    Keys = Callable[..., list[Key]]
    Desk = Any


# Writing ------------------------------------------------------------------------------


def test_what_is_reserved_is_not_readable_before_it_is_sealed(desk: Desk, keys: Keys) -> None:
    reservation = desk.granted(keys(1))
    assert desk.core.match(desk.session, desk.namespace, keys(1)) == 0

    desk.core.seal(reservation, 0, (7,), 0.0)
    assert desk.core.match(desk.session, desk.namespace, keys(1)) == 1
    assert desk.core.shards.get(desk.namespace, keys(1)[0]).checksums == (7,)


def test_what_is_sealed_exists_for_everybody_of_the_tenant(desk: Desk, keys: Keys) -> None:
    desk.put(keys(1))
    assert desk.put(keys(1, 2)) == [Status.EXISTS, Status.OK]


def test_a_key_that_another_writes_is_not_granted_twice(core: Any, desk: Desk, keys: Keys) -> None:
    desk.granted(keys(1))
    reservation, [grant] = desk.reserve(keys(1))
    assert reservation is None
    assert grant.status is Status.EXISTS
    assert "being written" in grant.reason


def test_a_key_twice_in_one_batch_is_granted_once(desk: Desk, keys: Keys) -> None:
    reservation, grants = desk.reserve(keys(1, 1))
    assert [grant.status for grant in grants] == [Status.OK, Status.EXISTS]
    assert list(reservation.items) == [0]


def test_a_second_commit_is_refused(desk: Desk, keys: Keys) -> None:
    reservation = desk.granted(keys(1, 2))
    assert desk.core.seal(reservation, 0, (), 0.0).status is Status.OK
    again = desk.core.seal(reservation, 0, (), 0.0)
    assert again.status is Status.REFUSED
    assert "settled already" in again.reason

    desk.core.seal(reservation, 1, (), 0.0)
    with pytest.raises(Refused, match="was committed or aborted before"):
        desk.core.reservation(desk.session, reservation.id)


def test_a_deadline_ends_the_promise_but_not_the_extent(desk: Desk, keys: Keys) -> None:
    reservation = desk.granted(keys(1), deadline_s=5)
    extent = reservation.items[0].extent
    desk.wait(4.9)
    assert desk.core.books().reserved_bytes == 1024

    desk.wait(0.2)
    books = desk.core.books()
    assert (books.reserved_bytes, books.quarantined_bytes) == (0, 1024)
    # Another may write the key now, but elsewhere: the late writer may still be at it.
    second = desk.granted(keys(1))
    assert second.items[0].extent is not extent
    assert extent.generation != second.items[0].extent.generation


def test_a_commit_after_the_deadline_is_refused_and_ends_the_quarantine(
    desk: Desk, keys: Keys
) -> None:
    reservation = desk.granted(keys(1), deadline_s=5)
    desk.wait(6)
    late = desk.core.seal(reservation, 0, (1,), desk.now_s)
    assert late.status is Status.REFUSED
    assert "after its deadline" in late.reason
    assert desk.core.books().quarantined_bytes == 0
    assert desk.holds(keys(1)) == [False]


def test_a_late_commit_does_not_disturb_who_writes_the_key_now(desk: Desk, keys: Keys) -> None:
    late = desk.granted(keys(1), deadline_s=5)
    desk.wait(6)
    second = desk.granted(keys(1))
    desk.core.seal(late, 0, (), desk.now_s)

    _, [grant] = desk.reserve(keys(1))
    assert grant.status is Status.EXISTS, "the second writer has lost the key"
    assert desk.core.seal(second, 0, (), desk.now_s).status is Status.OK


@pytest.mark.parametrize("ending", ["abort", "close"])
def test_a_quarantine_ends_when_the_client_lets_go(desk: Desk, keys: Keys, ending: str) -> None:
    reservation = desk.granted(keys(1, 2), deadline_s=5)
    desk.wait(6)
    assert desk.core.books().quarantined_bytes == 2048
    if ending == "abort":
        desk.core.abort(reservation)
    else:
        desk.core.close_session(desk.session, desk.now_s)
    books = desk.core.books()
    assert (books.quarantined_bytes, books.free_bytes) == (0, books.capacity_bytes)


def test_an_abort_may_name_keys_and_may_be_repeated(desk: Desk, keys: Keys) -> None:
    reservation = desk.granted(keys(1, 2))
    desk.core.abort(reservation, [0, 0, 99])
    desk.core.abort(reservation, [0])
    assert list(reservation.items) == [1]
    desk.core.abort(reservation)
    desk.core.abort(reservation)
    assert desk.core.books().reserved_bytes == 0


def test_a_wrong_fill_is_refused_with_its_reason_and_freed(desk: Desk, keys: Keys) -> None:
    reservation = desk.granted(keys(1))
    grant = desk.core.reject(reservation, 0, "bits flipped", 0.0)
    assert (grant.status, grant.reason) == (Status.REFUSED, "bits flipped")
    assert desk.core.books().free_bytes == desk.core.books().capacity_bytes
    assert desk.put(keys(1)) == [Status.OK]


def test_a_shard_larger_than_a_segment_is_refused_with_the_remedy(desk: Desk, keys: Keys) -> None:
    _, [grant] = desk.reserve(keys(1), 4097)
    assert grant.status is Status.REFUSED
    assert "larger segments or smaller shards" in grant.reason


def test_a_full_node_says_retry_and_what_would_help(desk: Desk, keys: Keys) -> None:
    desk.put(keys(*range(16)))
    lease = desk.lease(keys(*range(16)))
    _, [grant] = desk.reserve(keys(99))
    assert grant.status is Status.RETRY
    assert "unpin or release" in grant.reason

    desk.core.release(desk.session, [lease])
    assert desk.put(keys(99)) == [Status.OK]


# Reading ------------------------------------------------------------------------------


def test_match_counts_the_longest_prefix(desk: Desk, keys: Keys) -> None:
    desk.put(keys(1, 2, 4))
    assert desk.core.match(desk.session, desk.namespace, keys(1, 2, 3, 4)) == 2


def test_what_is_leased_is_not_evicted_even_when_the_lease_has_expired(
    desk: Desk, keys: Keys
) -> None:
    desk.put(keys(0))
    lease = desk.lease(keys(0), lease_s=1)
    desk.wait(50)
    assert desk.core.tally.expired_leases == 1
    desk.put(keys(*range(1, 30)))
    assert desk.holds(keys(0)) == [True]

    desk.core.release(desk.session, [lease])
    desk.put(keys(*range(30, 60)))
    assert desk.holds(keys(0)) == [False]


def test_an_expired_lease_cannot_be_renewed(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0))
    lease = desk.lease(keys(0), lease_s=1)
    desk.core.renew(desk.session, lease, 10, desk.now_s)
    desk.wait(5)
    desk.core.renew(desk.session, lease, 1, desk.now_s)
    desk.wait(2)
    with pytest.raises(Refused, match="has expired"):
        desk.core.renew(desk.session, lease, 10, desk.now_s)


def test_a_release_may_be_repeated_even_within_one_call(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0))
    lease = desk.lease(keys(0))
    assert len(desk.core.release(desk.session, [lease, lease, 12345])) == 1
    assert desk.core.release(desk.session, [lease]) == []


def test_a_key_twice_in_a_lease_is_held_until_the_lease_ends(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0))
    lease = desk.lease(keys(0, 0))
    desk.core.purge(desk.session, desk.namespace, keys(0), "", 0.0)
    assert desk.core.books().quarantined_bytes == 1024
    desk.core.release(desk.session, [lease])
    assert desk.core.books().quarantined_bytes == 0


def test_over_a_socket_a_deadline_ends_the_extent_with_the_promise(
    core: Any, desk: Desk, keys: Keys
) -> None:
    """Its client maps nothing: what it does not stream through the node, it cannot touch."""
    desk.session = core.open_session("a", "a", shares_memory=False)
    desk.put(keys(0))
    lease = desk.lease(keys(0), lease_s=5)
    desk.granted(keys(1), deadline_s=5)
    desk.wait(6)
    books = core.books()
    assert (books.reserved_bytes, books.quarantined_bytes, books.held_bytes) == (0, 0, 1024)
    with pytest.raises(Refused, match=f"no lease {lease}"):
        core.renew(desk.session, lease, 5, desk.now_s)


def test_what_the_node_streams_is_its_own_to_give_back(core: Any, desk: Desk, keys: Keys) -> None:
    desk.session = core.open_session("a", "a", shares_memory=False)
    desk.put(keys(0))
    lease, _ = core.acquire(desk.session, desk.namespace, keys(0), 5, 0.0, streamed=True)
    reservation, _ = core.reserve(
        desk.session, desk.namespace, keys(1), [None], [1024], 1, 5, 0, 0.0, streamed=True
    )
    desk.wait(6)
    core.purge(desk.session, desk.namespace, keys(0), "", desk.now_s)
    assert core.books().quarantined_bytes == 2048
    core.release(desk.session, [lease.id])
    core.abort(reservation)
    assert core.books().quarantined_bytes == 0


def test_leases_of_a_session_that_ends_end_with_it(core: Any, desk: Desk, keys: Keys) -> None:
    desk.put(keys(0))
    desk.lease(keys(0))
    core.close_session(desk.session, desk.now_s)
    assert all(shard.extent.holders == 0 for shard in core.shards)


# Keeping and erasing --------------------------------------------------------------------


def test_what_is_pinned_is_not_evicted(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0))
    assert desk.core.pin(desk.session, desk.namespace, keys(0, 77)) == [Status.OK, Status.MISS]
    desk.put(keys(*range(1, 30)))
    assert desk.holds(keys(0)) == [True]

    desk.core.unpin(desk.session, desk.namespace, keys(0), desk.now_s)
    desk.put(keys(*range(30, 60)))
    assert desk.holds(keys(0)) == [False]


def test_a_time_to_live_ends_a_shard(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0), ttl_s=5)
    desk.wait(4.9)
    assert desk.holds(keys(0)) == [True]
    desk.wait(0.2)
    assert desk.holds(keys(0)) == [False]


def test_a_pin_beats_a_time_to_live_until_it_is_taken_off(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0, 1), ttl_s=5)
    desk.core.pin(desk.session, desk.namespace, keys(0, 1))
    desk.core.pin(desk.session, desk.namespace, keys(0, 1))
    desk.core.unpin(desk.session, desk.namespace, keys(1), desk.now_s)
    desk.wait(6)
    assert desk.holds(keys(0, 1)) == [True, False]

    desk.core.unpin(desk.session, desk.namespace, keys(0), desk.now_s)
    desk.wait(0)
    assert desk.holds(keys(0)) == [False]


def test_a_lease_keeps_the_bytes_of_a_shard_whose_time_ended(desk: Desk, keys: Keys) -> None:
    desk.put(keys(0), ttl_s=5)
    lease = desk.lease(keys(0), lease_s=60)
    desk.wait(6)
    assert desk.holds(keys(0)) == [False]
    assert desk.core.books().quarantined_bytes == 1024
    desk.core.release(desk.session, [lease])
    assert desk.core.books().quarantined_bytes == 0


def test_purging_a_key_takes_all_that_continues_it(desk: Desk, keys: Keys) -> None:
    desk.chain(keys(1, 2, 3))
    desk.put(keys(9))
    assert desk.core.purge(desk.session, desk.namespace, keys(2, 3), "", 0.0) == (2, 2048)
    assert desk.holds(keys(1, 2, 3, 9)) == [True, False, False, True]


def test_purging_a_namespace_takes_pinned_shards_too(desk: Desk, keys: Keys) -> None:
    desk.chain(keys(1, 2, 3))
    desk.core.pin(desk.session, desk.namespace, keys(2))
    assert desk.core.purge(desk.session, desk.namespace, [], "", 0.0) == (3, 3072)
    assert desk.core.pins == 0
    assert desk.core.inventory_hash == 0


def test_purging_by_owner_spares_what_others_committed(core: Any, desk: Desk, keys: Keys) -> None:
    colleague = core.open_session("a", "a/colleague")
    desk.put(keys(1))
    reservation, _ = core.reserve(colleague, desk.namespace, keys(2), [None], [1024], 1, 10, 0, 0.0)
    core.seal(reservation, 0, (), 0.0)
    assert core.purge(desk.session, desk.namespace, [], "a/colleague", 0.0) == (1, 1024)
    assert desk.holds(keys(1, 2)) == [True, False]


def test_explain_tells_a_life_in_order(desk: Desk, keys: Keys) -> None:
    desk.put(keys(1))
    desk.core.purge(desk.session, desk.namespace, keys(1), "", 3.0)
    told = desk.core.story.tell(frozenset({desk.namespace}), keys(1)[0][:4])
    assert [(d.at_s, d.what) for d in told] == [(0.0, "committed"), (3.0, "purged")]


# Tenants ------------------------------------------------------------------------------


def test_another_tenants_namespace_is_denied_in_every_call(
    core: Any, desk: Desk, other: Desk, keys: Keys
) -> None:
    other.put(keys(1))
    mine, theirs = desk.session, other.namespace
    for call, *arguments in (
        (core.match, keys(1)),
        (core.acquire, keys(1), 1, 0.0),
        (core.reserve, keys(1), [None], [64], 1, 1, 0, 0.0),
        (core.pin, keys(1)),
        (core.unpin, keys(1), 0.0),
        (core.purge, [], "", 0.0),
    ):
        with pytest.raises(Denied, match="not open in this session"):
            call(mine, theirs, *arguments)
    assert other.holds(keys(1)) == [True]


def test_a_segment_never_reaches_another_tenant_without_fresh_memory(
    core: Any, desk: Desk, other: Desk, keys: Keys
) -> None:
    desk.put(keys(*range(16)))
    desk.session.mapped.update(core.extents.segments)
    core.purge(desk.session, desk.namespace, [], "", 0.0)

    # The first tenant's client still maps them: the second must wait.
    _, [grant] = other.reserve(keys(1))
    assert grant.status is Status.RETRY
    assert core.recycled == []
    retired = list(core.extents.retired)
    assert retired

    core.unmapped(desk.session, retired)
    assert [old for old, _ in core.recycled] == retired
    assert other.put(keys(1)) == [Status.OK]
    segment = core.shards.get(other.namespace, keys(1)[0]).extent.segment
    assert segment in [new for _, new in core.recycled]


def test_the_end_of_the_mapping_session_frees_its_retired_segments(
    core: Any, desk: Desk, other: Desk, keys: Keys
) -> None:
    desk.put(keys(*range(16)))
    desk.session.mapped.update(core.extents.segments)
    core.purge(desk.session, desk.namespace, [], "", 0.0)
    other.reserve(keys(1))
    core.close_session(desk.session, desk.now_s)
    assert core.recycled
    assert core.books().quarantined_bytes == 0


# Limits -------------------------------------------------------------------------------


def test_a_batch_over_the_limit_is_refused(desk: Desk, keys: Keys) -> None:
    with pytest.raises(Refused, match="65 keys in one batch; the limit is 64"):
        desk.reserve(keys(*range(65)))


def test_a_session_has_so_many_reservations_and_leases(keys: Keys, desk: Desk) -> None:
    desk.core.limits = Limits(reservations=2, leases=2)
    desk.put(keys(0))
    for number in (1, 2):
        desk.granted(keys(number))
        desk.lease(keys(0))
    with pytest.raises(Refused, match="2 reservations open; commit or abort"):
        desk.reserve(keys(3))
    with pytest.raises(Refused, match="2 leases; release some"):
        desk.lease(keys(0))


def test_no_promise_is_longer_than_the_limit(desk: Desk, keys: Keys) -> None:
    desk.granted(keys(1), deadline_s=1e9)
    desk.wait(101)
    assert desk.core.tally.expired_reservations == 1


def test_changes_that_nobody_fetches_do_not_pile_up(core: NodeCore, desk: Desk, keys: Keys) -> None:
    core.limits = Limits(changes=20)
    for number in range(100):
        desk.put(keys(number))
    assert len(core.added) + len(core.removed) <= 21
    assert core.changes_lost
