"""A loan as its debtor sees it, and the stages that each of its keys goes through."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvfabric.errors import Broken
from kvfabric.lending.loans import COUNTED, LoanState, move
from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import Key, NamespaceId

POLL_FIRST_S = 0.02  # how soon a debtor looks again whether a loan has come further
POLL_MOST_S = 0.5

INFINITY = float("inf")

Place = tuple[NamespaceId, Key]


class Stage(enum.Enum):
    """How far one key of a loan is."""

    ASKED = "asked"  # the creditor has not said whether it takes it
    COMING = "coming"  # it has reserved the room, and fetches the bytes
    THERE = "there"  # it holds them; our own copy stays until that is seen and leases end
    AWAY = "away"  # its copy is the one: ours is dropped
    LEAVING = "leaving"  # we need it there no more; the creditor has not heard of that yet


TRANSITIONS: Mapping[Stage, frozenset[Stage]] = {
    Stage.ASKED: frozenset({Stage.COMING, Stage.THERE, Stage.LEAVING}),
    Stage.COMING: frozenset({Stage.THERE, Stage.LEAVING}),
    Stage.THERE: frozenset({Stage.AWAY, Stage.LEAVING}),
    Stage.AWAY: frozenset({Stage.LEAVING}),
    Stage.LEAVING: frozenset(),
}

PENDING = frozenset({Stage.ASKED, Stage.COMING, Stage.THERE})


class Named(Protocol):
    """The search that named a creditor, and is told what came of it."""

    def refused(self, node: str, why: str, owes: bool) -> None: ...

    def has_others(self, node: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Like shards that are to lie elsewhere, and who has them now."""

    namespace: NamespaceId
    tenant: str
    layers: int
    size_bytes: int  # of a shard
    slot_bytes: int
    keys: Sequence[Key]
    source: str  # we, a creditor that wants its memory back, or the one that is asked
    endpoints: types_pb2.Endpoints  # the source's


@dataclass(slots=True, eq=False)
class Debt:
    """One loan, taken of one creditor. It goes on at `next_s`, unless a question is open."""

    id: int
    creditor: str
    endpoints: types_pb2.Endpoints  # the creditor's
    batch: Batch
    why: str
    begun_s: float
    expires_s: float
    search: Named | None = None
    last_resort: bool = False
    stages: dict[Key, Stage] = field(default_factory=dict)
    state: LoanState = LoanState.REQUESTED
    incarnation: int = 0  # the creditor's; 0 until it has lent something
    end: LoanState = LoanState.VOID  # what it will have come to
    dropping: set[Key] = field(default_factory=set)  # LEAVING, and not to stay as cache
    homing: set[Key] = field(default_factory=set)  # AWAY, being fetched home
    moving: set[Key] = field(default_factory=set)  # AWAY, asked of another creditor
    keep_bytes: int | None = None  # while recalled: what may stay there
    recall_s: float = INFINITY  # when the creditor takes the rest
    stays_out: bool = False  # what is recalled does not come home: there was no room
    doubtful: bool = False  # the creditor counts otherwise: ask it key by key
    calling: bool = False  # one question at a time
    looked: bool = False  # the last one was for the directory
    unanswered: int = 0  # calls, in a row
    version: int = 0  # of the stages; so that an old answer is not held against new ones
    next_s: float = 0.0
    wait_s: float = POLL_FIRST_S

    @property
    def owed_bytes(self) -> int:
        """As the creditor counts: from its answer until it has heard of the return."""
        return len(self.stages) * self.batch.slot_bytes if self.state in COUNTED else 0

    @property
    def staying_bytes(self) -> int:
        """Without what is leaving."""
        stays = sum(1 for stage in self.stages.values() if stage is not Stage.LEAVING)
        return stays * self.batch.slot_bytes

    @property
    def reclaims(self) -> bool:
        """Whether its keys lie at the creditor already: they are claimed in place."""
        return self.batch.source == self.creditor

    @property
    def due_s(self) -> float:
        next_s = INFINITY if self.calling else self.next_s
        return min(next_s, self.expires_s, self.recall_s)

    def having(self, *stages: Stage) -> list[Key]:
        return [key for key, stage in self.stages.items() if stage in stages]

    def step(self, key: Key, to: Stage) -> None:
        """One key goes on; staying where it is is no step, and allowed."""
        now = self.stages[key]
        if to is now:
            return
        if to not in TRANSITIONS[now]:
            raise Broken(f"a lent key that is {now.name} cannot become {to.name}")
        self.stages[key] = to
        self._changed()

    def remove(self, key: Key) -> None:
        del self.stages[key]
        for part in (self.dropping, self.homing, self.moving):
            part.discard(key)
        self._changed()

    @property
    def stands(self) -> LoanState:
        """The state that the stages make, once the creditor has answered."""
        if not self.incarnation:
            return LoanState.REQUESTED
        if self.homing or self.moving:
            return LoanState.MOVING
        if self.keep_bytes is not None:
            return LoanState.RECALLED
        return LoanState.GRANTED if self.having(*PENDING) else LoanState.HELD

    def restate(self) -> None:
        """To be called when stages have changed."""
        if self.stages:
            self.to(self.stands)

    def to(self, state: LoanState) -> None:
        self.state = move(self.state, state)

    def rest(self, now_s: float) -> None:
        """Waits a while before it goes on, longer each time that nothing has changed."""
        self.next_s = now_s + self.wait_s
        self.wait_s = min(POLL_MOST_S, 2 * self.wait_s)

    def _changed(self) -> None:
        self.version += 1
        self.wait_s = POLL_FIRST_S

    def check(self) -> None:
        """Asserts all invariants."""
        assert self.stages, f"loan {self.id} is empty"
        away = set(self.having(Stage.AWAY))
        assert self.homing <= away
        assert self.moving <= away
        assert not self.homing & self.moving
        assert self.dropping <= set(self.having(Stage.LEAVING))
        assert self.state is self.stands
        if self.state is LoanState.REQUESTED:
            assert not self.having(Stage.COMING, Stage.THERE, Stage.AWAY)
