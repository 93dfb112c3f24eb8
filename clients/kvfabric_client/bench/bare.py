"""A bare TCP connection to the peer: what the network does with nothing on top of it."""

from __future__ import annotations

import socket
import time

from kvfabric_client.bench.peer import ACK, CALL, GET, PUT, REQUEST, receive


class BareSocket:
    """Every method returns the seconds that it took."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._socket.close()

    def put(self, buffers: list[memoryview]) -> float:
        """To the peer, which answers once it has all."""
        answer = memoryview(bytearray(len(ACK)))
        start = time.perf_counter()
        self._socket.sendall(REQUEST.pack(PUT, len(buffers), len(buffers[0])))
        for buffer in buffers:
            self._socket.sendall(buffer)
        receive(self._socket, answer)
        return time.perf_counter() - start

    def get(self, buffers: list[memoryview]) -> float:
        """From the peer, on request."""
        start = time.perf_counter()
        self._socket.sendall(REQUEST.pack(GET, len(buffers), len(buffers[0])))
        for buffer in buffers:
            receive(self._socket, buffer)
        return time.perf_counter() - start

    def call(self, message: bytes, answer: memoryview) -> float:
        """One round trip with messages of these sizes."""
        start = time.perf_counter()
        self._socket.sendall(REQUEST.pack(CALL, len(message), len(answer)) + message)
        receive(self._socket, answer)
        return time.perf_counter() - start
