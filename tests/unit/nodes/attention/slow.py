"""A kernel that waits for the test before it reads, so that things happen meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvfabric.attention.merge import Partial
from kvfabric_nodes import node as node_module
from kvfabric_nodes.attention.kernels import Kernel, Work
from kvfabric_nodes.attention.kernels.choice import Kernels
from kvfabric_nodes.attention.kernels.reference import ReferenceKernel

TIMEOUT_S = 20.0


class Gate(ReferenceKernel):
    """The reference behind a gate, which is open until a test closes it."""

    name = "gate"

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.error: Exception | None = None
        self.most_rows = 1024
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Semaphore(0)

    def attend(self, work: Work) -> Partial:
        self.works.append(work)
        self._reached.release()
        assert self._open.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        if work.rows > self.most_rows:
            raise MemoryError("no scratch for so many rows")
        return super().attend(work)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._reached = threading.Semaphore(0)
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def reached(self) -> None:
        """Waits until a kernel call stands before the gate."""
        assert self._reached.acquire(timeout=TIMEOUT_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """The one kernel of nodes that are started after this."""
    made = Gate()
    kernel: Kernel = made
    monkeypatch.setattr(node_module, "cpu_kernels", lambda threads: Kernels([], kernel))
    return made
