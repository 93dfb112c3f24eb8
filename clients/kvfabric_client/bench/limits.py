"""The limits: the same batch moved by nothing but a copy or a bare socket."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

import numpy as np

from kvfabric_client.bench.bare import BareSocket
from kvfabric_client.bench.children import Child
from kvfabric_client.bench.peer import PING_BYTES, Ring, faulted_memory, receive
from kvfabric_client.closing import Closing

PEER = "kvfabric_client.bench.peer"


class Limits(Closing):
    """A segment of shared memory and a bare peer process, `pool_bytes` each.

    Every method moves one batch between `buffers` and the other side and returns the
    seconds it took.
    """

    def __init__(self, pool_bytes: int) -> None:
        self._owned = contextlib.ExitStack()
        try:
            self._open(pool_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._owned.close()

    def copy_in(self, buffers: list[memoryview]) -> float:
        """Into shared memory: the limit of shm_put."""
        shared = [self._shared.take(len(buffer)) for buffer in buffers]
        return _copy(buffers, shared)

    def copy_out(self, buffers: list[memoryview]) -> float:
        """Out of shared memory: the limit of shm_get."""
        shared = [self._shared.take(len(buffer)) for buffer in buffers]
        return _copy(shared, buffers)

    def tcp_put(self, buffers: list[memoryview]) -> float:
        """To the peer: the limit of tcp_put."""
        return self._tcp.put(buffers)

    def tcp_get(self, buffers: list[memoryview]) -> float:
        """From the peer: the limit of tcp_get."""
        return self._tcp.get(buffers)

    def ping(self) -> float:
        """A small message over the unix socket, and its answer."""
        start = time.perf_counter()
        self._unix.sendall(self._ping)
        receive(self._unix, self._ping)
        return time.perf_counter() - start

    def _open(self, pool_bytes: int) -> None:
        folder = Path(self._owned.enter_context(tempfile.TemporaryDirectory()))
        path = str(folder / "peer.sock")
        peer = self._owned.enter_context(
            Child(PEER, "--pool-bytes", str(pool_bytes), "--unix", path)
        )
        self._tcp = BareSocket("127.0.0.1", int(str(peer.ready["port"])))
        self._owned.callback(self._tcp.close)
        self._unix = socket.socket(socket.AF_UNIX)
        self._owned.callback(self._unix.close)
        self._unix.connect(path)
        self._ping = memoryview(bytearray(PING_BYTES))
        fileno = os.memfd_create("kvfabric-bench", os.MFD_CLOEXEC)
        self._owned.callback(os.close, fileno)
        os.ftruncate(fileno, pool_bytes)
        self._shared = Ring(memoryview(faulted_memory(pool_bytes, fileno)))


def _copy(sources: list[memoryview], targets: list[memoryview]) -> float:
    pairs = [
        (np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8))
        for source, target in zip(sources, targets, strict=True)
    ]
    start = time.perf_counter()
    for source, target in pairs:
        np.copyto(target, source)
    return time.perf_counter() - start
