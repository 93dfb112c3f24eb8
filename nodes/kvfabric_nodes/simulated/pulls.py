"""Pulls in the simulator: the real queue and core, with messages and payloads that are simulated.

A payload is the name of what was written. Whoever reads gets the name that lies in the
extent at that moment, so that an extent which is given away too early is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from kvfabric.simulation.engine import Task
from kvfabric.simulation.nodes import Ground
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.copying.pulls import Batch, Outcome, Pulled, PullOrder, Pulls
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.promises import Copied, Lease, Reservation, Session

LEASE_S = 60.0
CALL_S = 5.0


def payload_of(namespace: NamespaceId, key: Key) -> bytes:
    """What is written under this key, and nothing else."""
    return namespace[:8] + key


def checksum(payload: bytes) -> int:
    return int.from_bytes(blake2b(payload, digest_size=8).digest(), "little")


class Tags:
    """The arena's content: a name for each extent that was ever written."""

    def __init__(self) -> None:
        self._tags: dict[tuple[int, int], bytes] = {}

    def write(self, extent: Extent, payload: bytes) -> None:
        self._tags[extent.segment, extent.offset] = payload

    def read(self, extent: Extent) -> bytes:
        return self._tags.get((extent.segment, extent.offset), b"")


@dataclass(frozen=True, slots=True)
class Described:
    """One key of a read's header, as the source says it."""

    status: Status
    size_bytes: int = 0
    layers: int = 0
    checksums: tuple[int, ...] = ()
    parent: Key | None = None
    owner: str = ""
    ttl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Header:
    """The answer to a read: what there is, under a lease that keeps it."""

    tenant: str
    lease: int
    keys: tuple[Described, ...]


class Sources:
    """The side that is read from: leases, and payloads."""

    def __init__(self, core: NodeCore, tags: Tags) -> None:
        self._core = core
        self._tags = tags
        self._sessions: dict[str, Session] = {}  # by peer

    def describe(
        self, peer: str, namespace: NamespaceId, keys: Sequence[Key], now_s: float
    ) -> Header:
        """Leases what is here until it is read, or for LEASE_S."""
        lease, found = self._core.acquire(
            self._session(peer), namespace, keys, LEASE_S, now_s, streamed=False
        )
        tenant = next((shard.pool[0] for shard in found if shard is not None), "")
        described = tuple(
            Described(Status.MISS)
            if shard is None
            else Described(
                Status.OK,
                shard.size_bytes,
                shard.layers,
                shard.checksums,
                shard.parent,
                shard.owner,
                max(0.001, shard.expires_s - now_s) if shard.expires_s is not None else 0.0,
            )
            for shard in found
        )
        return Header(tenant, lease.id if lease else 0, described)

    def read(self, peer: str, lease_id: int, key: Key) -> bytes | None:
        """The payload that lies in the leased extent; None: the lease has ended."""
        lease = self._lease(peer, lease_id)
        if lease is None or lease.expired:
            return None
        return next((self._tags.read(s.extent) for s in lease.shards if s.key == key), None)

    def release(self, peer: str, lease_id: int) -> None:
        session = self._sessions.get(peer)
        if session is not None:
            self._core.release(session, [lease_id])

    def _lease(self, peer: str, lease_id: int) -> Lease | None:
        session = self._sessions.get(peer)
        return session.leases.get(lease_id) if session else None

    def _session(self, peer: str) -> Session:
        if peer not in self._sessions:
            session = self._core.open_session("", f"node/{peer}", shares_memory=False)
            session.between_nodes = True
            self._sessions[peer] = session
        return self._sessions[peer]


Told = Callable[[Pulled], None]


