"""The calling end of one connection, used by one thread at a time.

An answer that comes after its caller gave up is recognised by its id and thrown away,
so a late answer does not cost the connection, nor the session that it carries.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Protocol, cast

from google.protobuf.message import Message

from kvfabric.errors import FabricError, Refused, Unreachable, from_proto
from kvfabric.rpc.v1 import wire_pb2
from kvfabric.wire import frames, sockets

MAX_DESCRIPTORS = 64  # per message


class _Body(Protocol):
    def CopyFrom(self, other: Message) -> None: ...  # noqa: N802


class Connection:
    """Request, answer, request, answer. `kind` is "unix" or "tcp"."""

    def __init__(self, address: str, deadline_s: float) -> None:
        self.address = address
        self.kind = address.partition(":")[0]
        self.retired: list[int] = []  # segments that the node wants back
        self._sock = sockets.connect(address, deadline_s)
        self._inbox = frames.Inbox()
        self._arrived: deque[wire_pb2.Frame] = deque()
        self._next_id = 1
        self.closed = False

    def call(self, name: str, request: Message, deadline_s: float) -> wire_pb2.Frame:
        """Sends `request` as the body `<name>_request`; answers the frame with its response.

        Raises the error that the peer answered, DeadlineExceeded or Unreachable.
        """
        frame_id = self._send(name, request, deadline_s)
        while True:
            while self._arrived:
                frame = self._arrived.popleft()
                if frame.id == frame_id or not frame.id:
                    return self._checked(frame)
            self._read(sockets.receive_some(self._sock, deadline_s))

    def call_for_descriptors(
        self, name: str, request: Message, deadline_s: float
    ) -> tuple[wire_pb2.Frame, list[int]]:
        """The same for an answer that brings file descriptors, which become the caller's."""
        frame_id = self._send(name, request, deadline_s)
        descriptors: list[int] = []
        while True:
            data, some, _, _ = socket.recv_fds(self._sock, 1 << 18, MAX_DESCRIPTORS)
            descriptors += some
            if not data:
                self.close()
                raise Unreachable("the peer closed the connection")
            self._read(data)
            while self._arrived:
                frame = self._arrived.popleft()
                if frame.id == frame_id:
                    return self._checked(frame), descriptors

    def tell(self, name: str, request: Message, deadline_s: float) -> None:
        """Sends a request that wants no answer."""
        self._send(name, request, deadline_s, answered=False)

    def alive(self) -> bool:
        """Whether the peer has kept the connection: false at once after it died."""
        return not self.closed and not sockets.at_end(self._sock)

    def close(self) -> None:
        self.closed = True
        self._sock.close()

    def _send(
        self, name: str, request: Message, deadline_s: float, *, answered: bool = True
    ) -> int:
        frame = wire_pb2.Frame(id=self._next_id if answered else 0)
        self._next_id += 1
        cast(_Body, getattr(frame, f"{name}_request")).CopyFrom(request)
        head = frames.pack(frame)
        try:
            sockets.send_all(self._sock, memoryview(head), deadline_s)
        except FabricError:
            self.close()  # half a frame may be out
            raise
        return frame.id

    def _read(self, data: bytes) -> None:
        try:
            for frame in self._inbox.feed(data):
                self.retired.extend(frame.retired_segments)
                self._arrived.append(frame)
        except Refused:
            self.close()
            raise

    def _checked(self, frame: wire_pb2.Frame) -> wire_pb2.Frame:
        if frame.WhichOneof("body") == "error":
            raise from_proto(frame.error)
        return frame
