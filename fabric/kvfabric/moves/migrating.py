"""Moves that somebody asked for: of some keys, or of everything that a node holds.

They are not kept over a restart: copies that were made stay as cache, what was not begun
is not done, and who asked sees the move gone and asks again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvfabric.directory import Cursor, Lot
from kvfabric.errors import Refused
from kvfabric.moves import sight
from kvfabric.moves.draining import holding
from kvfabric.moves.migration import BATCH_KEYS, Kind, Move
from kvfabric.moves.mover import MAX_WAITING, Mover
from kvfabric.types import Key, NamespaceId, NodeId

SLICE_KEYS = 16_384


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be moved. Without keys: all that the source holds, in the namespace or in any."""

    namespace: NamespaceId | None
    keys: Sequence[Key]
    source: NodeId | None  # None: one of the holders of each key
    destination: NodeId | None  # None: as placement finds best
    bytes_per_s: int = 0
    priority: int = 0
    copy: bool = False


@dataclass(slots=True)
class _Asked:
    wish: Wish
    move: Move
    lots: deque[Lot] = field(default_factory=deque)
    cursor: Cursor | None = None
    walking: bool = False  # over all that the source holds


class Migrating:
    """See the module."""

    def __init__(self, cluster: sight.Cluster, mover: Mover) -> None:
        self._cluster = cluster
        self._mover = mover
        self._asked: dict[int, _Asked] = {}

    def begin(self, wish: Wish, now_s: float) -> Move:
        """Refused for what cannot be moved, Retry where too many moves are under way."""
        self._check(wish)
        lots = self._find(wish)
        if wish.keys and not lots:
            held = f"{wish.source} holds" if wish.source else "any node holds"
            raise Refused(f"none of these {len(wish.keys)} keys is what {held}; locate them first")
        move = self._mover.begin(
            Kind.MIGRATE,
            now_s,
            source=wish.source,
            destination=wish.destination,
            bytes_per_s=wish.bytes_per_s,
            priority=wish.priority,
            copy=wish.copy,
        )
        asked = _Asked(wish, move, deque(lots), walking=not wish.keys)
        if wish.keys or wish.source is None:
            move.expected = sum(len(lot.keys) for lot in lots)
        elif wish.namespace is None:
            move.expected = self._cluster.directory.count(holding(wish.source))
        self._asked[move.number] = asked
        self._feed(asked, now_s)
        return move

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        for asked in list(self._asked.values()):
            self._feed(asked, now_s)

    def heard(self, node: NodeId, now_s: float) -> None:
        """What a node holds has changed."""
        for asked in list(self._asked.values()):
            if asked.wish.source == node or asked.wish.destination == node:
                self._feed(asked, now_s)

    def _check(self, wish: Wish) -> None:
        for node in (wish.source, wish.destination):
            if node is not None and not sight.live(self._cluster, node):
                raise Refused(
                    f"{node} is no node that is alive and in touch; `kvfabric status` lists them"
                )
        if wish.source is None and not wish.keys:
            raise Refused("name keys or a node to move them from")
        if wish.keys and wish.namespace is None:
            raise Refused("keys are nothing without their namespace; name it")
        if wish.source is not None and wish.source == wish.destination:
            raise Refused(f"{wish.source} cannot move anything to itself; name another node")
        if wish.destination in self._cluster.draining:
            raise Refused(f"{wish.destination} is being drained; name another node")

    def _find(self, wish: Wish) -> list[Lot]:
        """Where the wished keys lie. Those that lie nowhere are left out."""
        if not wish.keys or wish.namespace is None:
            return []
        keys = list(dict.fromkeys(wish.keys))
        located = self._cluster.directory.locate(wish.namespace, keys, prefix=False)
        found: dict[int, list[Key]] = {}
        for key, index in zip(keys, located.indices, strict=True):
            if index < len(located.places):
                found.setdefault(index, []).append(key)
        return [
            Lot(wish.namespace, located.places[index], alike)
            for index, alike in found.items()
            if wish.source is None
            or any(replica.node == wish.source for replica in located.places[index])
        ]

    def _feed(self, asked: _Asked, now_s: float) -> None:
        """As much of what was asked for as the mover wants; at its end the move may end."""
        move = asked.move
        if not move.ended and asked.walking and not asked.lots:
            assert asked.wish.source is not None
            lots, asked.cursor = self._cluster.directory.pick(
                holding(asked.wish.source),
                asked.cursor,
                SLICE_KEYS,
                namespace=asked.wish.namespace,
            )
            asked.lots.extend(lots)
            asked.walking = asked.cursor is not None
        for _ in range(len(asked.lots)):
            if not self._mover.wants(move):
                break
            self._take(asked, asked.lots.popleft(), now_s)
        if move.ended or not (asked.lots or asked.walking):
            self._mover.close(move, now_s)
            del self._asked[move.number]

    def _take(self, asked: _Asked, lot: Lot, now_s: float) -> None:
        some, rest = lot.keys[: BATCH_KEYS * MAX_WAITING], lot.keys[BATCH_KEYS * MAX_WAITING :]
        if rest:
            asked.lots.append(lot._replace(keys=rest))
        # What another move has under way is taken up when that one is done with it.
        busy = [key for key in some if self._mover.busy(lot.namespace, key)]
        if busy:
            asked.lots.append(lot._replace(keys=busy))
        nodes = [replica.node for replica in lot.place]
        source = asked.wish.source or next(
            (node for node in nodes if node != asked.wish.destination), nodes[0]
        )
        if source == asked.wish.destination:  # it lies there already, and nowhere else
            asked.move.keys += len(some)
            asked.move.copied += len(some)
            return
        free = [key for key in some if key not in set(busy)]
        self._mover.add(
            asked.move, lot.namespace, free, source, now_s, evict=asked.wish.destination is not None
        )
