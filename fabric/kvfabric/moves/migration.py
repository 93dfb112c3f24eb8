"""A move of shards between nodes: copies are made, seen, and only then the source drops its own.

A move consists of batches, and a batch of steps that are finished when the directory shows
it. So nothing of a move need be remembered over a restart: copies that were made are
ordinary cache, commands still on their way do what they say and no more, and who wanted
the move asks again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvfabric.errors import Broken
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId, NodeId

BATCH_KEYS = 64
BATCH_BYTES = 64 * 1024 * 1024
MAX_NOTES = 4  # reasons that a move remembers


class MoveState(enum.IntEnum):
    """Of a batch, and of a whole move."""

    COPYING = control_pb2.MOVE_STATE_COPYING  # destinations reserve, copy and verify
    DROPPING = control_pb2.MOVE_STATE_DROPPING  # all is seen there; the source drops its own
    DONE = control_pb2.MOVE_STATE_DONE
    CANCELLED = control_pb2.MOVE_STATE_CANCELLED
    FAILED = control_pb2.MOVE_STATE_FAILED  # timed out or lost its nodes


_ENDS = frozenset({MoveState.DONE, MoveState.CANCELLED, MoveState.FAILED})

TRANSITIONS: Mapping[MoveState, frozenset[MoveState]] = {
    MoveState.COPYING: _ENDS | {MoveState.DROPPING},
    MoveState.DROPPING: _ENDS | {MoveState.COPYING},  # the copy was lost before the source let go
    MoveState.DONE: frozenset(),
    MoveState.CANCELLED: frozenset(),
    MoveState.FAILED: frozenset(),
}


class Kind(enum.StrEnum):
    """What a move is for."""

    MIGRATE = "migrate"  # somebody asked
    DRAIN = "drain"  # a node is emptied
    REPAIR = "repair"  # shards have fewer replicas than they should
    SPREAD = "spread"  # hot shards get further replicas, which go again
    FILL = "fill"  # a node that joined takes from full ones


PRIORITIES: Mapping[Kind, int] = {
    Kind.MIGRATE: control_pb2.PRIORITY_MOVE,
    Kind.DRAIN: control_pb2.PRIORITY_REPAIR,
    Kind.REPAIR: control_pb2.PRIORITY_REPAIR,
    Kind.SPREAD: control_pb2.PRIORITY_BALANCE,
    Kind.FILL: control_pb2.PRIORITY_BALANCE,
}


def check_step(what: str, old: MoveState, new: MoveState) -> None:
    """Broken for a change that is not in TRANSITIONS."""
    if new not in TRANSITIONS[old]:
        raise Broken(f"{what} cannot go from {old.name} to {new.name}: a bug")


@dataclass(slots=True)
class Move:
    """What was asked for as a whole, with its progress. Changed by the mover only."""

    number: int
    kind: Kind
    source: NodeId | None  # None: wherever the keys lie
    destination: NodeId | None  # None: as placement finds best, batch by batch
    bytes_per_s: int  # 0: unthrottled
    priority: int
    copy: bool  # the source keeps its replicas
    begun_s: float
    state: MoveState = MoveState.COPYING
    more: bool = True  # further batches may come
    expected: int = 0  # keys, where that can be said beforehand
    keys: int = 0  # that were found and taken up
    copied: int = 0  # seen at a destination
    dropped: int = 0  # gone from the source
    vanished: int = 0  # evicted everywhere before they were copied
    failed: int = 0
    size_bytes: int = 0  # of copies, estimated from the sources' averages
    paid_until_s: float = 0.0  # a throttled move starts no batch before
    ended_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to(self, state: MoveState) -> None:
        """Into another state, along TRANSITIONS; into the same: nothing."""
        if state is not self.state:
            check_step(f"move {self.number}", self.state, state)
            self.state = state

    def note(self, why: str) -> None:
        """One more reason, the first few of them."""
        if why not in self.notes and len(self.notes) < MAX_NOTES:
            self.notes.append(why)

    @property
    def ended(self) -> bool:
        return self.state in _ENDS

    def told(self, now_s: float) -> control_pb2.Move:
        """As operators see it."""
        end_s = self.ended_s if self.ended else now_s
        return control_pb2.Move(
            move=self.number,
            kind=self.kind.value,
            source=self.source or "",
            destination=self.destination or "",
            state=self.state.value,
            keys=max(self.keys, self.expected) if self.more else self.keys,
            copied=self.copied,
            dropped=self.dropped,
            size_bytes=self.size_bytes,
            age_ms=max(0, int((end_s - self.begun_s) * 1000)),
            why="; ".join(self.notes),
        )


@dataclass(slots=True, eq=False)
class Batch:
    """Keys of one namespace that go from one node to another together."""

    number: int
    move: Move
    namespace: NamespaceId
    keys: list[Key]  # those still on their way
    source: NodeId
    destination: NodeId | None  # None: not chosen yet
    fixed: bool  # the destination is the asker's, no other will do
    size_bytes: int
    waiting_since_s: float
    evict: bool = False  # colder cache at the destination may go for it
    may_give_up: bool = False  # without room anywhere the source's cache is dropped
    given_up: bool = False  # and so it is
    state: MoveState = MoveState.COPYING
    begun_s: float | None = None  # None: it waits for its turn
    due_s: float = 0.0  # the next look
    deadline_s: float = 0.0  # of this step
    tries: int = 0
    bytes_per_s: int = 0  # its share of the move's rate, as it was told first
    command: int = 0  # the latest that was posted
    resent: bool = False  # it is not the first of its step
    shunned: set[NodeId] = field(default_factory=set)  # where it did not work

    def to(self, state: MoveState) -> None:
        check_step(f"batch {self.number} of move {self.move.number}", self.state, state)
        self.state = state
