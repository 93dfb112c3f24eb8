"""When which promise ends: a heap that forgets what was settled before its time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kvfabric_nodes.store.promises import Lease, Reservation
from kvfabric_nodes.store.shards import Shard

Promise = Reservation | Lease | Shard

SWEEP_ENTRIES = 1024  # below this many, settled ones may wait for their time


class Deadlines:
    """Entries of settled promises are swept once they may be half of all."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Promise]] = []
        self._pushed = 0
        self._sweep_at = SWEEP_ENTRIES

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, at_s: float, promise: Promise) -> None:
        """Another one for the same promise is another chance to look, and does no harm."""
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if _living(entry[2])]
            heapq.heapify(self._heap)
            self._sweep_at = max(SWEEP_ENTRIES, 2 * len(self._heap))
        self._pushed += 1
        heapq.heappush(self._heap, (at_s, self._pushed, promise))

    def due(self, now_s: float) -> Iterator[tuple[float, Promise]]:
        """Takes out what has ended by now, with the time that was set for it."""
        while self._heap and self._heap[0][0] <= now_s:
            at_s, _, promise = heapq.heappop(self._heap)
            if _living(promise):
                yield at_s, promise


def _living(promise: Promise) -> bool:
    if isinstance(promise, Reservation):
        return promise.id in promise.session.reservations
    if isinstance(promise, Lease):
        return promise.id in promise.session.leases
    return promise.present
