"""Moving shards over the wire: one transfer per bulk connection, straight from and into buffers."""

from __future__ import annotations

from collections.abc import Sequence

from kvfabric import checksums
from kvfabric.errors import Refused, from_proto
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric.wire import frames, sockets
from kvfabric_client.buffers import Pieces
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import BulkConnection, Link
from kvfabric_client.shm import Target


def put(
    link: Link,
    header: node_pb2.WriteRequest.Header,
    sources: Sequence[Pieces],
    deadline: Deadline,
    *,
    checked: bool,
) -> tuple[list[Status], dict[int, str]]:
    """Writes shards; (status per key, reasons by index)."""
    with link.bulk(deadline.at_s) as bulk:
        frame_id = _next_id(bulk)
        begin = node_pb2.WriteRequest(header=header)
        _send(bulk, wire_pb2.Frame(id=frame_id, write_request=begin), deadline)
        answer = _receive(bulk, frame_id, deadline).write_response
        if answer.last:
            return [Status(status) for status in answer.statuses], dict(answer.reasons)
        sums: list[int] = []
        for index, status in enumerate(answer.statuses):
            if status != Status.OK:
                continue
            if checked:
                sums += sources[index].checksums(header.layers)
            for start in range(0, sources[index].size_bytes, frames.MAX_PAYLOAD_BYTES):
                _send_chunk(bulk, frame_id, index, start, sources[index], deadline)
        end = node_pb2.WriteRequest(trailer=node_pb2.WriteRequest.Trailer(checksums=sums))
        _send(bulk, wire_pb2.Frame(id=frame_id, write_request=end), deadline)
        answer = _receive(bulk, frame_id, deadline).write_response
        return [Status(status) for status in answer.statuses], dict(answer.reasons)


def get(
    link: Link,
    namespace: NamespaceId,
    keys: Sequence[Key],
    target: Target,
    deadline: Deadline,
    *,
    checked: bool,
) -> tuple[list[Status], list[int]]:
    """Reads shards into their targets: (status per key, indices whose bytes were damaged)."""
    request = node_pb2.ReadRequest(
        namespace_id=namespace, keys=keys, deadline_ms=int(deadline.left_s() * 1000)
    )
    with link.bulk(deadline.at_s) as bulk:
        frame_id = _next_id(bulk)
        _send(bulk, wire_pb2.Frame(id=frame_id, read_request=request), deadline)
        answer = _receive(bulk, frame_id, deadline).read_response
        header, last = answer.header, answer.last
        targets = [
            target(index, size_bytes) if status == Status.OK else None
            for index, (status, size_bytes) in enumerate(
                zip(header.statuses, header.size_bytes, strict=True)
            )
        ]
        while not last:
            frame, payload_bytes = sockets.receive_frame(bulk.sock, bulk.scratch, deadline.at_s)
            step = _checked(frame, frame_id).read_response
            _receive_chunk(bulk, step, payload_bytes, targets[step.index], deadline)
            last = step.last
    damaged = _damaged(header, targets) if checked else []
    return [
        Status.MISS if pieces is None or index in damaged else Status.OK
        for index, pieces in enumerate(targets)
    ], damaged


def _damaged(header: node_pb2.ReadResponse.Header, targets: Sequence[Pieces | None]) -> list[int]:
    damaged: list[int] = []
    start = 0
    for index, pieces in enumerate(targets):
        if header.statuses[index] != Status.OK or not header.layers[index]:
            continue
        count = len(checksums.parts(header.size_bytes[index], header.layers[index]))
        expected = list(header.checksums[start : start + count])
        start += count
        if pieces is not None and pieces.checksums(header.layers[index]) != expected:
            damaged.append(index)
    return damaged


def _send_chunk(
    bulk: BulkConnection,
    frame_id: int,
    index: int,
    start: int,
    source: Pieces,
    deadline: Deadline,
) -> None:
    end = min(start + frames.MAX_PAYLOAD_BYTES, source.size_bytes)
    frame = wire_pb2.Frame(id=frame_id)
    frame.write_request.index = index
    frame.write_request.offset = start
    head = frames.pack(frame, end - start)
    for piece in source.slices(start, end):
        sockets.send(bulk.sock, head, piece.data, deadline.at_s)
        head = b""


def _receive_chunk(
    bulk: BulkConnection,
    step: node_pb2.ReadResponse,
    payload_bytes: int,
    target: Pieces | None,
    deadline: Deadline,
) -> None:
    """Takes one payload in; what nobody wants is read and thrown away."""
    if target is None:
        sockets.receive_into(bulk.sock, bulk.scratch[:payload_bytes], deadline.at_s)
        return
    end = step.offset + payload_bytes
    if end > target.size_bytes:
        raise Refused("the node sent more bytes than it announced")
    for piece in target.slices(step.offset, end):
        sockets.receive_into(bulk.sock, piece.data, deadline.at_s)


def _next_id(bulk: BulkConnection) -> int:
    bulk.last_id += 1
    return bulk.last_id


def _send(bulk: BulkConnection, frame: wire_pb2.Frame, deadline: Deadline) -> None:
    sockets.send(bulk.sock, frames.pack(frame), None, deadline.at_s)


def _receive(bulk: BulkConnection, frame_id: int, deadline: Deadline) -> wire_pb2.Frame:
    frame, payload_bytes = sockets.receive_frame(bulk.sock, bulk.scratch, deadline.at_s)
    if payload_bytes:
        raise Refused("the node sent payload where none belongs")
    return _checked(frame, frame_id)


def _checked(frame: wire_pb2.Frame, frame_id: int) -> wire_pb2.Frame:
    if frame.WhichOneof("body") == "error":
        raise from_proto(frame.error)
    if frame.id != frame_id:
        raise Refused(f"the node answered {frame.id} where {frame_id} was asked")
    return frame
