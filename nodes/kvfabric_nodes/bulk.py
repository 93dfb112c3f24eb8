"""Payloads over the wire: one thread per bulk connection, one transfer at a time.

Bytes are received straight into their extent and sent straight from it; every call
that takes long releases the GIL. Decisions are asked of the core on its own thread.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import structlog

from kvfabric import checksums
from kvfabric.errors import FabricError, Refused, Unreachable, to_proto
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import NamespaceId, Status
from kvfabric.wire import frames, sockets
from kvfabric_nodes.core import Grant, Lease, Reservation, Session
from kvfabric_nodes.handler import DEFAULT_DEADLINE_S, Fill, checked_keys, put_reasons, seconds

if TYPE_CHECKING:
    from kvfabric_nodes.server import WireServer

log = structlog.get_logger(__name__)

IDLE_S = 3600.0  # between two transfers


def serve_bulk(
    sock: socket.socket,
    hello: wire_pb2.Frame,
    session: Session,
    server: WireServer,
    kind: str,
) -> None:
    """Serves reads and writes until the peer closes or breaks the protocol."""
    connection = _Bulk(sock, session, server, kind)
    try:
        sock.setblocking(True)
        sockets.enlarge(sock)
        connection.answer(hello)
        while True:
            connection.serve_one()
    except Unreachable:
        pass
    except FabricError as error:
        server.handler.metrics.protocol_errors[kind] += 1
        log.warning("bulk_ended", why=str(error))
        with contextlib.suppress(FabricError):
            connection.answer(wire_pb2.Frame(error=to_proto(error)))


class _Bulk:
    def __init__(
        self, sock: socket.socket, session: Session, server: WireServer, kind: str
    ) -> None:
        self._sock = sock
        self._session = session
        self._server = server
        self._handler = server.handler
        self._kind = kind
        self._scratch = memoryview(bytearray(frames.MAX_HEADER_BYTES))
        self._deadline_s = time.monotonic() + DEFAULT_DEADLINE_S

    def answer(self, frame: wire_pb2.Frame, payload: memoryview | None = None) -> None:
        head = frames.pack(frame, len(payload) if payload is not None else 0)
        sockets.send(self._sock, head, payload, self._deadline_s)

    def serve_one(self) -> None:
        frame, payload_bytes = sockets.receive_frame(
            self._sock, self._scratch, time.monotonic() + IDLE_S
        )
        self._deadline_s = time.monotonic() + DEFAULT_DEADLINE_S
        body = frame.WhichOneof("body")
        if payload_bytes:
            raise Refused("payload before the header of a write_request")
        if body == "read_request":
            self._read(frame.id, frame.read_request)
        elif body == "write_request" and frame.write_request.HasField("header"):
            self._write(frame.id, frame.write_request.header)
        else:
            raise Refused(f"{body!r} on a bulk connection; it takes read_request, write_request")

    # Out ----------------------------------------------------------------------------

    def _read(self, frame_id: int, request: node_pb2.ReadRequest) -> None:
        deadline_s = seconds(request.deadline_ms)
        self._deadline_s = time.monotonic() + deadline_s
        handler, core = self._handler, self._handler.core
        answer = wire_pb2.Frame(id=frame_id)
        header = answer.read_response.header

        def acquire() -> Lease | None:
            lease, found = core.acquire(
                self._session,
                NamespaceId(request.namespace_id),
                checked_keys(request.keys),
                deadline_s,
                handler.clock.now(),
            )
            header.statuses.extend([Status.OK if shard else Status.MISS for shard in found])
            header.size_bytes.extend([shard.size_bytes if shard else 0 for shard in found])
            header.layers.extend([shard.layers if shard else 0 for shard in found])
            for shard in lease.shards if lease else ():
                header.checksums.extend(shard.checksums)
            return lease

        try:
            lease: Lease | None = self._server.on_core(acquire)
        except FabricError as error:
            self.answer(wire_pb2.Frame(id=frame_id, error=to_proto(error)))
            return
        answer.read_response.last = lease is None
        started_s = time.monotonic()
        try:
            self.answer(answer)
            if lease is not None:
                self._send_shards(frame_id, lease, list(header.statuses))
        finally:
            if lease is not None:
                held = lease
                self._server.on_core(lambda: core.release(self._session, [held.id]))
        if lease is not None:
            elapsed_s = time.monotonic() - started_s
            self._handler.metrics.read[self._kind].add(lease.size_bytes, elapsed_s)

    def _send_shards(self, frame_id: int, lease: Lease, statuses: list[int]) -> None:
        found = [index for index, status in enumerate(statuses) if status == Status.OK]
        for index, shard in zip(found, lease.shards, strict=True):
            view = self._handler.arena.view(
                shard.extent.segment, shard.extent.offset, shard.size_bytes
            )
            for start in range(0, len(view), frames.MAX_PAYLOAD_BYTES):
                payload = view[start : start + frames.MAX_PAYLOAD_BYTES]
                frame = wire_pb2.Frame(id=frame_id)
                frame.read_response.index = index
                frame.read_response.offset = start
                frame.read_response.last = (
                    index == found[-1] and start + len(payload) == shard.size_bytes
                )
                self.answer(frame, payload)

    # In -----------------------------------------------------------------------------

    def _write(self, frame_id: int, header: node_pb2.WriteRequest.Header) -> None:
        self._deadline_s = time.monotonic() + seconds(header.deadline_ms)
        handler = self._handler
        try:
            reservation, grants = self._server.on_core(
                lambda: handler.reserve_extents(self._session, header)
            )
        except FabricError as error:
            self.answer(wire_pb2.Frame(id=frame_id, error=to_proto(error)))
            return
        started_s = time.monotonic()
        answer = wire_pb2.Frame(id=frame_id)
        _put_grants(answer.write_response, grants, last=reservation is None)
        self.answer(answer)
        if reservation is None:
            return
        try:
            fills, wrong = self._receive_shards(frame_id, reservation)
            settled = self._server.on_core(lambda: handler.settle(reservation, fills, wrong))
        finally:
            # Nobody but this thread touches the extents, so what is left can go at once.
            self._server.on_core(lambda: handler.core.abort(reservation))
        answer = wire_pb2.Frame(id=frame_id)
        final = [settled.get(index, grant) for index, grant in enumerate(grants)]
        _put_grants(answer.write_response, final, last=True)
        self.answer(answer)
        size_bytes = sum(len(fill.view) for fill in fills)
        handler.metrics.written[self._kind].add(size_bytes, time.monotonic() - started_s)

    def _receive_shards(
        self, frame_id: int, reservation: Reservation
    ) -> tuple[list[Fill], dict[int, str]]:
        """Fills the granted extents in order, then compares with the trailer's checksums.

        Each part is hashed as soon as it is complete, while it is in the cache.
        """
        items = dict(sorted(reservation.items.items()))
        views = {
            index: self._handler.arena.view(e.segment, e.offset, item.size_bytes)
            for index, item in items.items()
            for e in (item.extent,)
        }
        filled = dict.fromkeys(views, 0)
        sums: dict[int, list[int]] = {index: [] for index in views}
        checked = self._session.checked
        while True:
            frame, payload_bytes = sockets.receive_frame(
                self._sock, self._scratch, self._deadline_s
            )
            step = frame.write_request
            if frame.id != frame_id or frame.WhichOneof("body") != "write_request":
                raise Refused("a write_request was begun and not ended by its trailer")
            if step.WhichOneof("step") == "trailer":
                break
            view = views.get(step.index)
            if view is None or step.offset != filled[step.index] or not payload_bytes:
                raise Refused(
                    f"payload for key {step.index} at {step.offset}: send the granted keys' "
                    "bytes in order"
                )
            if step.offset + payload_bytes > len(view):
                raise Refused(f"key {step.index} is longer than the {len(view)} bytes reserved")
            sockets.receive_into(
                self._sock, view[step.offset : step.offset + payload_bytes], self._deadline_s
            )
            filled[step.index] += payload_bytes
            if checked:
                _hash_complete(view, filled[step.index], reservation.layers, sums[step.index])
        expected = list(step.trailer.checksums)
        return self._compare(reservation, views, filled, sums, expected)

    def _compare(
        self,
        reservation: Reservation,
        views: dict[int, memoryview],
        filled: dict[int, int],
        sums: dict[int, list[int]],
        expected: list[int],
    ) -> tuple[list[Fill], dict[int, str]]:
        fills: list[Fill] = []
        wrong: dict[int, str] = {}
        start = 0
        for index, view in views.items():
            count = len(checksums.parts(len(view), reservation.layers))
            theirs = expected[start : start + count] if self._session.checked else []
            start += count
            fills.append(Fill(index, view, reservation.layers, theirs))
            if filled[index] != len(view):
                wrong[index] = f"{filled[index]} bytes came of {len(view)} reserved; write it again"
            elif self._session.checked and theirs != sums[index]:
                wrong[index] = "its bytes do not have the checksums of the trailer; write it again"
        return fills, wrong


def _hash_complete(view: memoryview, filled: int, layers: int, sums: list[int]) -> None:
    """Adds the checksums of the parts that `filled` bytes complete."""
    parts = checksums.parts(len(view), layers)
    while len(sums) < len(parts) and parts[len(sums)][1] <= filled:
        begin, end = parts[len(sums)]
        sums.append(checksums.checksum(view[begin:end]))


def _put_grants(response: node_pb2.WriteResponse, grants: list[Grant], *, last: bool) -> None:
    response.statuses.extend([grant.status for grant in grants])
    put_reasons(response.reasons, enumerate(grants))
    response.last = last
