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

from kvfabric import failpoints
from kvfabric.errors import Broken, FabricError, Refused, Unreachable, to_proto
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import NamespaceId, Status
from kvfabric.wire import frames, sockets
from kvfabric_nodes.serving.handler import (
    DEFAULT_DEADLINE_S,
    checked_keys,
    put_header,
    put_verdicts,
    seconds,
)
from kvfabric_nodes.store.filling import Filling
from kvfabric_nodes.store.promises import Grant, Lease, Reservation, Session

if TYPE_CHECKING:
    from kvfabric_nodes.serving.server import WireServer

log = structlog.get_logger(__name__)

IDLE_S = 365 * 86400.0  # between two transfers: a session's end also ends its connections


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
        connection.end_with(error)
    except Exception as error:
        log.exception("bulk_failed")
        connection.end_with(Broken(f"the node failed: {error!r}; see its log"))


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

    def end_with(self, error: FabricError) -> None:
        with contextlib.suppress(FabricError):
            self.answer(wire_pb2.Frame(error=to_proto(error)))

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
        deadline_s = self._handler.core.bounded(seconds(request.deadline_ms))
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
                streamed=True,
            )
            put_header(header, found, lease, self._session, handler.clock.now())
            if lease is not None and request.header_only:
                core.release(self._session, [lease.id])
                return None
            failpoints.reach("pull.reading")
            return lease

        try:
            lease = self._server.on_core(acquire)
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
                self._server.tell_core(lambda: core.release(self._session, [held.id]))
        if lease is not None:
            elapsed_s = time.monotonic() - started_s
            handler.metrics.read[self._kind].add(lease.size_bytes, elapsed_s)

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
        handler = self._handler
        self._deadline_s = time.monotonic() + handler.core.bounded(seconds(header.deadline_ms))

        def reserve() -> tuple[Reservation | None, list[Grant], bool]:
            reservation, grants = handler.reserve_extents(self._session, header, streamed=True)
            return reservation, grants, handler.may_borrow(grants)

        try:
            reservation, grants, full = self._server.on_core(reserve)
            if full:
                reservation, grants = self._server.await_on_core(
                    handler.reserve_again(self._session, header, reservation, grants, streamed=True)
                )
        except FabricError as error:
            self.answer(wire_pb2.Frame(id=frame_id, error=to_proto(error)))
            return
        started_s = time.monotonic()
        answer = wire_pb2.Frame(id=frame_id)
        put_verdicts(answer.write_response, grants, last=reservation is None)
        if reservation is None:
            self.answer(answer)
            return
        try:
            self.answer(answer)
            filling = Filling(reservation, handler.arena, checked=self._session.checked)
            trailer = self._receive_shards(frame_id, filling)
            fills, wrong = filling.verdicts(trailer)
            settled = self._server.on_core(lambda: handler.settle(reservation, fills, wrong))
        except BaseException:
            # Nobody but this thread touches the extents, so they can go at once.
            self._server.tell_core(lambda: handler.core.abort(reservation))
            raise
        elapsed_s = time.monotonic() - started_s
        handler.metrics.written[self._kind].add(filling.filled_bytes, elapsed_s)
        answer = wire_pb2.Frame(id=frame_id)
        final = [settled.get(index, grant) for index, grant in enumerate(grants)]
        put_verdicts(answer.write_response, final, last=True)
        self.answer(answer)

    def _receive_shards(self, frame_id: int, filling: Filling) -> list[int]:
        """Fills the granted extents; answers the trailer's checksums."""
        while True:
            frame, payload_bytes = sockets.receive_frame(
                self._sock, self._scratch, self._deadline_s
            )
            step = frame.write_request
            if frame.id != frame_id or frame.WhichOneof("body") != "write_request":
                raise Refused("a write_request was begun and not ended by its trailer")
            if step.HasField("trailer"):
                if payload_bytes:
                    raise Refused("payload behind a trailer; it belongs before it")
                return list(step.trailer.checksums)
            place = filling.place(step.index, step.offset, payload_bytes)
            sockets.receive_into(self._sock, place, self._deadline_s)
            filling.filled(step.index, payload_bytes)
