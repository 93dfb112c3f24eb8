"""The batches of all moves: which wait, which are under way, and which keys are in one."""

from __future__ import annotations

from collections.abc import Sequence

from kvfabric.errors import Broken
from kvfabric.moves.migration import Batch, Move, MoveState
from kvfabric.types import Key, NamespaceId, NodeId

_WAITING, _COPYING, _DROPPING = range(3)


class Batches:
    """Books only. A key is in one batch at most."""

    def __init__(self) -> None:
        self._all: dict[int, Batch] = {}
        self._of: dict[int, set[int]] = {}  # by move
        self._phases: dict[int, list[int]] = {}  # by move: waiting, copied, dropped
        self._waiting: dict[NodeId, set[int]] = {}  # by source
        self._near: dict[NodeId, set[int]] = {}  # under way, by both nodes
        self._keys: set[tuple[NamespaceId, Key]] = set()
        self._lingering: dict[tuple[NamespaceId, Key], float] = {}  # until when

    def __contains__(self, batch: Batch) -> bool:
        return batch.number in self._all

    def busy(self, namespace: NamespaceId, key: Key) -> bool:
        """Whether no new batch may have the key: another one has it, or did a moment ago."""
        return (namespace, key) in self._keys or (namespace, key) in self._lingering

    def linger(self, batch: Batch, until_s: float) -> None:
        """Nobody else may have the batch's keys before then, whatever becomes of the batch."""
        for key in batch.keys:
            self._lingering[batch.namespace, key] = until_s

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        for subject in [each for each, end_s in self._lingering.items() if end_s <= now_s]:
            del self._lingering[subject]

    def wait(self, batch: Batch) -> None:
        """A new batch, whose keys are in no other, waits for its turn."""
        self._enter(batch)
        self._waiting.setdefault(batch.source, set()).add(batch.number)
        self._phases[batch.move.number][_WAITING] += 1

    def begin(self, batch: Batch, now_s: float) -> None:
        """A waiting batch, or a new one, is under way. Its nodes stay what they are now."""
        if batch.number in self._all:
            self._stop_waiting(batch)
            self._phases[batch.move.number][_WAITING] -= 1
        else:
            self._enter(batch)
        self._phases[batch.move.number][_COPYING] += 1
        batch.begun_s = batch.due_s = now_s
        for node in (batch.source, batch.destination):
            if node is not None:
                self._near.setdefault(node, set()).add(batch.number)

    def drop(self, batch: Batch) -> None:
        """The batch's source is to drop its own now."""
        batch.to(MoveState.DROPPING)
        self._phases[batch.move.number][_COPYING] -= 1
        self._phases[batch.move.number][_DROPPING] += 1

    def release(self, batch: Batch, keys: Sequence[Key]) -> None:
        """These of its keys are in no batch any more."""
        gone = set(keys)
        batch.keys = [key for key in batch.keys if key not in gone]
        self._keys.difference_update((batch.namespace, key) for key in keys)

    def end(self, batch: Batch, state: MoveState) -> None:
        """The batch is over, and its keys are free."""
        self._phases[batch.move.number][_phase(batch)] -= 1
        batch.to(state)
        self.release(batch, batch.keys)
        del self._all[batch.number]
        self._of[batch.move.number].discard(batch.number)
        if not self._of[batch.move.number]:
            del self._of[batch.move.number], self._phases[batch.move.number]
        if batch.begun_s is None:
            self._stop_waiting(batch)
        for node in {batch.source, batch.destination} & self._near.keys():
            assert node is not None
            self._near[node].discard(batch.number)
            if not self._near[node]:
                del self._near[node]

    def of(self, move: Move) -> list[Batch]:
        return [self._all[number] for number in sorted(self._of.get(move.number, ()))]

    def phases(self, move: Move) -> tuple[int, int, int]:
        """How many of its batches wait, are copied, and are dropped at their source."""
        waiting, copying, dropping = self._phases.get(move.number, (0, 0, 0))
        return waiting, copying, dropping

    def waiting_at(self, source: NodeId) -> list[Batch]:
        """Those that wait for their turn, the most urgent first."""
        found = [self._all[number] for number in self._waiting.get(source, ())]
        return sorted(found, key=lambda each: (each.move.priority, each.number))

    def sources(self) -> list[NodeId]:
        """From where batches wait to be copied."""
        return sorted(self._waiting)

    def near(self, node: NodeId) -> list[Batch]:
        """Those under way from or to the node."""
        return [self._all[number] for number in sorted(self._near.get(node, ()))]

    def under_way(self) -> list[Batch]:
        return [batch for batch in self._all.values() if batch.begun_s is not None]

    def check(self) -> None:
        """Broken unless all books agree."""
        keys = [(batch.namespace, key) for batch in self._all.values() for key in batch.keys]
        if len(keys) != len(self._keys) or set(keys) != self._keys:
            raise Broken("a key is in two batches, or forgotten; report this")
        waiting = {each for numbers in self._waiting.values() for each in numbers}
        if waiting != {n for n, batch in self._all.items() if batch.begun_s is None}:
            raise Broken("a batch waits in vain; report this")
        near = {each for numbers in self._near.values() for each in numbers}
        if near != self._all.keys() - waiting:
            raise Broken("a batch under way would never be looked at; report this")
        for number, counts in self._phases.items():
            phases = [_phase(self._all[each]) for each in self._of[number]]
            if counts != [phases.count(phase) for phase in (_WAITING, _COPYING, _DROPPING)]:
                raise Broken(f"the batches of move {number} are miscounted; report this")
        if {each for numbers in self._of.values() for each in numbers} != self._all.keys():
            raise Broken("a batch is not its move's; report this")

    def _enter(self, batch: Batch) -> None:
        mine = {(batch.namespace, key) for key in batch.keys}
        if not mine.isdisjoint(self._keys):
            raise Broken(f"keys of batch {batch.number} are in another one: a bug")
        self._all[batch.number] = batch
        self._of.setdefault(batch.move.number, set()).add(batch.number)
        self._phases.setdefault(batch.move.number, [0, 0, 0])
        self._keys |= mine

    def _stop_waiting(self, batch: Batch) -> None:
        queue = self._waiting[batch.source]
        queue.discard(batch.number)
        if not queue:
            del self._waiting[batch.source]


def _phase(batch: Batch) -> int:
    if batch.state is MoveState.DROPPING:
        return _DROPPING
    return _WAITING if batch.begun_s is None else _COPYING
