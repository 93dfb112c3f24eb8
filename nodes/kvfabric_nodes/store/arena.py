"""The bytes of the dram tier: one sealed memfd per segment, mapped here and by clients.

Segments are pre-faulted in the background, a few MiB at a time, while the node already
serves; `ready_bytes` tells how far that is. A segment that changes its tenant is
never wiped in place: whoever still maps the old one would see the new owner's bytes.
It gets a new memfd, which the kernel hands out zeroed.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

import structlog

from kvfabric.memory import populate

log = structlog.get_logger(__name__)

PREFAULT_STEP_BYTES = 4 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # nobody can cut memory away under us


def _new(segment: int, size_bytes: int) -> int:
    fd = os.memfd_create(f"kvfabric-{segment}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def is_sealed(fd: int, size_bytes: int) -> bool:
    """Whether this is memory as we make it: of this size, which nobody can change."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return seals & _SEALS == _SEALS and os.fstat(fd).st_size == size_bytes


class Memory:
    """One segment's memory."""

    def __init__(self, segment: int, size_bytes: int, fd: int | None = None) -> None:
        """`fd`: of memory that is there already, with its bytes; it becomes this object's."""
        self.size_bytes = size_bytes
        self.fd = _new(segment, size_bytes) if fd is None else fd
        self._map = mmap.mmap(self.fd, size_bytes)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._map))
        self.ready_bytes = 0

    def prefault(self) -> bool:
        """Faults the next few MiB in; False when all are. Keeps what is written there."""
        size_bytes = min(PREFAULT_STEP_BYTES, self.size_bytes - self.ready_bytes)
        if size_bytes <= 0:
            return False
        # ctypes releases the GIL for the call, Python's own madvise does not.
        try:
            populate(self._map, self.ready_bytes, size_bytes, write=True)
        except ValueError:  # closed meanwhile: the segment was replaced
            return False
        except OSError as error:
            log.warning("prefault_failed", why=str(error), effect="first writes will be slower")
            self.ready_bytes = self.size_bytes
            return False
        self.ready_bytes += size_bytes
        return True

    def close(self) -> None:
        """Unmaps, unless a transfer still reads; then the last reader's end unmaps it."""
        os.close(self.fd)
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            log.debug("segment_unmapped_later")


class Arena:
    """Memory of every segment by id. The map changes on the core's thread only."""

    def __init__(
        self,
        segments: Iterable[int],
        segment_bytes: int,
        kept: Mapping[int, Memory] | None = None,
    ) -> None:
        """`kept`: memory of an earlier start. Of a segment that is not among `segments` it is
        closed.
        """
        kept = kept or {}
        self.segment_bytes = segment_bytes
        self.on_replaced: Callable[[int, int], None] | None = None
        self._memory = {
            segment: kept.get(segment) or Memory(segment, segment_bytes) for segment in segments
        }
        for segment, memory in kept.items():
            if segment not in self._memory:
                memory.close()
        self._work = threading.Event()
        self._stopping = False
        self._prefaulter = threading.Thread(
            target=self._prefault_all, name="kvfabric-prefault", daemon=True
        )
        self._work.set()
        self._prefaulter.start()

    @property
    def ready_bytes(self) -> int:
        return sum(memory.ready_bytes for memory in list(self._memory.values()))

    def view(self, segment: int, offset: int, size_bytes: int) -> memoryview:
        return self._memory[segment].view[offset : offset + size_bytes]

    def address(self, segment: int) -> int:
        """Where its bytes begin in this process, for kernels."""
        return self._memory[segment].address

    def __iter__(self) -> Iterator[int]:
        """Every segment that has memory, the retired ones included."""
        return iter(list(self._memory))

    def descriptor(self, segment: int) -> int:
        """The memfd; it stays the arena's."""
        return self._memory[segment].fd

    def replace(self, old: int, new: int) -> None:
        """Fresh zeroed memory for a segment whose old bytes nobody maps any more."""
        self._memory.pop(old).close()
        self._memory[new] = Memory(new, self.segment_bytes)
        self._work.set()
        if self.on_replaced is not None:
            self.on_replaced(old, new)

    def close(self) -> None:
        self._stopping = True
        self._work.set()
        self._prefaulter.join()
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()

    def _prefault_all(self) -> None:
        while not self._stopping:
            self._work.wait()
            self._work.clear()
            for memory in list(self._memory.values()):
                while not self._stopping and memory.prefault():
                    pass
