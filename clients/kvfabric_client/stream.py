"""Moving shards over the wire: one transfer per bulk connection, straight from and into buffers."""

from __future__ import annotations

from collections.abc import Sequence

from kvfabric import checksums
from kvfabric.errors import Refused, from_proto
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric.wire import frames, sockets
from kvfabric_client.buffers import PartSums, Pieces
from kvfabric_client.deadline import Deadline, milliseconds
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
            passed = PartSums(sources[index], header.layers)
            for start in range(0, sources[index].size_bytes, frames.MAX_PAYLOAD_BYTES):
                end = _send_chunk(bulk, frame_id, index, start, sources[index], deadline)
                if checked:
                    passed.reach(end)
            sums += passed.sums
        trailer = node_pb2.WriteRequest(trailer=node_pb2.WriteRequest.Trailer(checksums=sums))
        _send(bulk, wire_pb2.Frame(id=frame_id, write_request=trailer), deadline)
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
        namespace_id=namespace, keys=keys, deadline_ms=milliseconds(deadline.left_s())
    )
    with link.bulk(deadline.at_s) as bulk:
        frame_id = _next_id(bulk)
        _send(bulk, wire_pb2.Frame(id=frame_id, read_request=request), deadline)
        answer = _receive(bulk, frame_id, deadline).read_response
        header, last = answer.header, answer.last
        arrivals = [
            _Arrival(target(index, size_bytes) if status == Status.OK else None, layers * checked)
            for index, (status, size_bytes, layers) in enumerate(
                zip(header.statuses, header.size_bytes, header.layers, strict=True)
            )
        ]
        while not last:
            frame, payload_bytes = sockets.receive_frame(bulk.sock, bulk.scratch, deadline.at_s)
            step = _checked(frame, frame_id).read_response
            arrivals[step.index].receive(bulk, step.offset, payload_bytes, deadline)
            last = step.last
    damaged = _damaged(header, arrivals) if checked else []
    return [
        Status.OK if arrival.complete() and index not in damaged else Status.MISS
        for index, arrival in enumerate(arrivals)
    ], damaged


class _Arrival:
    """One shard on its way into its target; None: nobody wants it, and it is thrown away.

    `layers` cut the parts whose checksums are taken; 0: none are.
    """

    def __init__(self, target: Pieces | None, layers: int) -> None:
        self.target = target
        self.filled_bytes = 0
        self.passed = PartSums(target, layers) if target is not None and layers else None

    def complete(self) -> bool:
        return self.target is not None and self.filled_bytes == self.target.size_bytes

    def receive(
        self, bulk: BulkConnection, offset: int, payload_bytes: int, deadline: Deadline
    ) -> None:
        """Takes one payload in. Refused where it is not the next, or too long."""
        if self.target is None:
            sockets.receive_into(bulk.sock, bulk.scratch[:payload_bytes], deadline.at_s)
            return
        end = offset + payload_bytes
        if offset != self.filled_bytes or end > self.target.size_bytes:
            raise Refused(
                f"the node sent bytes {offset} to {end} of a shard of {self.target.size_bytes}, "
                f"of which {self.filled_bytes} are here; it does not follow the protocol"
            )
        for piece in self.target.slices(offset, end):
            sockets.receive_into(bulk.sock, piece.data, deadline.at_s)
        self.filled_bytes = end
        if self.passed is not None:
            self.passed.reach(end)


def _damaged(header: node_pb2.ReadResponse.Header, arrivals: Sequence[_Arrival]) -> list[int]:
    damaged: list[int] = []
    start = 0
    for index, arrival in enumerate(arrivals):
        if header.statuses[index] != Status.OK or not header.layers[index]:
            continue
        count = len(checksums.parts(header.size_bytes[index], header.layers[index]))
        expected = list(header.checksums[start : start + count])
        start += count
        if arrival.passed is not None and arrival.passed.sums != expected:
            damaged.append(index)
    return damaged


def _send_chunk(
    bulk: BulkConnection,
    frame_id: int,
    index: int,
    start: int,
    source: Pieces,
    deadline: Deadline,
) -> int:
    """Sends one payload; answers where it ends."""
    end = min(start + frames.MAX_PAYLOAD_BYTES, source.size_bytes)
    frame = wire_pb2.Frame(id=frame_id)
    frame.write_request.index = index
    frame.write_request.offset = start
    head = frames.pack(frame, end - start)
    for piece in source.slices(start, end):
        sockets.send(bulk.sock, head, piece.data, deadline.at_s)
        head = b""
    return end


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
