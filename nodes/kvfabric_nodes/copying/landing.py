"""Where a pull's shards land: what is missing here, room for it, and what is sealed of it.

On the core's thread only; the bytes come in a thread of their own (`transfer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfabric import checksums
from kvfabric.errors import Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, Status
from kvfabric_nodes.copying.pulls import Batch, Outcome
from kvfabric_nodes.store.promises import Copied, Reservation, Session

if TYPE_CHECKING:
    from kvfabric_nodes.serving.handler import Handler

SLACK_S = 30.0  # what a transfer may take beyond what its rate says
DAMAGED = "came with other bytes than its checksums say"

Header = node_pb2.ReadResponse.Header


@dataclass(slots=True, eq=False)
class Arrival:
    """One shard on its way into its extent, hashed while it passes."""

    key: Key
    parent: Key | None
    copied: Copied
    reservation: Reservation
    index: int  # in the reservation
    view: memoryview
    expected: list[int]
    filled_bytes: int = 0
    sums: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.filled_bytes == len(self.view)

    @property
    def intact(self) -> bool:
        return not self.copied.layers or self.sums == self.expected

    def place(self, offset: int, size_bytes: int) -> memoryview:
        """Where the next payload goes. Refused where it is not the next, or too long."""
        end = offset + size_bytes
        if offset != self.filled_bytes or not size_bytes or end > len(self.view):
            raise Refused(
                f"the source sent bytes {offset} to {end} of a shard of {len(self.view)}, of which "
                f"{self.filled_bytes} are here; it does not follow the protocol"
            )
        return self.view[offset:end]

    def took(self, size_bytes: int) -> None:
        """The payload is in its place: hashes what it completes, while it is in the cache."""
        self.filled_bytes += size_bytes
        if not self.copied.layers:
            return
        parts = checksums.parts(len(self.view), self.copied.layers)
        while len(self.sums) < len(parts) and parts[len(self.sums)][1] <= self.filled_bytes:
            start, end = parts[len(self.sums)]
            self.sums.append(checksums.checksum(self.view[start:end]))


@dataclass(slots=True, eq=False)
class Result:
    """What became of a batch. Keys without a verdict come again; `why`: what went wrong."""

    verdicts: dict[Key, Outcome] = field(default_factory=dict)
    arrivals: list[Arrival] = field(default_factory=list)
    size_bytes: int = 0  # sealed
    seconds: float = 0.0  # of reading
    why: str = ""


class Landing:
    """What pulls ask of the core. On its thread only."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._core = handler.core
        self._own: Session | None = None

    def missing(self, batch: Batch) -> list[Key]:
        """Which of the keys are not here."""
        room = self._core.shards.room(batch.order.namespace)
        return [key for key in batch.keys if key not in room]

    def reserve(self, batch: Batch, keys: Sequence[Key], header: Header, result: Result) -> None:
        """Room for as much as one batch may bring; what has none gets its verdict."""
        wanted = _described(batch, keys, header, result)
        left_bytes = batch.throttle.batch_bytes
        for count, (_, size_bytes, *_) in enumerate(wanted):
            left_bytes -= size_bytes
            if count and left_bytes < 0:
                del wanted[count:]
                break
        granted = self._granted_before(batch, wanted, result)
        news = [each for each in wanted if each[0] not in granted]
        granted |= self._grant(batch, news, header.tenant, result)
        for key, size_bytes, parent, copied, expected in wanted:
            if key not in granted:
                continue
            reservation, index = granted[key]
            extent = reservation.items[index].extent
            view = self._handler.arena.view(extent.segment, extent.offset, size_bytes)
            result.arrivals.append(Arrival(key, parent, copied, reservation, index, view, expected))

    def _granted_before(
        self, batch: Batch, wanted: list[Wanted], result: Result
    ) -> dict[Key, tuple[Reservation, int]]:
        """Room that was reserved with the order."""
        reservation = batch.order.reservation
        if reservation is None:
            return {}
        indices = {item.key: index for index, item in reservation.items.items()}
        granted: dict[Key, tuple[Reservation, int]] = {}
        for key, size_bytes, *_ in wanted:
            index = indices.get(key)
            if index is None:
                continue
            if reservation.items[index].size_bytes == size_bytes:
                granted[key] = (reservation, index)
            else:
                why = f"the source's has {size_bytes} bytes, not as many as were reserved"
                self._core.reject(reservation, index, why, self._handler.clock.now())
                result.verdicts[key] = Outcome.FAILED
                result.why = why
        return granted

    def _grant(
        self, batch: Batch, wanted: list[Wanted], tenant: str, result: Result
    ) -> dict[Key, tuple[Reservation, int]]:
        wanted = [each for each in wanted if each[0] not in result.verdicts]
        if not wanted:
            return {}
        core, order = self._core, batch.order
        core.learn(order.namespace, tenant)
        keys = [each[0] for each in wanted]
        sizes = [each[1] for each in wanted]
        reservation, grants = core.reserve(
            self._session(),
            order.namespace,
            keys,
            [each[2] for each in wanted],
            sizes,
            1,
            transfer_s(batch, sum(sizes)),
            0.0,
            self._handler.clock.now(),
            streamed=True,
            tenant=tenant,
            evict=order.evict,
        )
        self._handler.renew_memory()
        granted: dict[Key, tuple[Reservation, int]] = {}
        for index, (key, grant) in enumerate(zip(keys, grants, strict=True)):
            if grant.status is Status.OK:
                assert reservation is not None
                granted[key] = (reservation, index)
            elif grant.status is not Status.EXISTS:
                result.verdicts[key] = Outcome.FULL
                result.why = grant.reason
            elif core.shards.get(order.namespace, key) is not None:
                result.verdicts[key] = Outcome.HELD
            else:
                result.why = grant.reason  # its writer may fail: it comes again
        return granted

    def settle(self, batch: Batch, result: Result) -> list[Key]:
        """Seals what came whole and intact, gives the rest back; answers what was damaged."""
        now_s = self._handler.clock.now()
        damaged: list[Key] = []
        for arrival in result.arrivals:
            reservation, index = arrival.reservation, arrival.index
            if index not in reservation.items:
                continue  # its owner has given it back
            if not arrival.complete:
                if reservation is not batch.order.reservation:
                    self._core.abort(reservation, [index])
                continue
            if not arrival.intact:
                damaged.append(arrival.key)
                self._handler.metrics.mismatches["pull"] += 1
                self._core.reject(reservation, index, DAMAGED, now_s)
                result.verdicts[arrival.key] = Outcome.DAMAGED
                continue
            reservation.items[index].parent = arrival.parent
            grant = self._core.seal(
                reservation, index, arrival.expected, now_s, copied=arrival.copied
            )
            if grant.status is Status.OK:
                result.verdicts[arrival.key] = Outcome.COPIED
                result.size_bytes += len(arrival.view)
            elif grant.status is Status.EXISTS:
                result.verdicts[arrival.key] = Outcome.HELD
            else:
                result.why = grant.reason
        return damaged

    def end(self, reservation: Reservation | None) -> None:
        """An order is over: what of its room was not needed is free."""
        if reservation is not None and reservation.items:
            self._core.abort(reservation)

    def _session(self) -> Session:
        """The node's own, for what it reserves for itself."""
        if self._own is None:
            self._own = self._core.open_session("", "kvfabric", shares_memory=False)
            self._own.between_nodes = True
        return self._own


