"""Carries moves out: which of their batches begin when and where to, within the limits.

How one batch is carried out is in steps.py, and how much may be under way in loads.py.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Mapping, Sequence

from kvfabric.errors import Broken, Refused, Retry
from kvfabric.moves import sight
from kvfabric.moves.batches import Batches
from kvfabric.moves.loads import Loads
from kvfabric.moves.migration import (
    BATCH_BYTES,
    BATCH_KEYS,
    PRIORITIES,
    Batch,
    Kind,
    Move,
    MoveState,
)
from kvfabric.moves.steps import COPY_TIMEOUT_S, Steps
from kvfabric.moves.targets import Targets
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId, NodeId

MAX_MOVES = 64  # under way at once
MAX_ENDED = 256  # remembered
MAX_WAITING = 16  # batches of one move from one node that wait for their turn
MAX_WAITING_ANYWHERE = 256  # of a move from many nodes
MAX_DROPPING = 256  # batches of one move whose source still holds them
NO_ROOM_S = 5.0  # then what may be given up is
WAIT_TIMEOUT_S = 300.0
MAX_STARTS = 64  # batches that begin in one tick: the core must not stand still for long
BURST_S = 1.0  # what a throttled move may catch up with


class Mover:
    """See the module. Who wants a move calls `begin`, then `add` while it `wants`, then `close`."""

    def __init__(self, cluster: sight.Cluster) -> None:
        self._cluster = cluster
        self._loads = Loads()
        self.targets = Targets(cluster, self._loads.coming_bytes)
        self._batches = Batches()
        self._last = NodeId("")  # whose batches were begun last
        self._moves: dict[int, Move] = {}
        self._ended: deque[Move] = deque(maxlen=MAX_ENDED)
        self._move_numbers = itertools.count(1)
        self._steps = Steps(cluster, self._loads, self._batches)

    # For those who want something moved

    def begin(
        self,
        kind: Kind,
        now_s: float,
        *,
        source: NodeId | None = None,
        destination: NodeId | None = None,
        bytes_per_s: int = 0,
        priority: int = 0,
        copy: bool = False,
    ) -> Move:
        """A move without any keys yet. Retry where too many are under way."""
        if self.full:
            raise Retry(f"{MAX_MOVES} moves are under way; cancel one, or wait for an end")
        move = Move(
            next(self._move_numbers),
            kind,
            source,
            destination,
            bytes_per_s,
            priority or PRIORITIES[kind],
            copy,
            now_s,
        )
        self._moves[move.number] = move
        return move

    @property
    def full(self) -> bool:
        """Whether no further move can begin."""
        return len(self._moves) >= MAX_MOVES

    def wants(self, move: Move) -> bool:
        """Whether more may be added now."""
        if move.ended:
            return False
        waiting, _, dropping = self._batches.phases(move)
        limit = MAX_WAITING_ANYWHERE if move.source is None else MAX_WAITING
        return waiting < limit and dropping < MAX_DROPPING

    def busy(self, namespace: NamespaceId, key: Key) -> bool:
        """Whether some move has this key under way. No other can take it then."""
        return self._batches.busy(namespace, key)

    def phases(self, move: Move) -> tuple[int, int, int]:
        """How many of its batches wait, are copied, and are dropped at their source."""
        return self._batches.phases(move)

    def add(
        self,
        move: Move,
        namespace: NamespaceId,
        keys: Sequence[Key],
        source: NodeId,
        now_s: float,
        *,
        destination: NodeId | None = None,
        evict: bool = False,
        may_give_up: bool = False,
    ) -> int:
        """Keys that lie at `source` join the move. Returns how many: not those under way already.

        `destination` overrules placement. With `evict` colder cache may go for them; with
        `may_give_up` the source's own are dropped where there is no room anywhere.
        """
        shard_bytes = sight.shard_bytes(self._cluster, source)
        size = min(BATCH_KEYS, BATCH_BYTES // shard_bytes)
        if move.bytes_per_s:  # at most a second's worth, so that the rate is even
            size = min(size, move.bytes_per_s // shard_bytes)
        aim = destination or move.destination
        parts = self._parts(namespace, keys, max(1, size))
        for part in parts:
            batch = self._steps.make(move, namespace, part, source, now_s)
            batch.destination, batch.fixed = aim, aim is not None
            batch.evict, batch.may_give_up = evict, may_give_up
            self._batches.wait(batch)
        return self._added(move, parts)

    def add_drop(
        self, move: Move, namespace: NamespaceId, keys: Sequence[Key], source: NodeId, now_s: float
    ) -> int:
        """Keys that lie well elsewhere: only the replicas at `source` are to go. Else as `add`."""
        parts = self._parts(namespace, keys, BATCH_KEYS)
        added = self._added(move, parts)
        for part in parts:
            batch = self._steps.make(move, namespace, part, source, now_s)
            batch.destination = self._witness(batch)
            self._batches.begin(batch, now_s)
            self._steps.start_dropping(batch, now_s)
        self._settle(move, now_s)
        return added

    def close(self, move: Move, now_s: float) -> None:
        """No more batches come: the move ends with its last one. May be repeated."""
        move.more = False
        self._settle(move, now_s)

    def cancel(self, number: int, now_s: float) -> None:
        """Ends a move; copies made so far stay as cache. May be repeated. Refused for none."""
        move = self._moves.get(number)
        if move is None:
            if all(each.number != number for each in self._ended):
                raise Refused(f"there is no move {number}; `kvfabric moves` lists them")
            return
        batches = self._batches.of(move)
        copying = {b.destination for b in batches if b.command and b.state is MoveState.COPYING}
        for batch in batches:
            self._steps.over(batch, MoveState.CANCELLED)
        for node in sorted(each for each in copying if each is not None):
            what = control_pb2.Command.Cancel(move=number)
            command = control_pb2.Command(why=f"{move.kind} {number} was cancelled", cancel=what)
            self._cluster.order(node, command, now_s)
        self._end(move, MoveState.CANCELLED, now_s)

    @property
    def copied(self) -> Mapping[Kind, int]:
        """Shards that were copied, over all moves."""
        return self._steps.copied

    @property
    def dropped(self) -> Mapping[Kind, int]:
        """Shards that went from their source, over all moves."""
        return self._steps.dropped

    def moves(self) -> list[Move]:
        """Those under way, and the latest that ended; by number. Not to be changed."""
        return sorted((*self._ended, *self._moves.values()), key=lambda move: move.number)

    # What happens

    def heard(self, node: NodeId, now_s: float) -> None:
        """What the node holds has changed, or what it says of its memory."""
        sources = {node}
        for batch in self._batches.near(node):
            sources.add(batch.source)
            if batch in self._batches:
                self._look(batch, now_s)
        for source in sorted(sources):
            self._start(source, now_s)

    def lost(self, node: NodeId, now_s: float) -> None:
        """The node, or what it held, is gone: drops that counted on it are called back."""
        for batch in self._batches.under_way():
            if batch in self._batches and batch.state is MoveState.DROPPING:
                self._look(batch, now_s)
        self.heard(node, now_s)

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        self._batches.tick(now_s)
        for batch in self._batches.under_way():
            if batch in self._batches and now_s >= min(batch.due_s, batch.deadline_s):
                self._look(batch, now_s)
        left = MAX_STARTS
        sources = self._batches.sources()
        at = bisect.bisect_right(sources, self._last)  # each has its turn
        for source in (*sources[at:], *sources[:at]):
            if left <= 0:
                break
            left -= self._start(source, now_s, left)
            self._last = source

    def check(self) -> None:
        """Broken unless books and limits are right."""
        self._loads.check()
        self._batches.check()
        if any(move.ended for move in self._moves.values()) or len(self._moves) > MAX_MOVES:
            raise Broken("an ended move counts as one under way; report this")

    # Starting

    def _start(self, source: NodeId, now_s: float, limit: int = MAX_STARTS) -> int:
        """As many of a source's waiting batches as may begin. Returns how many were tried."""
        tried = 0
        blocked: set[tuple[int, NodeId | None, bool, frozenset[NodeId]]] = set()
        for batch in self._batches.waiting_at(source):
            # Behind one that cannot begin, others with the same aim cannot either.
            aim = (batch.move.number, batch.destination, batch.evict, frozenset(batch.shunned))
            if tried >= limit:
                break
            if batch not in self._batches or aim in blocked:
                continue
            tried += 1
            if not self._begin(batch, now_s):
                blocked.add(aim)
        return tried

    def _begin(self, batch: Batch, now_s: float) -> bool:
        """False: it goes on waiting."""
        move = batch.move
        where = self._steps.where(batch)
        lacking = {key: where[key] for key in batch.keys if batch.source not in where[key]}
        if lacking:
            self._steps.elsewhere(batch, lacking, now_s, f"{batch.source} has them no more")
            if not batch.keys:
                self._steps.over(batch, MoveState.FAILED)
                self._settle(move, now_s)
                return True
        if not sight.live(self._cluster, batch.source):
            return self._wait(batch, now_s, f"{batch.source} is not in touch")
        self._part(batch, now_s)
        if batch.may_give_up and (witness := self._witness(batch)):
            batch.destination = witness  # it lies well elsewhere by now
            self._batches.begin(batch, now_s)
            self._steps.start_dropping(batch, now_s)
            self._settle(move, now_s)
            return True
        if not self._loads.gives(batch) or (move.bytes_per_s and move.paid_until_s > now_s):
            return False
        destination = self._choose(batch, set().union(*self._steps.where(batch).values()), now_s)
        if destination is None:
            return batch not in self._batches or batch.begun_s is not None
        batch.destination = destination
        self._batches.begin(batch, now_s)
        self._loads.take(batch, destination)
        if move.bytes_per_s:
            begin_s = max(move.paid_until_s, now_s - BURST_S)
            move.paid_until_s = begin_s + batch.size_bytes / move.bytes_per_s
        batch.deadline_s = now_s + COPY_TIMEOUT_S + 4 * self._steps.seconds(batch)
        self._look(batch, now_s)
        return True

    def _choose(self, batch: Batch, holders: set[NodeId], now_s: float) -> NodeId | None:
        """Where the batch may begin to go at this moment."""
        if batch.fixed and batch.destination is not None:
            if not sight.takes(self._cluster, batch.destination):
                self._wait(batch, now_s, f"{batch.destination} is away or being drained")
                return None
            return batch.destination if self._loads.fits(batch, batch.destination) else None
        leaving = set() if batch.move.copy else {batch.source}
        shard_bytes = batch.size_bytes // len(batch.keys)
        for size_bytes in (batch.size_bytes, shard_bytes):  # all of it, or as much as there is room
            roomy = [
                node
                for node in self.targets.best(
                    batch.source,
                    holders - leaving - self._cluster.draining,
                    size_bytes,
                    now_s,
                    exclude=holders | batch.shunned,
                    evict=batch.evict,
                )
                if batch.evict or self._room_bytes(node) >= size_bytes
            ]
            for node in roomy:
                if self._loads.fits(batch, node):
                    self._cut(batch, self._room_bytes(node) // max(1, shard_bytes), now_s)
                    return node
            if roomy:
                return None
        self._without_room(batch, now_s)
        return None

    def _part(self, batch: Batch, now_s: float) -> None:
        """Keys that lie at other nodes than the first one does are batches of their own."""
        where = self._steps.where(batch)
        alike: dict[frozenset[NodeId], list[Key]] = {}
        for key in batch.keys:
            alike.setdefault(frozenset(where[key]), []).append(key)
        for keys in list(alike.values())[1:]:
            shard_bytes = batch.size_bytes // len(batch.keys)
            self._batches.release(batch, keys)
            batch.size_bytes = shard_bytes * len(batch.keys)
            self._steps.again(batch, keys, batch.source, now_s)

    def _room_bytes(self, node: NodeId) -> int:
        """Free, and not taken up by what is on its way there."""
        coming_bytes = self._loads.coming_bytes(node)
        return sight.free_bytes(self._cluster.members[node]) - coming_bytes

    def _cut(self, batch: Batch, count: int, now_s: float) -> None:
        """What there is no room for waits as a batch of its own; colder cache may make room."""
        if batch.evict or count >= len(batch.keys):
            return
        rest = batch.keys[count:]
        self._batches.release(batch, rest)
        batch.size_bytes = len(batch.keys) * (batch.size_bytes // (len(batch.keys) + len(rest)))
        self._steps.again(batch, rest, batch.source, now_s)

    def _without_room(self, batch: Batch, now_s: float) -> None:
        if batch.may_give_up and now_s - batch.waiting_since_s >= NO_ROOM_S:
            batch.given_up = True
            self._batches.begin(batch, now_s)
            self._steps.start_dropping(batch, now_s)
            self._settle(batch.move, now_s)
        else:
            self._wait(batch, now_s, "no other node has room")

    def _wait(self, batch: Batch, now_s: float, why: str) -> bool:
        """False: the batch goes on waiting. True: it did for too long, and has failed."""
        if now_s - batch.waiting_since_s < WAIT_TIMEOUT_S:
            return False
        self._steps.fail(batch, batch.keys, why)
        self._steps.over(batch, MoveState.FAILED)
        self._settle(batch.move, now_s)
        return True

    # Books

    def _witness(self, batch: Batch) -> NodeId | None:
        """A node that keeps the batch's keys: what becomes of it matters to the batch."""
        holders = set().union(*self._steps.where(batch).values()) - {batch.source}
        return min((node for node in holders if sight.takes(self._cluster, node)), default=None)

    def _look(self, batch: Batch, now_s: float) -> None:
        self._steps.look(batch, now_s)
        self._settle(batch.move, now_s)

    def _parts(self, namespace: NamespaceId, keys: Sequence[Key], size: int) -> list[list[Key]]:
        free = [key for key in dict.fromkeys(keys) if not self._batches.busy(namespace, key)]
        return [free[first : first + size] for first in range(0, len(free), size)]

    def _added(self, move: Move, parts: list[list[Key]]) -> int:
        added = sum(len(part) for part in parts)
        move.keys += added
        return added

    def _settle(self, move: Move, now_s: float) -> None:
        """The move's own state follows its batches'."""
        if move.ended:
            return
        waiting, copying, dropping = self._batches.phases(move)
        if move.more or waiting or copying:
            move.to(MoveState.COPYING)
        elif dropping:
            move.to(MoveState.DROPPING)
        else:
            self._end(move, MoveState.FAILED if move.failed else MoveState.DONE, now_s)

    def _end(self, move: Move, state: MoveState, now_s: float) -> None:
        move.to(state)
        move.ended_s = now_s
        del self._moves[move.number]
        self._ended.append(move)
