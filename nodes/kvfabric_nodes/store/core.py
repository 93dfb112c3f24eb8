"""The rManager's decisions: who may write where, what is held, what is evicted.

The core owns the node's books. It never sees a payload byte, never waits and never
reads a clock: shells call it from one thread with the time and carry out what it
answers. Capacity = held + reserved + quarantined + free, to the byte, at all times.

A deadline ends a promise, not an extent. An extent that somebody may still touch
(a reservation not yet given back, a lease not yet released, of a client that shares
memory or of a stream) is never used again before that session lets go of it or ends;
meanwhile it is quarantined.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvfabric.errors import Denied, Refused
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.store.deadlines import Deadlines
from kvfabric_nodes.store.eviction import Eviction
from kvfabric_nodes.store.extents import Extent, Extents, slot_bytes
from kvfabric_nodes.store.promises import (
    Books,
    Copied,
    Grant,
    Item,
    Lease,
    Limits,
    Reading,
    Reservation,
    Session,
    Tally,
)
from kvfabric_nodes.store.shards import Shard, Shards
from kvfabric_nodes.store.story import Story

NO_KEY = Key(b"")  # of an open block, before it is sealed
EXPIRED_AT_ONCE = 1024  # shards: some milliseconds; the others at the next tick
HEAT_READS = 3  # below, a shard is not worth telling of


class NodeCore:
    """See the module. All times are seconds of one monotonic clock."""

    def __init__(self, extents: Extents, limits: Limits | None = None) -> None:
        self.extents = extents
        self.limits = limits or Limits()
        self.shards = Shards()
        self.story = Story()
        self.tally = Tally()
        self.sessions: dict[int, Session] = {}
        self.added: dict[tuple[NamespaceId, Key], Shard] = {}  # since the last heartbeat
        self.removed: dict[tuple[NamespaceId, Key], None] = {}
        self.changes_lost = False  # too many: the next heartbeat must be a full report
        self.inventory_hash = 0
        self.pins = 0
        self.recycled: list[tuple[int, int]] = []  # (old, new) segments: give them fresh memory
        self.draining = False  # takes nothing new in
        # Told of every shard that is sealed here, and of every one that goes, with the reason.
        self.on_sealed: list[Callable[[Shard, float], None]] = []
        self.on_dropped: list[Callable[[Shard, str, float], None]] = []
        # Before bytes may be used for something else: whoever reads them begins a reading.
        self.on_freeing: list[Callable[[Extent], None]] = []
        # Told of every shard that is pinned or unpinned.
        self.on_pinned: list[Callable[[Shard], None]] = []
        # Told before extents are handed out to be written.
        self.on_granted: list[Callable[[], None]] = []
        # Told of every key that nobody claims any more.
        self.on_unclaimed: list[Callable[[NamespaceId, Key, float], None]] = []
        self._heat: dict[Shard, None] = {}  # read several times since the last heartbeat
        self._held_bytes = 0
        self._reserved_bytes = 0
        self._quarantined_bytes = 0
        self._writing: dict[tuple[NamespaceId, Key], Reservation] = {}
        self._readings: dict[int, Reading] = {}
        self._deadlines = Deadlines()  # of reservations and leases
        self._lives = Deadlines()  # of shards
        self._ids = 0
        self._tenants: dict[NamespaceId, str] = {}
        self._eviction = Eviction(extents, self.shards, self.drop)
        # Told of every session that ends, before what it held is taken back.
        self.on_closed: list[Callable[[Session, float], None]] = []

    # Sessions -----------------------------------------------------------------

    def open_session(
        self, tenant: str, principal: str, *, checked: bool = True, shares_memory: bool = True
    ) -> Session:
        session = Session(self._next_id(), tenant, principal, checked, shares_memory)
        self.sessions[session.id] = session
        return session

    def learn(self, namespace: NamespaceId, tenant: str) -> None:
        """This namespace is that tenant's, as another node says."""
        self._tenants.setdefault(namespace, tenant)
        self._bound_tenants()

    def end_of_claim(self, namespace: NamespaceId, key: Key, now_s: float) -> None:
        """One less needs this key; a time to live that passed meanwhile ends it now."""
        self.shards.unclaim(namespace, key)
        if self.shards.claims(namespace, key):
            return
        for told in self.on_unclaimed:
            told(namespace, key, now_s)
        shard = self.shards.get(namespace, key)
        if shard is not None and shard.expires_s is not None and shard.expires_s <= now_s:
            self._lives.add(now_s, shard)

    def open_namespaces(self, session: Session, namespaces: Iterable[NamespaceId]) -> None:
        """The session may use these from now on; they belong to its tenant."""
        for namespace in namespaces:
            session.namespaces.add(namespace)
            self._tenants[namespace] = session.tenant
        self._bound_tenants()

    def _bound_tenants(self) -> None:
        while len(self._tenants) > self.limits.namespaces:
            del self._tenants[next(iter(self._tenants))]

    def namespaces_of(self, tenant: str) -> frozenset[NamespaceId]:
        """Every namespace that a session of this tenant has opened."""
        return frozenset(space for space, owner in self._tenants.items() if owner == tenant)

    def close_session(self, session: Session, now_s: float) -> None:
        """Takes back all it held. To be called once nobody touches its extents any more."""
        for told in self.on_closed:
            told(session, now_s)
        for reservation in [*session.reservations.values(), *session.tails.values()]:
            for index in list(reservation.items):
                self._give_back(reservation, index)
        for lease in list(session.leases.values()):
            self._let_go(lease)
        session.mapped.clear()
        self.sessions.pop(session.id, None)
        self._recycle()

    def unmapped(self, session: Session, segments: Iterable[int]) -> None:
        """The session's client no longer maps these."""
        session.mapped.difference_update(segments)
        self._recycle()

    def _recycle(self) -> bool:
        """Retired segments that nobody maps any more come back as fresh ones; whether any did."""
        if not self.extents.retired:
            return False
        mapped: set[int] = set().union(*(s.mapped for s in self.sessions.values()))
        unmapped = [s for s in self.extents.retired if s not in mapped]
        self.recycled += [(old, self.extents.replace(old).id) for old in unmapped]
        return bool(unmapped)

    # Writing ------------------------------------------------------------------

    def reserve(
        self,
        session: Session,
        namespace: NamespaceId,
        keys: Sequence[Key],
        parents: Sequence[Key | None],
        sizes: Sequence[int],
        layers: int,
        deadline_s: float,
        ttl_s: float,
        now_s: float,
        *,
        streamed: bool = False,
        tenant: str = "",
        evict: bool = True,
    ) -> tuple[Reservation | None, list[Grant]]:
        """Space for each key until `deadline_s` from now; None where no key was granted.

        `streamed`: the caller fills it from a stream, and aborts what it did not seal.
        `tenant`: whose memory it takes; the session's own, unless another node's call names
        it. Without `evict` only free space is granted.
        """
        self.admit(session, namespace, len(keys))
        if len(session.reservations) >= self.limits.reservations:
            raise Refused(
                f"this session has {len(session.reservations)} reservations open; "
                "commit or abort some first"
            )
        deadline_s = now_s + self.bounded(deadline_s)
        reservation = Reservation(
            self._next_id(),
            session,
            namespace,
            layers,
            ttl_s,
            deadline_s,
            {},
            now_s,
            streamed,
            tenant or session.tenant,
        )
        grants: list[Grant] = []
        full: dict[int, Grant] = {}  # by size: where there is no room, none comes in the batch
        for index, (key, parent, size_bytes) in enumerate(zip(keys, parents, sizes, strict=True)):
            grant = self._reserve_one(reservation, key, size_bytes, full, now_s, evict=evict)
            grants.append(grant)
            if grant.extent is not None:
                reservation.items[index] = Item(key, parent, size_bytes, grant.extent)
        if not reservation.items:
            return None, grants
        session.reservations[reservation.id] = reservation
        self._deadlines.add(reservation.deadline_s, reservation)
        self._tell_granted()
        return reservation, grants

    def _reserve_one(
        self,
        reservation: Reservation,
        key: Key,
        size_bytes: int,
        full: dict[int, Grant],
        now_s: float,
        *,
        evict: bool,
    ) -> Grant:
        namespace = reservation.namespace
        if self.shards.get(namespace, key) is not None:
            return Grant(Status.EXISTS)
        if (namespace, key) in self._writing:
            return Grant(Status.EXISTS, reason="is being written by another reservation")
        if size_bytes > self.extents.segment_bytes:
            return Grant(
                Status.REFUSED,
                reason=f"{size_bytes} bytes do not fit into a segment of "
                f"{self.extents.segment_bytes}; give the node larger segments or smaller shards",
            )
        if size_bytes in full:
            return full[size_bytes]
        if self.draining:
            return Grant(Status.RETRY, reason="this node is being drained; write to another one")
        extent = self._find_room(reservation.tenant, size_bytes, now_s, evict=evict)
        if extent is None:
            full[size_bytes] = Grant(Status.RETRY, reason=self._why_full(size_bytes))
            return full[size_bytes]
        self._reserved_bytes += extent.size_bytes
        self._writing[namespace, key] = reservation
        return Grant(Status.OK, extent)

    def reserve_tails(
        self,
        session: Session,
        namespace: NamespaceId,
        sequence: int,
        count: int,
        size_bytes: int,
        layers: int,
        now_s: float,
    ) -> tuple[Reservation | None, str]:
        """Open blocks of a sequence: as many of `count` as there is room for, and why not more.

        They have no deadline but the sequence's, and no key before they are sealed.
        """
        reservation = Reservation(
            self._next_id(),
            session,
            namespace,
            layers,
            ttl_s=0.0,
            deadline_s=math.inf,
            items={},
            filling_since_s=now_s,
            streamed=False,
            tenant=session.tenant,
            sequence=sequence,
        )
        reason = ""
        for index in range(count):
            extent = self._find_room(session.tenant, size_bytes, now_s, evict=True)
            if extent is None:
                reason = self._why_full(size_bytes)
                break
            self._reserved_bytes += extent.size_bytes
            reservation.items[index] = Item(NO_KEY, None, size_bytes, extent)
        if not reservation.items:
            return None, reason
        session.tails[reservation.id] = reservation
        self._tell_granted()
        return reservation, reason

    def _tell_granted(self) -> None:
        for told in self.on_granted:
            told()

    def name_tail(self, reservation: Reservation, index: int, key: Key, parent: Key | None) -> None:
        """An open block gets the key under which it will be sealed."""
        assert reservation.sequence
        item = reservation.items[index]
        item.key, item.parent = key, parent

    def end_tails(self, reservation: Reservation) -> None:
        """The promise of open blocks ends; a session that shares memory may still touch them."""
        if reservation.expired:
            return
        if not reservation.session.shares_memory:
            self.abort(reservation)
            return
        reservation.expired = True
        for item in reservation.items.values():
            self._reserved_bytes -= item.extent.size_bytes
            self._quarantined_bytes += item.extent.size_bytes

    def reservation(self, session: Session, reservation_id: int) -> Reservation:
        found = session.reservations.get(reservation_id)
        if found is None or found.streamed:  # a stream's is out of the reach of other calls
            raise Refused(
                f"this session has no reservation {reservation_id}: it was committed or aborted "
                "before, or never granted; reserve again"
            )
        return found

    def seal(
        self,
        reservation: Reservation,
        index: int,
        checksums: Sequence[int],
        now_s: float,
        copied: Copied | None = None,
    ) -> Grant:
        """Makes one filled and verified key visible to readers; its reservation ends.

        `copied`: it is a further replica, which is owned and ends as the first one.
        """
        item = reservation.items.get(index)
        if item is None:
            return Grant(Status.REFUSED, reason="was not granted, or is settled already")
        if reservation.expired:
            self._give_back(reservation, index)
            return Grant(
                Status.REFUSED, reason="came after its deadline; reserve again, with a longer one"
            )
        if self.shards.get(reservation.namespace, item.key) is not None:
            self._give_back(reservation, index)  # somebody sealed it meanwhile
            return Grant(Status.EXISTS)
        self._settle(reservation, index)
        extent = item.extent
        self._reserved_bytes -= extent.size_bytes
        copied = copied or Copied(
            reservation.session.principal, reservation.layers if checksums else 0, reservation.ttl_s
        )
        shard = Shard(
            namespace=reservation.namespace,
            key=item.key,
            parent=item.parent,
            pool=(reservation.tenant, extent.size_bytes),
            extent=extent,
            size_bytes=item.size_bytes,
            layers=copied.layers,
            checksums=tuple(checksums),
            owner=copied.owner,
            expires_s=now_s + copied.ttl_s if copied.ttl_s else None,
        )
        self.tally.commits += 1
        what, why = ("copied", copied.why) if copied.why else ("committed", f"by {shard.owner}")
        self.hold(shard, what, why, now_s)
        return Grant(Status.OK, extent)

    def hold(self, shard: Shard, what: str, why: str, now_s: float) -> None:
        """Takes a sealed shard, whose extent is in use, into the books."""
        self._held_bytes += shard.extent.size_bytes
        self.pins += shard.pinned
        self.shards.add(shard)
        self._report_added(shard)
        if shard.expires_s is not None:
            self._lives.add(shard.expires_s, shard)
        self.story.note(now_s, shard.namespace, shard.key, what, why)
        for told in self.on_sealed:
            told(shard, now_s)

    def freeze(
        self, tenant: str, segment: int, shards: list[Shard], empty: Iterable[Extent], now_s: float
    ) -> Session:
        """A session that stands for clients of an earlier start, which map this segment.

        Nothing of it is granted anew before that session is closed: its `shards` are served
        and stay where they are, and what else lies there (`empty`) is quarantined.
        """
        session = self.open_session(tenant, tenant)
        session.mapped.add(segment)
        if shards:
            size_bytes = sum(shard.size_bytes for shard in shards)
            lease = Lease(self._next_id(), session, shards, math.inf, now_s, size_bytes, False)
            session.leases[lease.id] = lease
        for shard in shards:
            shard.extent.holders += 1
        items = {i: Item(NO_KEY, None, e.size_bytes, e) for i, e in enumerate(empty)}
        if items:
            reservation = Reservation(
                self._next_id(),
                session,
                NamespaceId(b""),
                layers=1,
                ttl_s=0.0,
                deadline_s=now_s,
                items=items,
                filling_since_s=now_s,
                streamed=False,
                tenant=tenant,
                expired=True,
            )
            session.reservations[reservation.id] = reservation
            self._quarantined_bytes += sum(item.extent.size_bytes for item in items.values())
        return session

    def reject(self, reservation: Reservation, index: int, reason: str, now_s: float) -> Grant:
        """Frees one key of a reservation whose fill was found wrong."""
        item = reservation.items.get(index)
        if item is None:
            return Grant(Status.REFUSED, reason="was not granted, or is settled already")
        self.story.note(now_s, reservation.namespace, item.key, "refused", reason)
        self._give_back(reservation, index)
        return Grant(Status.REFUSED, reason=reason)

    def abort(self, reservation: Reservation, indices: Iterable[int] = ()) -> None:
        """The writer gives back what it reserved, all of it by default."""
        for index in list(indices) or list(reservation.items):
            if index in reservation.items:
                self._give_back(reservation, index)

    # Reading ------------------------------------------------------------------

    def match(self, session: Session, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """How many of the first keys are held here; they count as used."""
        self.admit(session, namespace, len(keys))
        room = self.shards.room(namespace)
        use = self.shards.next_use()
        matched = 0
        for key in keys:
            shard = room.get(key)
            if shard is None:
                break
            shard.last_used = use
            matched += 1
        return matched

    def acquire(
        self,
        session: Session,
        namespace: NamespaceId,
        keys: Sequence[Key],
        lease_s: float,
        now_s: float,
        *,
        streamed: bool = False,
    ) -> tuple[Lease | None, list[Shard | None]]:
        """One lease over all keys that are held here; None where there are none.

        `streamed`: the caller reads the bytes itself, and releases the lease.
        """
        self.admit(session, namespace, len(keys))
        if len(session.leases) >= self.limits.leases:
            raise Refused(
                f"this session holds {len(session.leases)} leases; release some views first"
            )
        room = self.shards.room(namespace)
        use = self.shards.next_use()
        found = [room.get(key) for key in keys]
        held = [shard for shard in found if shard is not None]
        counted = not session.between_nodes  # a copy to another node is no use of a shard
        if counted:
            self.tally.hits += len(held)
            self.tally.misses += len(keys) - len(held)
        if not held:
            return None, found
        size_bytes = 0
        for shard in held:
            shard.extent.holders += 1
            size_bytes += shard.size_bytes
            if counted:
                shard.last_used = use
                shard.reads += 1
                if shard.reads >= HEAT_READS and len(self._heat) < self.limits.heat:
                    self._heat[shard] = None
        deadline_s = now_s + self.bounded(lease_s)
        lease = Lease(self._next_id(), session, held, deadline_s, now_s, size_bytes, streamed)
        session.leases[lease.id] = lease
        self._deadlines.add(lease.deadline_s, lease)
        return lease, found

    def take_heat(self, most: int) -> list[tuple[Shard, int]]:
        """What was read most since this was asked last, and how often."""
        heat = [shard for shard in self._heat if shard.present]
        self._heat.clear()
        hottest = heapq.nlargest(most, ((shard.reads, i) for i, shard in enumerate(heat)))
        told = [(heat[index], reads) for reads, index in hottest]
        for shard in heat:
            shard.reads = 0
        return told

    def renew(self, session: Session, lease_id: int, lease_s: float, now_s: float) -> None:
        lease = self.lease(session, lease_id)
        if lease.expired:
            raise Refused(f"lease {lease_id} has expired; acquire again and renew it sooner")
        lease.deadline_s = now_s + self.bounded(lease_s)
        self._deadlines.add(lease.deadline_s, lease)

    def lease(self, session: Session, lease_id: int) -> Lease:
        found = session.leases.get(lease_id)
        if found is None:
            raise Refused(f"this session has no lease {lease_id}; it was released before")
        return found

    def release(self, session: Session, lease_ids: Iterable[int]) -> list[Lease]:
        """The reader lets go; unknown leases are ignored, so that it is safe to repeat."""
        once = dict.fromkeys(lease_ids)
        leases = [session.leases[i] for i in once if i in session.leases]
        for lease in leases:
            self._let_go(lease)
        return leases

    def begin_reading(self, extents: list[Extent]) -> Reading:
        """The node itself reads these, whoever they are: they are not used for anything else
        before `end_reading`, though what lies there may be dropped, or its sequence end.
        """
        for extent in extents:
            extent.holders += 1
        reading = Reading(self._next_id(), extents)
        self._readings[reading.id] = reading
        return reading

    def end_reading(self, reading: Reading) -> None:
        del self._readings[reading.id]
        for extent in reading.extents:
            extent.let_go()
        self.shards.considered += 1

    # Keeping and erasing --------------------------------------------------------

    def pin(self, session: Session, namespace: NamespaceId, keys: Sequence[Key]) -> list[Status]:
        """Keeps shards, past their time to live too, until unpinned; safe to repeat."""
        return self._set_pins(session, namespace, keys, pinned=True)

    def unpin(
        self, session: Session, namespace: NamespaceId, keys: Sequence[Key], now_s: float
    ) -> list[Status]:
        statuses = self._set_pins(session, namespace, keys, pinned=False)
        for key in keys:
            shard = self.shards.get(namespace, key)
            if shard is not None and shard.expires_s is not None and shard.expires_s <= now_s:
                self._lives.add(now_s, shard)  # its time came while it was pinned
        return statuses

    def _set_pins(
        self, session: Session, namespace: NamespaceId, keys: Sequence[Key], *, pinned: bool
    ) -> list[Status]:
        self.admit(session, namespace, len(keys))
        statuses: list[Status] = []
        for key in keys:
            shard = self.shards.get(namespace, key)
            statuses.append(Status.MISS if shard is None else Status.OK)
            if shard is not None:
                self.pins += pinned - shard.pinned
                shard.pinned = pinned
                self.shards.consider(shard)
                for told in self.on_pinned:
                    told(shard)
        return statuses

    def purge(
        self,
        session: Session,
        namespace: NamespaceId,
        keys: Sequence[Key],
        owner: str,
        now_s: float,
    ) -> tuple[int, int]:
        """Erases (shards, bytes): the whole namespace, or keys with all that continues them.

        `owner`: only what this principal committed; empty: anybody's.
        """
        self.admit(session, namespace, len(keys))
        chosen: dict[Key, Shard] = {}
        if keys:
            named = [self.shards.get(namespace, key) for key in dict.fromkeys(keys)]
            roots = [shard for shard in named if shard is not None]
            chosen.update((s.key, s) for s in [*roots, *self.shards.descendants(roots)])
        else:
            chosen.update(self.shards.room(namespace))
        victims = [s for s in chosen.values() if owner in ("", s.owner)]
        for shard in reversed(victims):
            self.drop(shard, "purged", f"by {session.principal}", now_s)
        return len(victims), sum(s.size_bytes for s in victims)

    def drop(self, shard: Shard, what: str, why: str, now_s: float) -> None:
        """Out of the index at once; the bytes are free when nobody touches them any more."""
        self.shards.remove(shard)
        self._report_removed(shard)
        self.story.note(now_s, shard.namespace, shard.key, what, why)
        self.tally.dropped_shards[what] += 1
        self.tally.dropped_bytes[what] += shard.size_bytes
        extent = shard.extent
        self.pins -= shard.pinned
        self._held_bytes -= extent.size_bytes
        self._free(extent)
        for told in self.on_dropped:
            told(shard, what, now_s)

    # Time -----------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Ends every promise whose deadline has passed, and of many shards the first."""
        for deadline_s, promise in self._deadlines.due(now_s):
            if isinstance(promise, Reservation):
                self._expire_reservation(promise)
            elif isinstance(promise, Lease) and promise.deadline_s <= deadline_s:
                self._expire_lease(promise)  # else it was renewed
        for _, shard in itertools.islice(self._lives.due(now_s), EXPIRED_AT_ONCE):
            assert isinstance(shard, Shard)
            if not shard.pinned and not self.shards.claimed(shard):
                self.drop(shard, "expired", "its time to live ended", now_s)

    # The books ------------------------------------------------------------------

    @property
    def free_bytes(self) -> int:
        """What nothing occupies, without the work of all the books."""
        used = self._held_bytes + self._reserved_bytes + self._all_quarantined_bytes
        return self.extents.capacity_bytes - used

    @property
    def _all_quarantined_bytes(self) -> int:
        return self._quarantined_bytes + sum(
            segment.size_bytes for segment in self.extents.retired.values()
        )

    def books(self) -> Books:
        return Books(
            capacity_bytes=self.extents.capacity_bytes,
            held_bytes=self._held_bytes,
            reserved_bytes=self._reserved_bytes,
            quarantined_bytes=self._all_quarantined_bytes,
            free_bytes=self.free_bytes,
            wasted_bytes=self.extents.wasted_bytes() + self._held_bytes - self.shards.size_bytes,
            shards=self.shards.count,
        )

    def check(self) -> None:
        """Proves the books to the byte, from the extents up."""
        self.extents.check()
        self.shards.check()
        reserved: dict[int, Extent] = {}
        quarantined: dict[int, Extent] = {}
        holders: dict[int, int] = {}
        writing = 0
        for session in self.sessions.values():
            for reservation in [*session.reservations.values(), *session.tails.values()]:
                assert reservation.items, f"reservation {reservation.id} is empty"
                for item in reservation.items.values():
                    extents = quarantined if reservation.expired else reserved
                    extents[id(item.extent)] = item.extent
                    if not (reservation.expired or reservation.sequence):
                        writing += 1
                        name = (reservation.namespace, item.key)
                        assert self._writing.get(name) is reservation
            for lease in session.leases.values():
                for shard in lease.shards:
                    holders[id(shard.extent)] = holders.get(id(shard.extent), 0) + 1
                    if not shard.present:
                        quarantined[id(shard.extent)] = shard.extent
        assert len(self._writing) == writing
        held = {id(shard.extent): shard.extent for shard in self.shards}
        for extent in (e for reading in self._readings.values() for e in reading.extents):
            holders[id(extent)] = holders.get(id(extent), 0) + 1
            if id(extent) not in held and id(extent) not in reserved:
                quarantined[id(extent)] = extent
        used = {id(e): e for s in self.extents.segments.values() for e in s.used.values()}
        assert held.keys() | reserved.keys() | quarantined.keys() == used.keys()
        assert len(held) + len(reserved) + len(quarantined) == len(used)
        assert all(e.holders == holders.get(key, 0) for key, e in used.items())
        assert self._held_bytes == sum(e.size_bytes for e in held.values())
        assert self._reserved_bytes == sum(e.size_bytes for e in reserved.values())
        assert self._quarantined_bytes == sum(e.size_bytes for e in quarantined.values())
        assert self.books().free_bytes >= 0
        keys = (int.from_bytes(shard.key[:8], "little") for shard in self.shards)
        assert self.pins == sum(shard.pinned for shard in self.shards)
        assert self.inventory_hash == sum(keys) % (1 << 64)

    # Inside -----------------------------------------------------------------------

    def admit(self, session: Session, namespace: NamespaceId, keys: int) -> None:
        """Refuses what no call may do: another's namespace, too large a batch."""
        if (
            namespace not in session.namespaces
            and self._tenants.get(namespace) != session.tenant
            and not session.between_nodes
        ):
            raise Denied(
                f"namespace {namespace.hex()[:16] or '(none)'} is not open in this session; "
                "name it in Hello, under the session's own tenant"
            )
        if keys > self.limits.batch_keys:
            raise Refused(f"{keys} keys in one batch; the limit is {self.limits.batch_keys}")

    def bounded(self, promise_s: float) -> float:
        """A deadline within the limit; callers are told what they were granted."""
        return min(promise_s, self.limits.deadline_s)

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    def _settle(self, reservation: Reservation, index: int) -> Item:
        """One item leaves its reservation; an empty reservation leaves its session."""
        item = reservation.items.pop(index)
        if not (reservation.expired or reservation.sequence):
            del self._writing[reservation.namespace, item.key]
        if not reservation.items:
            session = reservation.session
            del (session.tails if reservation.sequence else session.reservations)[reservation.id]
        return item

    def _give_back(self, reservation: Reservation, index: int) -> None:
        extent = self._settle(reservation, index).extent
        if reservation.expired:
            self._quarantined_bytes -= extent.size_bytes
        else:
            self._reserved_bytes -= extent.size_bytes
        self._free(extent)

    def _free(self, extent: Extent) -> None:
        """Nobody's any more; what somebody still reads is quarantined meanwhile."""
        for told in self.on_freeing:
            told(extent)
        if not extent.holders:
            self.extents.free(extent)
            return
        self._quarantined_bytes += extent.size_bytes
        extent.then = partial(self._free_quarantined, extent)

    def _free_quarantined(self, extent: Extent) -> None:
        self._quarantined_bytes -= extent.size_bytes
        self.extents.free(extent)

    def _expire_reservation(self, reservation: Reservation) -> None:
        if reservation.id not in reservation.session.reservations:
            return
        self.tally.expired_reservations += 1
        if not (reservation.session.shares_memory or reservation.streamed):
            self.abort(reservation)  # nobody can touch its extents
            return
        reservation.expired = True
        for item in reservation.items.values():
            del self._writing[reservation.namespace, item.key]
            self._reserved_bytes -= item.extent.size_bytes
            self._quarantined_bytes += item.extent.size_bytes

    def _expire_lease(self, lease: Lease) -> None:
        if lease.expired:
            return
        lease.expired = True
        self.tally.expired_leases += 1
        if not (lease.session.shares_memory or lease.streamed):
            self._let_go(lease)  # nobody can touch its extents

    def _let_go(self, lease: Lease) -> None:
        del lease.session.leases[lease.id]
        for shard in lease.shards:
            shard.extent.let_go()
        self.shards.considered += 1

    def _report_added(self, shard: Shard) -> None:
        self.inventory_hash += int.from_bytes(shard.key[:8], "little")
        self.inventory_hash &= (1 << 64) - 1
        self.removed.pop((shard.namespace, shard.key), None)
        self.added[shard.namespace, shard.key] = shard
        self._bound_changes()

    def _report_removed(self, shard: Shard) -> None:
        self.inventory_hash -= int.from_bytes(shard.key[:8], "little")
        self.inventory_hash &= (1 << 64) - 1
        self.added.pop((shard.namespace, shard.key), None)
        self.removed[shard.namespace, shard.key] = None
        self._bound_changes()

    def _bound_changes(self) -> None:
        """While no manager fetches them, changes must not pile up."""
        if len(self.added) + len(self.removed) > self.limits.changes:
            self.added.clear()
            self.removed.clear()
            self.changes_lost = True

    def _find_room(
        self, tenant: str, size_bytes: int, now_s: float, *, evict: bool
    ) -> Extent | None:
        """An extent, after evicting the coldest where there is none."""
        pool = (tenant, slot_bytes(size_bytes))
        extent = self.extents.allocate(tenant, size_bytes)
        while (
            extent is None
            and evict
            and (self._take_over(tenant) or self._eviction.make_room(pool, now_s))
        ):
            extent = self.extents.allocate(tenant, size_bytes)
        return extent

    def _take_over(self, tenant: str) -> bool:
        """Retires another tenant's empty slab; whether one came back at once, unmapped."""
        return self.extents.retire_empty(tenant) is not None and self._recycle()

    def _why_full(self, size_bytes: int) -> str:
        books = self.books()
        return (
            f"no room for {size_bytes} bytes: of {books.capacity_bytes}, {books.held_bytes} are "
            f"held by leases, pins, open sequences, groups or other shard sizes, "
            f"{books.reserved_bytes} reserved, "
            f"{books.quarantined_bytes} quarantined until their clients let go; unpin or release "
            "some, or give the node more memory"
        )