def transfer_s(batch: Batch, size_bytes: int) -> float:
    """How long a transfer of so many bytes may take."""
    rate = batch.throttle.bytes_per_s
    return SLACK_S + (1.5 * size_bytes / rate if rate else 0.0)


Wanted = tuple[Key, int, "Key | None", Copied, "list[int]"]  # size, parent, checksums


def _described(batch: Batch, keys: Sequence[Key], header: Header, result: Result) -> list[Wanted]:
    """What the source has of these, as it says. Refused where its columns do not fit."""
    columns = (header.statuses, header.size_bytes, header.layers, header.parents, header.owners)
    if any(len(column) != len(keys) for column in (*columns, header.ttl_ms)):
        raise Refused("the source does not say what a replica has to know; bring it up to date")
    order = batch.order
    why = f"from {order.source}: {order.why}" if order.why else f"from {order.source}"
    wanted: list[Wanted] = []
    start = 0
    for index, key in enumerate(keys):
        if header.statuses[index] != Status.OK:
            result.verdicts[key] = Outcome.MISSING
            continue
        size_bytes, layers = header.size_bytes[index], header.layers[index]
        count = len(checksums.parts(size_bytes, layers)) if layers else 0
        expected = list(header.checksums[start : start + count])
        start += count
        copied = Copied(header.owners[index], layers, header.ttl_ms[index] / 1000, why)
        parent = header.parents[index]
        wanted.append((key, size_bytes, Key(parent) if parent else None, copied, expected))
    return wanted
