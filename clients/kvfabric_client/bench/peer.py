"""The other end of the bare sockets: a process with nothing but memory and two listeners.

It is started with `python -m kvfabric_client.bench.peer --pool-bytes N --unix PATH`,
prints one JSON line with the port it listens on, and ends when its input does. On TCP
it serves one request after another (`REQUEST`): bytes in, answered by `ACK`, or bytes
out, or a message that is answered by another. On the unix socket it answers every
`PING_BYTES` with as many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Final

REQUEST: Final = struct.Struct("<cIQ")  # PUT or GET, shards, bytes of one; CALL: bytes both ways
PUT: Final = b"P"
GET: Final = b"G"
CALL: Final = b"C"
ACK: Final = b"A"
PING_BYTES: Final = 64
POPULATE_WRITE: Final = 23  # madvise: fault every page in, for writing


def faulted_memory(size_bytes: int, fileno: int = -1) -> mmap.mmap:
    """`size_bytes` of memory whose pages are all there: of a file, or private."""
    flags = mmap.MAP_SHARED if fileno >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(fileno, size_bytes, flags)
    memory.madvise(POPULATE_WRITE)
    return memory


class Ring:
    """Slices of memory in turn, so that nobody reads or writes what is still in a cache."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._next = 0

    def take(self, size_bytes: int) -> memoryview:
        """The next `size_bytes`; starts again where they do not fit any more."""
        if self._next + size_bytes > len(self._memory):
            self._next = 0
        start, self._next = self._next, self._next + size_bytes
        return self._memory[start : self._next]


def receive(connection: socket.socket, target: memoryview) -> None:
    """Fills `target`; ConnectionError where the other end stopped before."""
    filled = 0
    while filled < len(target):
        count = connection.recv_into(target[filled:])
        if not count:
            raise ConnectionError("the other end of the bare socket is gone")
        filled += count


def serve_tcp(connection: socket.socket, ring: Ring) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = bytearray(REQUEST.size)
    while True:
        receive(connection, memoryview(request))
        kind, shards, size_bytes = REQUEST.unpack(request)
        if kind == CALL:
            receive(connection, ring.take(shards))
            connection.sendall(ring.take(size_bytes))
            continue
        for _ in range(shards):
            if kind == PUT:
                receive(connection, ring.take(size_bytes))
            else:
                connection.sendall(ring.take(size_bytes))
        if kind == PUT:
            connection.sendall(ACK)


def serve_unix(connection: socket.socket) -> None:
    ping = memoryview(bytearray(PING_BYTES))
    while True:
        receive(connection, ping)
        connection.sendall(ping)


def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            serve(connection)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--pool-bytes", type=int, required=True)
    options.add_argument("--unix", required=True)
    options.add_argument("--host", default="127.0.0.1")
    chosen = options.parse_args()
    ring = Ring(memoryview(faulted_memory(chosen.pool_bytes)))
    tcp = socket.create_server((chosen.host, 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(chosen.unix)
    unix.listen()
    for listener, serve in ((tcp, lambda one: serve_tcp(one, ring)), (unix, serve_unix)):
        threading.Thread(target=_accept, args=(listener, serve), daemon=True).start()
    sys.stdout.write(json.dumps({"port": tcp.getsockname()[1]}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
