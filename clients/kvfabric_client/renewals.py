"""Keeps alive at nodes what the program still holds: one thread per client, started on demand.

Bounded: what was collected as garbage, closed, or not used by the program for an hour is no
longer renewed, and ends at its node by its own deadline.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvfabric.errors import FabricError
from kvfabric.logs import guest_logger

log = guest_logger(__name__)

MAX_UNUSED_S = 3600.0
MAX_RENEWED = 65536
MIN_INTERVAL_S = 0.05


class Renewed(Protocol):
    """What has a deadline at a node."""

    used_s: float
    """When the program used it last, on the monotonic clock."""

    def renew(self) -> bool:
        """Puts the deadline off; False: it has ended."""


@dataclass(slots=True)
class _Entry:
    what: weakref.ref[Renewed]
    interval_s: float
    due_s: float


class Renewals:
    """See the module. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._changed = threading.Condition()
        self._entries: list[_Entry] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, what: Renewed, interval_s: float) -> None:
        """Renews it every `interval_s` from now on."""
        with self._changed:
            if self._closed or len(self._entries) >= MAX_RENEWED:
                return
            interval_s = max(interval_s, MIN_INTERVAL_S)
            entry = _Entry(weakref.ref(what), interval_s, self._now() + interval_s)
            self._entries.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="kvfabric-renew", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def renew_due(self) -> float | None:
        """Renews what is due; answers when the next will be, None: there is nothing left."""
        now_s = self._now()
        with self._changed:
            due = [entry for entry in self._entries if entry.due_s <= now_s]
        for entry in due:
            if _renew(entry, now_s):
                entry.due_s = now_s + entry.interval_s
            else:
                with self._changed:  # it may be gone already: closed meanwhile
                    self._entries = [each for each in self._entries if each is not entry]
        with self._changed:
            return min((entry.due_s for entry in self._entries), default=None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._entries.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            next_s = self.renew_due()
            with self._changed:
                if self._closed:
                    return
                soonest_s = min((e.due_s for e in self._entries), default=None)
                if next_s is None or soonest_s is None:
                    self._changed.wait_for(lambda: self._entries or self._closed)
                else:
                    self._changed.wait(max(0.0, min(next_s, soonest_s) - self._now()))


def _renew(entry: _Entry, now_s: float) -> bool:
    what = entry.what()
    if what is None or now_s - what.used_s > MAX_UNUSED_S:
        return False
    try:
        return what.renew()
    except FabricError as error:
        log.debug("not_renewed", why=str(error), effect="tried again")
        return True
