"""The calling end of one connection, used by one thread at a time.

An answer that comes after its caller gave up is recognised by its id and thrown away,
so a late answer does not cost the connection, nor the session that it carries. What it
grants must still be given back: see `late`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from typing import Protocol, cast

from google.protobuf.message import Message

from kvfabric.errors import FabricError, Refused, Unreachable, from_proto
from kvfabric.rpc.v1 import wire_pb2
from kvfabric.wire import frames, sockets

MAX_DESCRIPTORS = 64  # per message
MAX_RELEASED = 1024  # leases, per request


class _Body(Protocol):
    def CopyFrom(self, other: Message) -> None: ...  # noqa: N802


class Connection:
    """Request, answer, request, answer."""

    def __init__(self, address: str, deadline_s: float, released: deque[int] | None = None) -> None:
        """`released`: leases to be given back with the next request, whichever it is."""
        self.address = address
        self.retired: set[int] = set()  # segments that the node wants back
        self.late: list[wire_pb2.Frame] = []  # answers that came after their callers gave up
        self._sock = sockets.connect(address, deadline_s)
        self._at_end = sockets.end_of(self._sock)
        self._released = deque() if released is None else released
        self._inbox = frames.Inbox()
        self._awaited: set[int] = set()
        self._arrived: dict[int, wire_pb2.Frame] = {}
        self._next_id = 1
        self.moved_bytes = 0  # both ways
        self.closed = False

    def call(self, name: str, request: Message, deadline_s: float) -> wire_pb2.Frame:
        """Sends `request` as the body `<name>_request`; answers the frame with its response.

        Raises the error that the peer answered, DeadlineExceeded or Unreachable.
        """
        return self.finish(self.begin(name, request, deadline_s), deadline_s)

    def begin(self, name: str, request: Message, deadline_s: float) -> int:
        """Sends a request whose answer `finish` fetches; other calls may come between."""
        return self._send(name, request, deadline_s, answered=True)

    def finish(self, frame_id: int, deadline_s: float) -> wire_pb2.Frame:
        """The answer to one `begin`."""
        return self._await(frame_id, deadline_s)

    def has_arrived(self, frame_id: int) -> bool:
        """Whether `finish` would not have to wait: it came with an earlier answer."""
        return frame_id in self._arrived

    def fileno(self) -> int:
        """Readable when an answer, or a part of it, has come that is not taken in yet."""
        return self._sock.fileno()

    def forget(self, frame_id: int) -> None:
        """Nobody will fetch this answer."""
        self._awaited.discard(frame_id)
        arrived = self._arrived.pop(frame_id, None)
        if arrived is not None:
            self.late.append(arrived)

    def call_for_descriptors(
        self, name: str, request: Message, deadline_s: float
    ) -> tuple[wire_pb2.Frame, list[int]]:
        """A call whose answer brings file descriptors, which become the caller's.

        Where it fails the connection is closed, for the descriptors may still come.
        """
        descriptors: list[int] = []
        try:
            frame_id = self.begin(name, request, deadline_s)
            return self._await(frame_id, deadline_s, descriptors), descriptors
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            self.close()
            raise

    def tell(self, name: str, request: Message, deadline_s: float) -> None:
        """Sends a request that wants no answer."""
        self._send(name, request, deadline_s, answered=False)

    def alive(self) -> bool:
        """Whether the peer has kept the connection: false at once after it died."""
        return not self.closed and not self._at_end()

    def close(self) -> None:
        self.closed = True
        self._sock.close()

    def interrupt(self) -> None:
        """For another thread: a call that is under way ends at once with Unreachable."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def detach(self) -> socket.socket:
        """Gives the socket away: to a bulk transfer, right after its hello."""
        self.closed = True
        return self._sock

    def _await(
        self, frame_id: int, deadline_s: float, descriptors: list[int] | None = None
    ) -> wire_pb2.Frame:
        """`descriptors`: where those that come meanwhile go; None: none are awaited."""
        try:
            while not self._arrived.keys() & {frame_id, 0}:
                self._receive(descriptors, deadline_s)
        except BaseException:  # an interrupted caller gives up, too
            self.forget(frame_id)
            raise
        # An error with id 0 is about the connection: the peer could not parse a request.
        frame = self._arrived.pop(frame_id, None) or self._arrived.pop(0)
        self._awaited.discard(frame_id)
        if frame.WhichOneof("body") == "error":
            raise from_proto(frame.error)
        return frame

    def _receive(self, descriptors: list[int] | None, deadline_s: float) -> None:
        """Takes in what has arrived."""
        try:
            if descriptors is None:
                data = sockets.receive_some(self._sock, deadline_s)
            else:
                data, more = sockets.receive_with_descriptors(
                    self._sock, MAX_DESCRIPTORS, deadline_s
                )
                descriptors += more
            self.moved_bytes += len(data)
            for frame in self._inbox.feed(data):
                self.retired.update(frame.retired_segments)
                if frame.id in self._awaited or not frame.id:
                    self._arrived[frame.id] = frame
                else:
                    self.late.append(frame)
        except (Unreachable, Refused):
            self.close()
            raise

    def _send(self, name: str, request: Message, deadline_s: float, *, answered: bool) -> int:
        frame = wire_pb2.Frame(id=self._next_id if answered else 0)
        self._next_id += 1
        cast(_Body, getattr(frame, f"{name}_request")).CopyFrom(request)
        if self._released and name != "hello":  # only a session that is there takes leases back
            with contextlib.suppress(IndexError):
                while len(frame.released_leases) < MAX_RELEASED:
                    frame.released_leases.append(self._released.popleft())
        try:
            head = frames.pack(frame)
            if answered:
                self._awaited.add(frame.id)
            self._send_all(head, deadline_s)
        except FabricError:
            self._released.extend(frame.released_leases)
            raise
        return frame.id

    def _send_all(self, head: bytes, deadline_s: float) -> None:
        try:
            sockets.send_all(self._sock, memoryview(head), deadline_s)
            self.moved_bytes += len(head)
        except FabricError:
            self.close()  # half a frame may be out
            raise