class SimulatedPuller:
    """Carries out what the real `Pulls` starts. `sources_of` is another node's `Sources`."""

    def __init__(
        self,
        name: str,
        core: NodeCore,
        tags: Tags,
        pulls: Pulls,
        ground: Ground,
        sources_of: Callable[[str], Sources | None],
        copied: Callable[[], None],
    ) -> None:
        self.pulls = pulls
        self.copied_bytes = 0
        self._rates: dict[str, int] = {}
        self._name = name
        self._core = core
        self._tags = tags
        self._ground = ground
        self._sources_of = sources_of
        self._copied = copied
        self._told: dict[tuple[str, int], list[Told]] = {}
        self._tasks: dict[Task, None] = {}
        self._own: Session | None = None
        self._stopped = False

    def begin(self, order: PullOrder, told: Told) -> None:
        self.pulls.add(order, self._now())
        self._told.setdefault((order.origin, order.id), []).append(told)
        self._ground.simulation.after(0.0, self.pump)

    def cancel(self, origin: str, order_id: int) -> None:
        if self.pulls.cancel(origin, order_id, self._now()):
            self._ground.simulation.after(0.0, self.pump)

    def stop(self) -> None:
        self._stopped = True
        for task in self._tasks:
            task.kill()

    def take_rates(self) -> dict[str, int]:
        """The links measured since this was asked last, in bytes a second."""
        taken, self._rates = self._rates, {}
        return taken

    def pump(self) -> None:
        """Starts what may start, and tells of what has ended."""
        if self._stopped:
            return
        while batches := self.pulls.start(self._now()):
            for batch in batches:
                task = self._ground.simulation.start(self._transfer(batch))
                self._tasks[task] = None
        self._tasks = {task: None for task in self._tasks if not task.done}
        results, self.pulls.results = self.pulls.results, []
        for result in results:
            reservation = result.order.reservation
            if reservation is not None and reservation.items:
                self._core.abort(reservation)
            for told in self._told.pop((result.order.origin, result.order.id), []):
                told(result)
        now_s = self._now()
        due_s = self.pulls.due_s(now_s)
        if due_s is not None:
            self._ground.simulation.after(max(0.01, due_s - now_s), self.pump)

    def _now(self) -> float:
        return self._ground.clock(self._name)

    async def _transfer(self, batch: Batch) -> None:
        order = batch.order
        room = self._core.shards.room(order.namespace)
        verdicts = {key: Outcome.HELD for key in batch.keys if key in room}
        keys = [key for key in batch.keys if key not in room]
        self._ground.reach("pull.started", self._name, order.source)
        moved, why = 0, ""
        if keys:
            moved, why = await self._bring(batch, keys, verdicts)
        self.copied_bytes += moved
        self.pulls.ended(batch, verdicts, moved, why, self._now())
        if moved:
            self._ground.reach("pull.sealed", self._name, order.source)
            self._copied()
        self.pump()

    async def _bring(
        self, batch: Batch, keys: list[Key], verdicts: dict[Key, Outcome]
    ) -> tuple[int, str]:
        order, network = batch.order, self._ground.network
        question = (order.namespace, tuple(keys))
        header: Header | None = await network.call(
            self._name, order.source, "read", question, CALL_S
        )
        if header is None:
            return 0, f"{order.source} does not answer"
        wanted = dict(zip(keys, header.keys, strict=True))
        verdicts.update(
            (key, Outcome.MISSING) for key, said in wanted.items() if said.status is not Status.OK
        )
        wanted = {key: said for key, said in wanted.items() if said.status is Status.OK}
        granted = self._reserve(batch, header, wanted, verdicts)
        self._ground.reach("pull.reserved", self._name, order.source)
        size_bytes = sum(wanted[key].size_bytes for key in granted)
        begun_s = self._now()
        came = await network.carry(order.source, self._name, size_bytes, float(order.bytes_per_s))
        if came and size_bytes and not order.bytes_per_s:
            self._rates[order.source] = int(size_bytes / max(1e-6, self._now() - begun_s))
        source = self._sources_of(order.source) if came else None
        moved = 0
        for key, (reservation, index) in granted.items():
            payload = source.read(self._name, header.lease, key) if source is not None else None
            moved += self._settle(batch, key, wanted[key], reservation, index, payload, verdicts)
        network.call(self._name, order.source, "release", header.lease, CALL_S)
        return moved, "" if came else f"{order.source} was lost while it sent"

    def _reserve(
        self,
        batch: Batch,
        header: Header,
        wanted: dict[Key, Described],
        verdicts: dict[Key, Outcome],
    ) -> dict[Key, tuple[Reservation, int]]:
        order = batch.order
        granted: dict[Key, tuple[Reservation, int]] = {}
        if order.reservation is not None:
            for index, item in order.reservation.items.items():
                if item.key in wanted:
                    granted[item.key] = (order.reservation, index)
        news = [key for key in wanted if key not in granted]
        if not news:
            return granted
        self._core.learn(order.namespace, header.tenant)
        reservation, grants = self._core.reserve(
            self._session(),
            order.namespace,
            news,
            [wanted[key].parent for key in news],
            [wanted[key].size_bytes for key in news],
            1,
            LEASE_S,
            0.0,
            self._now(),
            streamed=True,
            tenant=header.tenant,
            evict=order.evict,
        )
        for index, (key, grant) in enumerate(zip(news, grants, strict=True)):
            if grant.status is Status.OK:
                assert reservation is not None
                granted[key] = (reservation, index)
            elif grant.status is not Status.EXISTS:
                verdicts[key] = Outcome.FULL
            elif self._core.shards.get(order.namespace, key) is not None:
                verdicts[key] = Outcome.HELD
        return granted

    def _settle(
        self,
        batch: Batch,
        key: Key,
        said: Described,
        reservation: Reservation,
        index: int,
        payload: bytes | None,
        verdicts: dict[Key, Outcome],
    ) -> int:
        """The bytes that are sealed now."""
        item = reservation.items.get(index)
        if item is None:
            return 0  # its owner has given it back
        if payload is None:
            if reservation is not batch.order.reservation:
                self._core.abort(reservation, [index])
            return 0
        self._tags.write(item.extent, payload)
        if said.checksums and checksum(payload) != said.checksums[0]:
            self._core.reject(reservation, index, "came damaged", self._now())
            verdicts[key] = Outcome.DAMAGED
            return 0
        item.parent = said.parent
        copied = Copied(said.owner, said.layers, said.ttl_s)
        grant = self._core.seal(reservation, index, said.checksums, self._now(), copied=copied)
        if grant.status is not Status.OK:
            return 0
        verdicts[key] = Outcome.COPIED
        return said.size_bytes

    def _session(self) -> Session:
        if self._own is None:
            self._own = self._core.open_session("", "kvfabric", shares_memory=False)
            self._own.between_nodes = True
        return self._own
