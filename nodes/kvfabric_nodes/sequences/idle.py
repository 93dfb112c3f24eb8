"""When to look whether a sequence has been idle for too long.

A use of a sequence only sets its deadline; the entry here is put right when its time comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from kvfabric_nodes.sequences.sequence import OpenSequence

SWEEP_ENTRIES = 1024  # so many of sequences that have ended may wait for their time


class Idle:
    """See the module. `living`: all open sequences by their numbers, as they are at any time."""

    def __init__(self, living: Mapping[int, OpenSequence]) -> None:
        self._living = living
        self._heap: list[tuple[float, int]] = []
        self._most = 0  # entries, as many as there may be until the next sweep

    def watch(self, sequence: OpenSequence) -> None:
        """Looks at its deadline as it is now."""
        self._most = 2 * len(self._living) + SWEEP_ENTRIES + 1
        if len(self._heap) >= self._most:
            self._heap = [entry for entry in self._heap if self._stands(*entry)]
            heapq.heapify(self._heap)
        sequence.watched_s = sequence.deadline_s
        heapq.heappush(self._heap, (sequence.watched_s, sequence.id))

    def due(self, now_s: float) -> Iterator[OpenSequence]:
        """Those whose deadline has passed."""
        while self._heap and self._heap[0][0] <= now_s:
            entry = heapq.heappop(self._heap)
            if not self._stands(*entry):
                continue
            sequence = self._living[entry[1]]
            if sequence.deadline_s > now_s:
                self.watch(sequence)
            else:
                yield sequence

    def _stands(self, at_s: float, sequence_id: int) -> bool:
        """Whether this is still the entry of a sequence that is open."""
        sequence = self._living.get(sequence_id)
        return sequence is not None and sequence.watched_s == at_s

    def check(self) -> None:
        """Asserts that every open sequence is looked at in time, and nothing piles up."""
        entries = set(self._heap)
        for sequence_id, sequence in self._living.items():
            assert sequence.watched_s <= sequence.deadline_s
            assert (sequence.watched_s, sequence_id) in entries
        assert len(self._heap) <= self._most
