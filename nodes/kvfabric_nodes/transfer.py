"""One batch of a pull: asked, reserved, received straight into the arena, verified, sealed.

`Landing` runs on the core's thread, `Transfer` in a thread of its own, which does only
work that releases the GIL between two questions to the core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from kvfabric import checksums, failpoints
from kvfabric.errors import FabricError, Refused, Retry, from_proto
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import Key, Status
from kvfabric.wire import frames, sockets
from kvfabric_nodes.peers import Bulk, Peers
from kvfabric_nodes.promises import Copied, Reservation, Session
from kvfabric_nodes.pulls import Batch, Outcome

if TYPE_CHECKING:
    from kvfabric_nodes.handler import Handler

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 2.0
FRAME_TIMEOUT_S = 10.0  # a source that sends nothing for longer is left
VERIFY_TIMEOUT_S = 10.0
SLACK_S = 30.0  # what a transfer may take beyond what its rate says
DAMAGED = "came with other bytes than its checksums say"

Header = node_pb2.ReadResponse.Header
OnCore = Callable[[Callable[[], Any]], Any]
"""Runs a call on the core's thread, and answers or raises what it does."""


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


class Transfer:
    """See the module. `run` never raises; it ends soon after `stopping` is set."""

    def __init__(
        self, landing: Landing, peers: Peers, on_core: OnCore, stopping: threading.Event
    ) -> None:
        self._landing = landing
        self._peers = peers
        self._on_core = on_core
        self._stopping = stopping

    def run(self, batch: Batch, keys: Sequence[Key]) -> Result:
        """Brings these keys of the batch, as far as it can."""
        result = Result()
        damaged: list[Key] = []
        try:
            try:
                self._bring(batch, keys, result)
            finally:
                damaged = self._on_core(lambda: self._landing.settle(batch, result))
                failpoints.reach("pull.sealed")
            if damaged:
                self._accuse(batch, damaged)
        except FabricError as error:
            result.why = str(error)
        except Exception as error:
            log.exception("pull_failed", source=batch.order.source)
            result.why = f"this node failed: {error!r}; see its log"
        if damaged:
            result.why = f"{len(damaged)} shards {DAMAGED}; the source was told"
        return result

    def _bring(self, batch: Batch, keys: Sequence[Key], result: Result) -> None:
        order = batch.order
        failpoints.reach("pull.started")
        until_s = time.monotonic() + CONNECT_TIMEOUT_S
        with self._peers.bulk(order.source, order.endpoints, until_s) as bulk:
            header = _ask(bulk, batch, keys)
            self._on_core(lambda: self._landing.reserve(batch, keys, header, result))
            failpoints.reach("pull.reserved")
            if result.arrivals:
                started_s = time.monotonic()
                try:
                    self._read(bulk, batch, result.arrivals)
                finally:
                    result.seconds = time.monotonic() - started_s

    def _read(self, bulk: Bulk, batch: Batch, arrivals: list[Arrival]) -> None:
        """Receives what room is there for, no faster than the order says."""
        size_bytes = sum(len(arrival.view) for arrival in arrivals)
        frame_id = bulk.next_id()
        request = node_pb2.ReadRequest(
            namespace_id=batch.order.namespace,
            keys=[arrival.key for arrival in arrivals],
            deadline_ms=int(transfer_s(batch, size_bytes) * 1000),
        )
        _send(bulk, wire_pb2.Frame(id=frame_id, read_request=request))
        frame, payload_bytes = _receive(bulk, frame_id)
        if payload_bytes or not _agrees(frame.read_response.header, arrivals):
            raise Retry("the source's shards changed between the question and the answer")
        last = frame.read_response.last
        while not last:
            frame, payload_bytes = _receive(bulk, frame_id)
            step = frame.read_response
            if step.index >= len(arrivals):
                raise Refused(f"the source sent a key {step.index} of {len(arrivals)}")
            place = arrivals[step.index].place(step.offset, payload_bytes)
            wait_s = batch.throttle.take(payload_bytes, time.monotonic())
            if (wait_s and self._stopping.wait(wait_s)) or batch.cancelled:
                raise Retry("the pull was cancelled")
            sockets.receive_into(bulk.sock, place, time.monotonic() + FRAME_TIMEOUT_S)
            arrivals[step.index].took(payload_bytes)
            last = step.last

    def _accuse(self, batch: Batch, damaged: list[Key]) -> None:
        """Has the source look at its replicas: it drops those that are damaged."""
        order = batch.order
        log.warning("pull_damaged", source=order.source, shards=len(damaged))
        request = node_pb2.VerifyRequest(namespace_id=order.namespace, keys=damaged)
        until_s = time.monotonic() + VERIFY_TIMEOUT_S
        self._peers.call_now(order.source, order.endpoints, "verify", request, until_s)


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


def _agrees(header: Header, arrivals: Sequence[Arrival]) -> bool:
    """Whether the source is about to send what it described before."""
    return (
        all(status == Status.OK for status in header.statuses)
        and list(header.size_bytes) == [len(arrival.view) for arrival in arrivals]
        and list(header.layers) == [arrival.copied.layers for arrival in arrivals]
        and list(header.checksums) == [sum_ for each in arrivals for sum_ in each.expected]
    )


def _ask(bulk: Bulk, batch: Batch, keys: Sequence[Key]) -> Header:
    """What the source has of these keys, without their bytes."""
    frame_id = bulk.next_id()
    request = node_pb2.ReadRequest(namespace_id=batch.order.namespace, keys=keys, header_only=True)
    _send(bulk, wire_pb2.Frame(id=frame_id, read_request=request))
    frame, payload_bytes = _receive(bulk, frame_id)
    if payload_bytes or not frame.read_response.last:
        raise Refused("the source sent payload that was not asked for; bring it up to date")
    return frame.read_response.header


def _send(bulk: Bulk, frame: wire_pb2.Frame) -> None:
    sockets.send(bulk.sock, frames.pack(frame), None, time.monotonic() + FRAME_TIMEOUT_S)


def _receive(bulk: Bulk, frame_id: int) -> tuple[wire_pb2.Frame, int]:
    frame, payload_bytes = sockets.receive_frame(
        bulk.sock, bulk.scratch, time.monotonic() + FRAME_TIMEOUT_S
    )
    if frame.WhichOneof("body") == "error":
        raise from_proto(frame.error)
    if frame.id != frame_id:
        raise Refused(f"the source answered {frame.id} where {frame_id} was asked")
    return frame, payload_bytes
