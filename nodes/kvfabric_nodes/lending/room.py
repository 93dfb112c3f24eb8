"""Requests for room that waits for memory to come free: bounded in number and time.

Who asked looks at `Room.state`, or is called back. DONE says that as many bytes came free
as were asked for, not that nobody else has taken them since: reserve, and ask again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvfabric.errors import Broken
from kvfabric_nodes.store.extents import Pool

ROOMS = 256  # that wait at a time


class RoomState(enum.Enum):
    WAITING = "waiting"  # memory is being sought
    DONE = "done"  # so much came free
    FAILED = "failed"  # there is none, or not in time: see the reason


TRANSITIONS: Mapping[RoomState, frozenset[RoomState]] = {
    RoomState.WAITING: frozenset({RoomState.DONE, RoomState.FAILED}),
    RoomState.DONE: frozenset(),
    RoomState.FAILED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Room:
    """One request."""

    pool: Pool  # whose slots are wanted, and how large
    needed_bytes: int
    deadline_s: float
    told: Callable[[Room], None] | None = None  # called once, when it ends
    gained_bytes: int = 0
    state: RoomState = RoomState.WAITING
    reason: str = ""  # why it failed

    @property
    def waiting(self) -> bool:
        return self.state is RoomState.WAITING

    @property
    def missing_bytes(self) -> int:
        return self.needed_bytes - self.gained_bytes


class Rooms:
    """The requests that wait, first come first served."""

    def __init__(self) -> None:
        self.waiting: list[Room] = []

    def __bool__(self) -> bool:
        return bool(self.waiting)

    @property
    def missing_bytes(self) -> int:
        return sum(room.missing_bytes for room in self.waiting)

    def add(self, room: Room) -> None:
        if len(self.waiting) < ROOMS:
            self.waiting.append(room)
        else:
            self._end(room, RoomState.FAILED, f"{ROOMS} requests for room wait already")

    def gain(self, size_bytes: int) -> None:
        """So much came free."""
        while size_bytes and self.waiting:
            room = self.waiting[0]
            part = min(size_bytes, room.missing_bytes)
            room.gained_bytes += part
            size_bytes -= part
            if not room.missing_bytes:
                self._end(self.waiting.pop(0), RoomState.DONE, "")

    def fail(self, reason: str) -> None:
        """Nothing more will come free for those that wait."""
        failed, self.waiting = self.waiting, []
        for room in failed:
            self._end(room, RoomState.FAILED, reason)

    def cancel(self, room: Room) -> None:
        """Who asked does not wait any more."""
        if room in self.waiting:
            self.waiting.remove(room)
            self._end(room, RoomState.FAILED, "given up by who asked")

    def tick(self, now_s: float, why: str) -> None:
        """Ends what waited for too long; `why`: what is known of the reason."""
        late = [room for room in self.waiting if room.deadline_s <= now_s]
        self.waiting = [room for room in self.waiting if room.deadline_s > now_s]
        for room in late:
            self._end(room, RoomState.FAILED, f"no room in time: {why}")

    def due_s(self) -> float:
        return min((room.deadline_s for room in self.waiting), default=float("inf"))

    def check(self) -> None:
        """Asserts all invariants."""
        assert len(self.waiting) <= ROOMS
        for room in self.waiting:
            assert room.waiting
            assert 0 <= room.gained_bytes < room.needed_bytes

    def _end(self, room: Room, to: RoomState, reason: str) -> None:
        if to not in TRANSITIONS[room.state]:
            raise Broken(f"a request for room that is {room.state.name} cannot become {to.name}")
        room.state = to
        room.reason = reason
        if room.told is not None:
            room.told(room)
