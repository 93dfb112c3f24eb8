"""The core against a naive twin, by chance: several sessions of two tenants share a small arena.

The twin keeps no extents and knows nothing of slabs: it only remembers which (namespace,
key) was sealed and whose bytes are whose, and holds the core to it after every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extent, Extents
from kvfabric_nodes.store.promises import Limits, Reservation, Session
from kvfabric_nodes.store.shards import Shard

SEGMENTS = 3
SEGMENT_BYTES = 4096
SIZES = (1000, 1024, 2048, 4096)
KEYS = [Key(bytes([n]) * 32) for n in range(8)]
TENANTS = {"a": [NamespaceId(b"a" * 32), NamespaceId(b"A" * 32)], "b": [NamespaceId(b"b" * 32)]}

Name = tuple[NamespaceId, Key]


@dataclass(eq=False)
class Held:
    """A lease as its client sees it: these extents must not change under it."""

    session: Session
    id: int
    extents: list[Extent]
    expires_s: float


@dataclass(eq=False)
class Twin:
    """What must be true. `maybe`: sealed and not purged; eviction may have taken it since."""

    maybe: dict[Name, Extent] = field(default_factory=dict)
    pinned: set[Name] = field(default_factory=set)
    parents: dict[Name, Key | None] = field(default_factory=dict)
    expires_s: dict[Name, float] = field(default_factory=dict)
    reported: set[Name] = field(default_factory=set)
    leases: list[Held] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    promised_s: dict[int, float] = field(default_factory=dict)


WHAT_IS_PUT: dict[str, Any] = {
    "data": st.data(),
    "numbers": st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=6),
    "size_bytes": st.sampled_from(SIZES),
    "chained": st.booleans(),
    "ttl_s": st.sampled_from([0.0, 0.0, 3.0]),
}


class CoreMachine(RuleBasedStateMachine):
    sessions = Bundle("sessions")
    reservations = Bundle("reservations")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES), Limits(deadline_s=50.0))
        self.twin = Twin()
        self.now_s = 0.0
        self.arenas: set[int] = set(self.core.extents.segments)

    # Rules --------------------------------------------------------------------------

    @initialize(target=sessions)
    def first_session(self) -> Session:
        return self._session("a")

    @rule(target=sessions, tenant=st.sampled_from("ab"), shares_memory=st.booleans())
    def open_session(self, tenant: str, shares_memory: bool) -> Session:
        return self._session(tenant, shares_memory=shares_memory)

    def _session(self, tenant: str, *, shares_memory: bool = True) -> Session:
        session = self.core.open_session(tenant, tenant, shares_memory=shares_memory)
        self.core.open_namespaces(session, TENANTS[tenant])
        return session

    @rule(
        target=reservations,
        session=sessions,
        deadline_s=st.sampled_from([1.0, 5.0, 100.0]),
        **WHAT_IS_PUT,
    )
    def reserve(self, **what: Any) -> Any:
        return self._reserve(**what) or multiple()

    @rule(session=sessions, rounds=st.integers(1, 4), **WHAT_IS_PUT)
    def put(self, rounds: int, **what: Any) -> None:
        for _ in range(rounds):
            reservation = self._reserve(deadline_s=5.0, **what)
            for index in list(reservation.items) if reservation else ():
                self._seal(reservation, index)
            what["numbers"] = [(number + 3) % len(KEYS) for number in what["numbers"]]
            what["size_bytes"] = what["data"].draw(st.sampled_from(SIZES))

    def _reserve(
        self,
        session: Session,
        data: Any,
        numbers: list[int],
        size_bytes: int,
        chained: bool,
        deadline_s: float,
        ttl_s: float,
    ) -> Reservation | None:
        if session.id not in self.core.sessions:
            return None
        namespace = data.draw(st.sampled_from(TENANTS[session.tenant]))
        keys = [KEYS[number] for number in numbers]
        parents = [None, *keys[:-1]] if chained else [None] * len(keys)
        spans = self._busy()
        needed = self._needed()
        reservation, grants = self.core.reserve(
            session,
            namespace,
            keys,
            parents,
            [size_bytes] * len(keys),
            1,
            deadline_s,
            ttl_s,
            self.now_s,
        )
        self._share_out()
        present = {(shard.namespace, shard.key) for shard in self.core.shards}
        assert needed <= present, "evicted past a pin, a lease, or from under a continuation"
        writing = {
            (r.namespace, item.key)
            for r in self.twin.reservations
            if not r.expired
            for item in r.items.values()
        }
        for key, grant in zip(keys, grants, strict=True):
            if grant.extent is None:
                continue
            assert (namespace, key) not in writing, "granted to two writers"
            writing.add((namespace, key))
            assert not any(_overlap(grant.extent, other) for other in spans), (
                "an extent that somebody may touch was handed out"
            )
            assert self.core.extents.segments[grant.extent.segment].tenant == session.tenant
            spans.append(grant.extent)
        if reservation is None:
            assert Status.OK not in [grant.status for grant in grants]
            return None
        self.twin.reservations.append(reservation)
        self.twin.promised_s[reservation.id] = self.now_s + min(deadline_s, 50.0)
        return reservation

    @rule(reservation=reservations, data=st.data())
    def seal(self, reservation: Reservation, data: Any) -> None:
        self._seal(reservation, data.draw(st.integers(0, 5)))

    @rule(reservation=consumes(reservations))
    def seal_all(self, reservation: Reservation) -> None:
        for index in list(reservation.items):
            self._seal(reservation, index)
        assert not reservation.items

    def _seal(self, reservation: Any, index: int) -> None:
        item = reservation.items.get(index)
        late = self.now_s >= self.twin.promised_s[reservation.id]
        grant = self.core.seal(reservation, index, (1,), self.now_s)
        if item is None or late:
            assert grant.status is Status.REFUSED
            return
        assert grant.status is Status.OK
        name = (reservation.namespace, item.key)
        self.twin.maybe[name] = item.extent
        self.twin.parents[name] = item.parent
        self.twin.pinned.discard(name)
        self.twin.expires_s.pop(name, None)
        if reservation.ttl_s:
            self.twin.expires_s[name] = self.now_s + reservation.ttl_s
        assert self.core.match(reservation.session, *self._one(name)) == 1

    @rule(reservation=reservations, data=st.data())
    def reject(self, reservation: Reservation, data: Any) -> None:
        index = data.draw(st.integers(0, 5))
        grant = self.core.reject(reservation, index, "wrong", self.now_s)
        assert grant.status is Status.REFUSED

    @rule(reservation=consumes(reservations))
    def abort(self, reservation: Reservation) -> None:
        self.core.abort(reservation)
        assert not reservation.items

    @precondition(lambda self: self.core.shards.count)
    @rule(
        target=leases,
        session=sessions,
        data=st.data(),
        numbers=st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=5),
        lease_s=st.sampled_from([1.0, 10.0]),
    )
    def acquire(self, session: Session, data: Any, numbers: list[int], lease_s: float) -> Any:
        if session.id not in self.core.sessions:
            return multiple()
        namespace = data.draw(st.sampled_from(TENANTS[session.tenant]))
        keys = [KEYS[number] for number in numbers]
        lease, found = self.core.acquire(session, namespace, keys, lease_s, self.now_s)
        for key, shard in zip(keys, found, strict=True):
            if shard is not None:
                assert shard.extent is self.twin.maybe[namespace, key], "not what was sealed"
        if lease is None:
            return multiple()
        extents = [shard.extent for shard in found if shard is not None]
        held = Held(session, lease.id, extents, self.now_s + lease_s)
        self.twin.leases.append(held)
        return held

    @rule(held=leases, lease_s=st.sampled_from([1.0, 10.0]))
    def renew(self, held: Held, lease_s: float) -> None:
        lease = held.session.leases.get(held.id)
        if lease is None or lease.expired:
            return
        self.core.renew(held.session, held.id, lease_s, self.now_s)
        held.expires_s = self.now_s + lease_s

    @rule(held=consumes(leases))
    def release(self, held: Held) -> None:
        self.core.release(held.session, [held.id, held.id])
        self._forget(held)

    @precondition(lambda self: self.core.shards.count)
    @rule(
        session=sessions,
        number=st.integers(0, len(KEYS) - 1),
        data=st.data(),
        pinned=st.booleans(),
    )
    def pin(self, session: Session, number: int, data: Any, pinned: bool) -> None:
        if session.id not in self.core.sessions:
            return
        namespace = data.draw(st.sampled_from(TENANTS[session.tenant]))
        name = (namespace, KEYS[number])
        if pinned:
            [status] = self.core.pin(session, namespace, [KEYS[number]])
            if status is Status.OK:
                self.twin.pinned.add(name)
        else:
            self.core.unpin(session, namespace, [KEYS[number]], self.now_s)
            self.twin.pinned.discard(name)

    @rule(
        session=sessions,
        numbers=st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=2) | st.just([]),
        data=st.data(),
    )
    def purge(self, session: Session, numbers: list[int], data: Any) -> None:
        if session.id not in self.core.sessions:
            return
        namespace = data.draw(st.sampled_from(TENANTS[session.tenant]))
        before = {shard.key for shard in self.core.shards if shard.namespace == namespace}
        shards, _ = self.core.purge(session, namespace, [KEYS[n] for n in numbers], "", self.now_s)
        after = {shard.key for shard in self.core.shards if shard.namespace == namespace}
        assert shards == len(before - after)
        assert not {KEYS[n] for n in numbers} & after
        assert numbers or not after
        for key in before - after:
            self._gone((namespace, key))

    @rule(seconds=st.sampled_from([0.5, 2.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.core.tick(self.now_s)
        present = {(shard.namespace, shard.key) for shard in self.core.shards}
        for name, at_s in list(self.twin.expires_s.items()):
            if at_s <= self.now_s and name not in self.twin.pinned:
                assert name not in present, "outlived its time"
                self._gone(name)
        for held in list(self.twin.leases):
            lease = held.session.leases.get(held.id)
            if held.expires_s > self.now_s:
                assert lease is not None
                assert not lease.expired
            elif held.session.shares_memory:
                assert lease is not None, "let go before its client did"
                assert lease.expired
            else:
                assert lease is None, "a lease that nobody can use binds beyond its deadline"
                self._forget(held)
        for reservation in self.twin.reservations:
            if reservation.items:
                assert reservation.session.shares_memory or not reservation.expired
                over = self.now_s >= self.twin.promised_s[reservation.id]
                assert reservation.expired == over

    @rule(session=sessions)
    def map_memory(self, session: Session) -> None:
        if session.id in self.core.sessions and session.shares_memory:
            session.mapped |= {
                s.id for s in self.core.extents.segments.values() if s.tenant == session.tenant
            }

    @rule(session=sessions)
    def unmap(self, session: Session) -> None:
        if session.id in self.core.sessions:
            self.core.unmapped(session, list(self.core.extents.retired))
            self._share_out()

    @rule(session=consumes(sessions))
    def close_session(self, session: Session) -> None:
        self.core.close_session(session, self.now_s)
        for held in list(self.twin.leases):
            if held.session is session:
                self._forget(held)
        assert not session.reservations
        self._share_out()

    @rule()
    def heartbeat(self) -> None:
        """Deltas replayed onto what was reported before give the index."""
        self.twin.reported -= set(self.core.removed)
        self.twin.reported |= set(self.core.added)
        self.core.added.clear()
        self.core.removed.clear()
        present = {(shard.namespace, shard.key) for shard in self.core.shards}
        assert self.twin.reported == present
        total = sum(int.from_bytes(key[:8], "little") for _, key in present)
        assert self.core.inventory_hash == total % 2**64

    # What holds after every step -----------------------------------------------------

    @invariant()
    def the_books_balance(self) -> None:
        self.core.check()
        books = self.core.books()
        parts = books.held_bytes + books.reserved_bytes + books.quarantined_bytes + books.free_bytes
        assert parts == books.capacity_bytes == SEGMENTS * SEGMENT_BYTES

    @invariant()
    def only_what_was_sealed_is_held(self) -> None:
        for shard in self.core.shards:
            name = (shard.namespace, shard.key)
            assert shard.extent is self.twin.maybe.get(name), "held without a seal"
            assert self.core.extents.segments[shard.extent.segment].tenant == shard.pool[0]
        for name in self.twin.pinned:
            assert self.core.shards.get(*name) is not None, "a pinned shard was evicted"

    @invariant()
    def a_lease_holds_its_extents(self) -> None:
        for held in self.twin.leases:
            assert all(extent.holders > 0 for extent in held.extents)

    # Inside --------------------------------------------------------------------------

    def _needed(self) -> set[Name]:
        """What is pinned or leased, and all that leads to it along its chain."""
        needed: set[Name] = set()
        for shard in self.core.shards:
            link: Shard | None = shard if shard.pinned or shard.extent.holders else None
            while link is not None:
                needed.add((link.namespace, link.key))
                parent = link.parent
                link = self.core.shards.get(link.namespace, parent) if parent else None
        return needed

    def _busy(self) -> list[Extent]:
        """Extents that some client may touch now."""
        return [
            *(e for held in self.twin.leases for e in held.extents),
            *(item.extent for r in self.twin.reservations for item in r.items.values()),
        ]

    def _one(self, name: Name) -> tuple[NamespaceId, list[Key]]:
        return name[0], [name[1]]

    def _gone(self, name: Name) -> None:
        self.twin.maybe.pop(name, None)
        self.twin.pinned.discard(name)
        self.twin.expires_s.pop(name, None)

    def _forget(self, held: Held) -> None:
        if held in self.twin.leases:
            self.twin.leases.remove(held)

    def _share_out(self) -> None:
        """A segment that comes back has a new name, and nobody maps the old one."""
        for old, new in self.core.recycled:
            assert new not in self.arenas, "a segment's name was used twice"
            self.arenas.add(new)
            assert not any(old in s.mapped for s in self.core.sessions.values())
        self.core.recycled.clear()


def _overlap(a: Extent, b: Extent) -> bool:
    return (
        a.segment == b.segment
        and a.offset < b.offset + b.size_bytes
        and b.offset < a.offset + a.size_bytes
    )


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=100,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
