"""The limit of kernels: plainly reading as many bytes, out of memory that no cache holds."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from kvfabric_client.bench.peer import Ring, faulted_memory

THREADS: Final = 2
PIECE_BYTES: Final = 32 << 20


class Reader:
    """Memory of the kind that a node has, `pool_bytes` of it, read round and round."""

    def __init__(self, pool_bytes: int) -> None:
        self._owned = contextlib.ExitStack()
        fileno = os.memfd_create("kvfabric-bench", os.MFD_CLOEXEC)
        self._owned.callback(os.close, fileno)
        os.ftruncate(fileno, pool_bytes)
        self._ring = Ring(memoryview(faulted_memory(pool_bytes, fileno)))
        self._threads = self._owned.enter_context(ThreadPoolExecutor(THREADS))

    def close(self) -> None:
        self._owned.close()

    def read(self, size_bytes: int) -> float:
        """Bytes per second over at least so many."""
        pieces = -(-size_bytes // PIECE_BYTES)
        start = time.perf_counter()
        list(self._threads.map(_read, [self._ring.take(PIECE_BYTES) for _ in range(pieces)]))
        return pieces * PIECE_BYTES / (time.perf_counter() - start)


def _read(memory: memoryview) -> int:
    """An operation that needs every byte and does as little as can be with it."""
    return int(np.bitwise_or.reduce(np.frombuffer(memory, np.int64)))
