"""Fills a node that joined, slowly, with what helps there: shards that full nodes evict next.

The rule: a node whose fill is under half of the mean takes, from nodes that are over FULL,
shards that nobody read lately. At a full node every shard that goes is one that is not
evicted; what is read stays where its readers are; and where no node is full nothing is
moved, for there is nothing to gain. Nodes that are full of what sequences need give
nothing: that is the planner's to lend.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvfabric.directory import Cursor, Lot
from kvfabric.errors import Broken
from kvfabric.membership import Member
from kvfabric.moves import sight
from kvfabric.moves.draining import holding
from kvfabric.moves.heat import Heat
from kvfabric.moves.migration import BATCH_KEYS, Kind, Move
from kvfabric.moves.mover import Mover
from kvfabric.moves.policies import Rules
from kvfabric.types import Key, NamespaceId, NodeId

LOOK_S = 5.0
MAX_FILLS = 8  # nodes that are filled at once
BYTES_PER_S = 32 * 1024 * 1024  # to each
EMPTY_SHARE = 0.5  # of the mean fill: emptier nodes take
ENOUGH_SHARE = 0.9  # of the mean fill: then it is enough
RELIEF = 0.1  # a giver that has so much room again gives no more
MAX_CLAIMED = 0.5  # of a giver's memory
SLICE_KEYS = 1024


@dataclass(slots=True)
class _Filling:
    move: Move
    giver: NodeId
    cursor: Cursor | None = None
    begun: bool = False
    lots: deque[Lot] = field(default_factory=deque)  # found and not yet taken up


class Filling:
    """See the module."""

    def __init__(self, cluster: sight.Cluster, mover: Mover, rules: Rules, heat: Heat) -> None:
        self._cluster = cluster
        self._mover = mover
        self._rules = rules
        self._heat = heat
        self._fillings: dict[NodeId, _Filling] = {}  # by who takes
        self._look_s = 0.0
        self._mean = 0.0  # fill of all nodes, at the last look

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        if now_s >= self._look_s:
            self._look_s = now_s + LOOK_S
            self._look(now_s)
        for taker, filling in list(self._fillings.items()):
            if filling.move.ended or self._enough(taker, filling.giver):
                self._mover.close(filling.move, now_s)
                del self._fillings[taker]
            elif not any(self._mover.phases(filling.move)):  # one batch after the other
                self._feed(filling, now_s)

    def check(self) -> None:
        """Broken unless bounds are kept."""
        if len(self._fillings) > MAX_FILLS:
            raise Broken(f"{len(self._fillings)} nodes are filled, over {MAX_FILLS}: a bug")

    def _look(self, now_s: float) -> None:
        nodes = [self._cluster.members[node] for node in sight.takers(self._cluster)]
        if not nodes:
            return
        self._mean = sum(sight.fill(known) for known in nodes) / len(nodes)
        givers = sorted((each for each in nodes if _gives(each)), key=sight.fill)
        takers = [known for known in nodes if sight.fill(known) < EMPTY_SHARE * self._mean]
        for known in takers:
            if len(self._fillings) >= MAX_FILLS or self._mover.full or not givers:
                return
            if known.node not in self._fillings:
                giver = givers.pop().node
                move = self._mover.begin(
                    Kind.FILL, now_s, source=giver, destination=known.node, bytes_per_s=BYTES_PER_S
                )
                self._fillings[known.node] = _Filling(move, giver)

    def _enough(self, taker: NodeId, giver: NodeId) -> bool:
        if not sight.takes(self._cluster, taker) or not sight.takes(self._cluster, giver):
            return True
        gives, takes = self._cluster.members[giver], self._cluster.members[taker]
        enough = ENOUGH_SHARE * self._mean
        return sight.fill(takes) >= enough or sight.fill(gives) < sight.FULL - RELIEF

    def _feed(self, filling: _Filling, now_s: float) -> None:
        """Some of the giver's keys; after the last ones the next look decides anew."""
        if not filling.lots:
            if filling.begun and filling.cursor is None:
                self._mover.close(filling.move, now_s)
                return
            lots, filling.cursor = self._cluster.directory.pick(
                holding(filling.giver), filling.cursor, SLICE_KEYS
            )
            filling.lots.extend(lots)
            filling.begun = True
        added = 0
        while filling.lots and not added:
            lot = filling.lots.popleft()
            if lot.keys[BATCH_KEYS:]:
                filling.lots.appendleft(lot._replace(keys=lot.keys[BATCH_KEYS:]))
            keys = [key for key in lot.keys[:BATCH_KEYS] if self._idle(lot.namespace, key, now_s)]
            added = self._mover.add(filling.move, lot.namespace, keys, filling.giver, now_s)

    def _idle(self, namespace: NamespaceId, key: Key, now_s: float) -> bool:
        """Whether nobody reads it, or wants it where it is."""
        return not (self._rules.pinned(namespace, key) or self._heat.rate(namespace, key, now_s))


def _gives(known: Member) -> bool:
    """Whether the node evicts soon, and has something to give."""
    claimed_bytes = sum(tier.claimed_bytes for tier in known.stats.tiers)
    return sight.fill(known) > sight.FULL and claimed_bytes < MAX_CLAIMED * sight.capacity_bytes(
        known
    )
