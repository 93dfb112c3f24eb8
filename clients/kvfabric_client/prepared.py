"""A connection on which queries that a node has prepared are asked again: fixed records, no
messages.

What a call costs here is little beside its kernel, as long as little is done: one send, one
receive, no setting of the socket's time limit where the last one still serves, and before the
answer comes all that can be done before.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvfabric.errors import Broken, DeadlineExceeded, Unreachable
from kvfabric.wire.connection import Connection

_REQUEST: Final = struct.Struct("<qqII")  # number, visible, layer, bytes of vectors
_ANSWER: Final = struct.Struct("<IIqqq")  # verdict, bytes, tokens, bytes of KV, nanoseconds
REQUEST_BYTES: Final = _REQUEST.size
BUSY: Final = 1  # another was computed
GONE: Final = 2  # it is to be prepared anew
MAX_VECTOR_BYTES: Final = 512 << 10  # of a record, and of a message
_TIMEVAL: Final = struct.Struct("ll")
_LEAST_LIMIT_S: Final = 0.001


class Computed(NamedTuple):
    """`numbers`: o [rows, query heads, value dim], then lse [rows, query heads]."""

    numbers: NDArray[np.float32]
    tokens: int
    read_bytes: int
    kernel_s: float


class PreparedConnection:
    """Answers come in the order of the requests. After an error it is of no more use."""

    def __init__(self, connection: Connection) -> None:
        self._address = connection.address
        self._sock = connection.detach()
        self._out = bytearray(_REQUEST.size + MAX_VECTOR_BYTES)
        self._view = memoryview(self._out)
        self._expected: deque[int] = deque()  # numbers in each answer that is to come
        self._limit_s = 0.0
        self.moved_bytes = 0  # both ways
        self.usable = True

    def close(self) -> None:
        self.usable = False
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def begin(
        self,
        number: int,
        layer: int,
        visible: int,
        vectors: bytes | memoryview,
        answers: int,
        deadline_s: float,
    ) -> None:
        """`vectors`: as bytes. `answers`: how many numbers come back."""
        end = _REQUEST.size + len(vectors)
        _REQUEST.pack_into(self._out, 0, number, visible, layer, len(vectors))
        self._out[_REQUEST.size : end] = vectors
        at = 0
        while at < end:
            self._keep_limit(deadline_s)
            try:
                at += self._sock.send(self._view[at:end])
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._failed(error) from error
        self.moved_bytes += end
        self._expected.append(answers)

    def finish(self, deadline_s: float) -> Computed | int:
        """The answer to the first `begin` that has none yet, or BUSY or GONE: then nothing was
        computed, and an Attend is the way. DeadlineExceeded, Unreachable."""
        answers = self._expected.popleft()
        data = np.empty(_ANSWER.size // 4 + answers, np.float32)
        numbers, view = data[_ANSWER.size // 4 :], data.data.cast("B")
        first = view[: _ANSWER.size] if self._expected else view  # what follows is another's
        got = self._receive(first, _ANSWER.size, deadline_s)
        verdict, size_bytes, tokens, read_bytes, kernel_ns = _ANSWER.unpack_from(view)
        self.moved_bytes += _ANSWER.size + size_bytes
        if verdict:
            return int(verdict)
        if size_bytes != 4 * answers:
            self.close()
            raise Broken(
                f"{self._address} answered {size_bytes} bytes, not {4 * answers}; client and node "
                "do not follow the same specification: bring the older one up to date"
            )
        if got < len(view):
            self._receive(view[got:], len(view) - got, deadline_s)
        return Computed(numbers, tokens, read_bytes, kernel_ns / 1e9)

    def _receive(self, place: memoryview, least: int, deadline_s: float) -> int:
        """At least so many bytes of an answer; how many came."""
        at = 0
        while at < least:
            self._keep_limit(deadline_s)
            try:
                count = self._sock.recv_into(place[at:])
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._failed(error) from error
            if not count:
                raise self._failed(OSError("the peer closed the connection"))
            at += count
        return at

    def _keep_limit(self, deadline_s: float) -> None:
        """The socket waits for half of what is left, or less, each time: so what it was told serves
        for the next calls too."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            self.close()
            raise DeadlineExceeded("the peer did not answer in time")
        if not self._limit_s <= left_s <= 4 * self._limit_s:
            self._limit_s = max(left_s / 2, _LEAST_LIMIT_S)
            limit = _TIMEVAL.pack(*divmod(int(self._limit_s * 1e6), 10**6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._sock.setsockopt(socket.SOL_SOCKET, option, limit)

    def _failed(self, error: OSError) -> Unreachable:
        self.close()
        return Unreachable(f"the connection to {self._address} failed: {error}")
