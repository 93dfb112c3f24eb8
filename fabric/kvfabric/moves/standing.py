"""A move that goes on for as long as some rule finds something to be done."""

from __future__ import annotations

from kvfabric.moves.migration import Kind, Move
from kvfabric.moves.mover import Mover

QUIET_S = 10.0  # then what was done counts as one move, and the next is another


class Standing:
    """See the module: the open move of one kind, begun when there is something for it."""

    def __init__(self, mover: Mover, kind: Kind) -> None:
        self._mover = mover
        self._kind = kind
        self._move: Move | None = None
        self._busy_s = 0.0  # when one of its batches was seen last

    def wanting(self, now_s: float) -> Move | None:
        """The move; None while there can be none, or it wants no more."""
        if self._move is None or self._move.ended or not self._move.more:
            if self._mover.full:
                return None
            self._busy_s = now_s
            self._move = self._mover.begin(self._kind, now_s, copy=True)
        return self._move if self._mover.wants(self._move) else None

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        if self._move is None:
            return
        if self._move.ended:
            self._move = None
        elif any(self._mover.phases(self._move)):
            self._busy_s = now_s
        elif now_s - self._busy_s >= QUIET_S:
            self._mover.close(self._move, now_s)
