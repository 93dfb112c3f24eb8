"""Sessions of this process that have ended, and whether anything of theirs is still mapped.

A node that was killed and started again does not grant the memory that earlier clients map
before these say that they have let go of it. A session has, once all views of its segments
are gone: then the memory is not even mapped any more.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterable

MAX_SESSIONS = 256  # remembered, per address: of older ones the node learns by our end

Mapping = weakref.ref[mmap.mmap]


class EndedSessions:
    """By the address of their node, until its next start has been told. Thread-safe."""

    def __init__(self) -> None:
        self.any = False
        self._lock = threading.Lock()
        self._sessions: dict[str, dict[bytes, list[Mapping]]] = {}

    def add(self, address: str, session: bytes, mappings: Iterable[Mapping]) -> None:
        with self._lock:
            sessions = self._sessions.setdefault(address, {})
            sessions[session] = list(mappings)
            while len(sessions) > MAX_SESSIONS:
                del sessions[next(iter(sessions))]
            self.any = True

    def take(self, address: str) -> list[bytes]:
        """Those of which nothing is mapped any more; the caller tells their node of them."""
        with self._lock:
            sessions = self._sessions.get(address, {})
            ended = [s for s, maps in sessions.items() if all(m() is None for m in maps)]
            for session in ended:
                del sessions[session]
            if not sessions:
                self._sessions.pop(address, None)
            self.any = bool(self._sessions)
            return ended


ended_sessions = EndedSessions()
"""Of this process, for all its clients."""
