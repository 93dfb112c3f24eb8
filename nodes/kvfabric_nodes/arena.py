"""The bytes of the dram tier: one sealed memfd per segment, mapped here and by clients.

Segments are pre-faulted in the background, a few MiB at a time, while the node already
serves; `ready_bytes` tells how far that is. A segment that changes its tenant is
never wiped in place: whoever still maps the old one would see the new owner's bytes.
It gets a new memfd, which the kernel hands out zeroed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterable

import structlog

from kvfabric.memory import populate

log = structlog.get_logger(__name__)

PREFAULT_STEP_BYTES = 4 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # nobody can cut memory away under us


class Memory:
    """One segment's memory."""

    def __init__(self, segment: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create(f"kvfabric-{segment}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self.fd, size_bytes)
        self.view = memoryview(self._map)
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

    def __init__(self, segments: Iterable[int], segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self._memory = {segment: Memory(segment, segment_bytes) for segment in segments}
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

    def descriptor(self, segment: int) -> int:
        """The memfd; it stays the arena's."""
        return self._memory[segment].fd

    def replace(self, old: int, new: int) -> None:
        """Fresh zeroed memory for a segment whose old bytes nobody maps any more."""
        self._memory.pop(old).close()
        self._memory[new] = Memory(new, self.segment_bytes)
        self._work.set()

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
