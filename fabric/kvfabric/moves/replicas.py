"""Keeps as many replicas as policies want: of new shards, after losses, and of hot ones more.

Only too few is mended. What is there beyond the count is cache, which nodes evict when it is
cold; the manager takes away only the extra replicas that it made of hot shards itself. A
replica that its node evicted for want of room is not made anew while there is none: colder
cache elsewhere goes only for shards that have just come, and for a while after a loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

from kvfabric.directory import Cursor, Lot, Place
from kvfabric.errors import Broken
from kvfabric.moves import sight
from kvfabric.moves.heat import Heat
from kvfabric.moves.migration import Kind, Move
from kvfabric.moves.mover import Mover
from kvfabric.moves.policies import Rules
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId

MAX_FRESH = 65_536  # shards that have just come and are still to be looked at
FRESH_KEYS = 4096  # of them looked at in one round
SCAN_S = 0.25  # between two slices of the walk over all shards
SCAN_KEYS = 16_384
ALARM_S = 600.0  # after a loss, or a change of policy, so long colder cache may go
QUIET_S = 10.0  # then what was mended counts as one move, and the next is another
HOT_LOOK_S = 5.0
HOT_READS_PER_S = 5.0  # of one replica: more, and there should be another
COOL_SHARE = 0.25  # of that, were one replica less: then there is one too many
MAX_EXTRA = 4096  # replicas made of hot shards
MAX_SPREAD = 64  # of them begun in one look


class _Subject(NamedTuple):
    namespace: NamespaceId
    key: Key


class Replicas:
    """See the module."""

    def __init__(
        self, cluster: sight.Cluster, mover: Mover, rules: Rules, heat: Heat, begin_s: float
    ) -> None:
        """Nothing is done before `begin_s`, when nodes have told a new manager what they hold."""
        self._begin_s = begin_s
        self._cluster = cluster
        self._mover = mover
        self._rules = rules
        self._heat = heat
        self._fresh: dict[_Subject, None] = {}
        self._cursor: Cursor | None = None
        self._possible = (0, 0)  # nodes that take replicas, and their zones
        self._scan_s = 0.0
        self._alarm_s = float("-inf")  # until then
        self._found = 0  # in this walk
        self._moves: dict[Kind, Move] = {}
        self._busy_s: dict[Kind, float] = {}  # when one of the move's batches was seen last
        self._extra: dict[_Subject, set[NodeId]] = {}
        self._look_s = 0.0

    def alarm(self, now_s: float) -> None:
        """A node was lost, or more replicas are wanted: find what lacks some, from the start."""
        self._alarm_s = now_s + ALARM_S
        self._cursor = None
        self._scan_s = now_s

    def added(self, namespace: NamespaceId, keys: bytes, now_s: float) -> None:
        """Replicas of these keys (32 bytes each) have come somewhere."""
        if self._rules.replicas(namespace) < 2:
            return
        for at in range(0, len(keys), DIGEST_BYTES):
            if len(self._fresh) >= MAX_FRESH:
                return  # the walk finds them
            self._fresh[_Subject(namespace, Key(keys[at : at + DIGEST_BYTES]))] = None

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        if now_s < self._begin_s:
            return
        self._look_at_fresh(now_s)
        if now_s >= self._scan_s and self._rules.counted():
            self._scan_s = now_s + SCAN_S
            self._scan(now_s)
        if now_s >= self._look_s:
            self._look_s = now_s + HOT_LOOK_S
            if self._rules.spreads:
                self._spread(now_s)
            self._gather(now_s)
        for kind, move in list(self._moves.items()):
            if move.ended:
                del self._moves[kind]
            elif any(self._mover.phases(move)):
                self._busy_s[kind] = now_s
            elif now_s - self._busy_s.setdefault(kind, now_s) >= QUIET_S:
                self._mover.close(move, now_s)

    def check(self) -> None:
        """Broken unless bounds are kept."""
        extra = sum(len(nodes) for nodes in self._extra.values())
        if len(self._fresh) > MAX_FRESH or extra > MAX_EXTRA:
            raise Broken(f"{len(self._fresh)} fresh shards or {extra} replicas are too many: a bug")

    # Too few

    def _look_at_fresh(self, now_s: float) -> None:
        if self._fresh:
            self._count_possible()
        some = list(itertools.islice(self._fresh, FRESH_KEYS))
        by_room: dict[NamespaceId, list[Key]] = {}
        for subject in some:
            by_room.setdefault(subject.namespace, []).append(subject.key)
        for namespace, keys in by_room.items():
            for place, alike in self._places(namespace, keys).items():
                if not self._mend(Lot(namespace, place, alike), now_s, evict=True):
                    return  # later: what could not be taken up stays
                for key in alike:
                    del self._fresh[_Subject(namespace, key)]

    def _scan(self, now_s: float) -> None:
        """A slice of the walk over shards that may lack replicas."""
        counted = self._rules.counted()
        most = max(self._rules.replicas(each or NamespaceId(b"")) for each in counted)
        self._count_possible()

        def lacking(place: Place) -> bool:
            keepers = sight.keepers(self._cluster, place)
            return bool(keepers) and not self._enough(keepers, most)

        only = counted[0] if len(counted) == 1 else None
        at = self._cursor
        lots, self._cursor = self._cluster.directory.pick(lacking, at, SCAN_KEYS, namespace=only)
        for lot in lots:
            if not self._mend(lot, now_s, evict=now_s < self._alarm_s):
                self._cursor = at  # this slice again: the mover has enough for now
                return

    def _mend(self, lot: Lot, now_s: float, *, evict: bool) -> bool:
        """One more replica for each, where it lacks any. False: the mover wants no more now."""
        wanted = self._rules.replicas(lot.namespace)
        keepers = sight.keepers(self._cluster, lot.place)
        if not keepers or self._enough(keepers, wanted):
            return True
        keys = [key for key in lot.keys if not self._mover.busy(lot.namespace, key)]
        move = self._move(Kind.REPAIR, now_s)
        if not keys:
            return True
        if move is None or not self._mover.wants(move):
            return False
        source = self._least_busy(keepers, keys[0])
        size_bytes = sight.shard_bytes(self._cluster, source)
        if not evict and not self._mover.targets.best(source, keepers, size_bytes, now_s):
            return True  # no room: it is found again by the next walk
        self._mover.add(move, lot.namespace, keys, source, now_s, evict=evict)
        return True

    def _count_possible(self) -> None:
        takers = sight.takers(self._cluster)
        self._possible = (len(takers), sight.zones(self._cluster, takers))

    def _enough(self, keepers: Collection[NodeId], wanted: int) -> bool:
        """Whether there are as many replicas, in as many zones, as wanted and possible."""
        nodes, zones = self._possible
        if len(keepers) < min(wanted, nodes):
            return False
        return sight.zones(self._cluster, keepers) >= min(wanted, zones)

    def _least_busy(self, keepers: Collection[NodeId], key: Key) -> NodeId:
        """One of the holders, another one for other keys."""
        return sorted(keepers)[key[0] % len(keepers)]

    # Hot ones

    def _spread(self, now_s: float) -> None:
        """More replicas of what is read much, at who asks for it."""
        begun = 0
        for namespace, key in self._heat:
            allowed = self._rules.hot_replicas(namespace)
            if not allowed or begun >= MAX_SPREAD or self._mover.busy(namespace, key):
                continue
            subject = _Subject(namespace, key)
            extra = self._extra.get(subject, set())
            keepers = self._keepers(subject)
            rate = self._heat.rate(namespace, key, now_s)
            if keepers and len(extra) < allowed and rate / len(keepers) > HOT_READS_PER_S:
                begun += self._spread_one(subject, keepers, now_s)

    def _spread_one(self, subject: _Subject, keepers: set[NodeId], now_s: float) -> bool:
        if sum(len(nodes) for nodes in self._extra.values()) >= MAX_EXTRA:
            return False
        source = self._least_busy(keepers, subject.key)
        size_bytes = sight.shard_bytes(self._cluster, source)
        far = self._mover.targets.best(source, keepers, size_bytes, now_s, evict=True)
        askers = self._heat.askers(subject.namespace, subject.key)
        near = [node for node in askers if sight.takes(self._cluster, node)]
        chosen = next((node for node in [*near, *far] if node not in keepers), None)
        move = self._move(Kind.SPREAD, now_s)
        if chosen is None or move is None or not self._mover.wants(move):
            return False
        self._extra.setdefault(subject, set()).add(chosen)
        return bool(
            self._mover.add(
                move,
                subject.namespace,
                [subject.key],
                source,
                now_s,
                destination=chosen,
                evict=True,
            )
        )

    def _gather(self, now_s: float) -> None:
        """Extra replicas of what is read less now are taken away again."""
        for subject, nodes in list(self._extra.items()):
            if self._mover.busy(*subject):
                continue
            keepers = self._keepers(subject)
            nodes &= keepers  # one that is gone, or never came, is none
            needed = self._rules.replicas(subject.namespace)
            rate = self._heat.rate(*subject, now_s)
            allowed = self._rules.hot_replicas(subject.namespace)
            fewer = len(keepers) - 1
            cool = fewer > 0 and rate / fewer < COOL_SHARE * HOT_READS_PER_S
            move = self._move(Kind.SPREAD, now_s) if nodes else None
            if (
                move is not None
                and (cool or len(nodes) > allowed)
                and fewer >= max(1, needed)
                and self._mover.wants(move)
            ):
                node = max(nodes)
                nodes.discard(node)
                self._mover.add_drop(move, subject.namespace, [subject.key], node, now_s)
            if not nodes:
                del self._extra[subject]

    # Inside

    def _keepers(self, subject: _Subject) -> set[NodeId]:
        found = self._places(subject.namespace, [subject.key])
        return sight.keepers(self._cluster, next(iter(found), ()))

    def _places(self, namespace: NamespaceId, keys: list[Key]) -> dict[Place, list[Key]]:
        located = self._cluster.directory.locate(namespace, keys, prefix=False)
        places = [*located.places, ()]
        found: dict[Place, list[Key]] = {}
        for key, index in zip(keys, located.indices, strict=True):
            found.setdefault(places[index], []).append(key)
        return found

    def _move(self, kind: Kind, now_s: float) -> Move | None:
        """The open move of this kind; a new one where there is none."""
        move = self._moves.get(kind)
        if move is None or move.ended or not move.more:
            if self._mover.full:
                return None
            self._busy_s[kind] = now_s
            move = self._moves[kind] = self._mover.begin(kind, now_s, copy=True)
        return move
