"""Keeps as many replicas as rules want: of new shards, and after losses.

Only too few is mended: what is there beyond the count is cache, which nodes evict when it is
cold. A replica that its node evicted for want of room is not made anew while there is none:
colder cache elsewhere goes only for shards that have just come, and for a while after a loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from kvfabric.directory import Cursor, Lot, Place
from kvfabric.errors import Broken
from kvfabric.moves import sight
from kvfabric.moves.migration import Kind
from kvfabric.moves.mover import Mover
from kvfabric.moves.policies import Rules
from kvfabric.moves.sight import Subject
from kvfabric.moves.standing import Standing
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId

MAX_FRESH = 65_536  # shards that have just come and are still to be looked at
FRESH_KEYS = 4096  # of them looked at in one round
SCAN_S = 0.25  # between two slices of the walks
SCAN_KEYS = 16_384  # of all shards
COUNTED_KEYS = 1024  # of those that have counts of their own
ALARM_S = 600.0  # after a loss, or a change of policy, so long colder cache may go


class Replicas:
    """See the module."""

    def __init__(self, cluster: sight.Cluster, mover: Mover, rules: Rules, begin_s: float) -> None:
        """Nothing is done before `begin_s`, when nodes have told a new manager what they hold."""
        self._begin_s = begin_s
        self._cluster = cluster
        self._mover = mover
        self._rules = rules
        self._repair = Standing(mover, Kind.REPAIR)
        self._fresh: dict[Subject, None] = {}
        self._cursor: Cursor | None = None
        self._counted: list[Subject] = []  # the rest of a walk over counts of single shards
        self._possible = (0, 0)  # nodes that take replicas, and their zones
        self._scan_s = 0.0
        self._alarm_s = float("-inf")  # until then

    def alarm(self, now_s: float) -> None:
        """A node was lost, or more replicas are wanted: find what lacks some, from the start."""
        self._alarm_s = now_s + ALARM_S
        self._cursor = None
        self._counted = []
        self._scan_s = now_s

    def added(self, namespace: NamespaceId, keys: bytes) -> None:
        """Replicas of these keys (32 bytes each) have come somewhere."""
        if self._rules.replicas(namespace) > 1 or self._rules.counts.any_in(namespace):
            heads = range(0, len(keys), DIGEST_BYTES)
            self.wanted(namespace, [Key(keys[at : at + DIGEST_BYTES]) for at in heads])

    def wanted(self, namespace: NamespaceId, keys: list[Key]) -> None:
        """These may lack replicas, and are looked at soon."""
        for replicas, some in self._rules.by_replicas(namespace, keys).items():
            room = MAX_FRESH - len(self._fresh)  # the walks find the rest
            if replicas > 1:
                self._fresh.update((Subject(namespace, key), None) for key in some[:room])

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        if now_s < self._begin_s:
            return
        if self._fresh:
            self._look_at_fresh(now_s)
        if now_s >= self._scan_s:
            self._scan_s = now_s + SCAN_S
            self._scan(now_s)
            self._scan_counts(now_s)
        self._repair.tick(now_s)

    def check(self) -> None:
        """Broken unless bounds are kept."""
        if len(self._fresh) > MAX_FRESH:
            raise Broken(f"{len(self._fresh)} fresh shards are too many: a bug")

    def _look_at_fresh(self, now_s: float) -> None:
        self._count_possible()
        for lot in self._lots(itertools.islice(self._fresh, FRESH_KEYS)):
            if not self._mend(lot, now_s, evict=True):
                return  # later: what could not be taken up stays
            for key in lot.keys:
                del self._fresh[Subject(lot.namespace, key)]

    def _scan(self, now_s: float) -> None:
        """A slice of the walk over shards that may lack replicas."""
        counted = self._rules.counted()
        if not counted:
            return
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

    def _scan_counts(self, now_s: float) -> None:
        """A slice of the walk over shards with counts of their own: few, so by their keys."""
        if not self._counted:
            self._counted = [Subject(namespace, key) for namespace, key, _ in self._rules.counts]
        self._count_possible()
        for lot in self._lots(self._counted[:COUNTED_KEYS]):
            if not self._mend(lot, now_s, evict=now_s < self._alarm_s):
                return  # this slice again
        del self._counted[:COUNTED_KEYS]

    def _mend(self, lot: Lot, now_s: float, *, evict: bool) -> bool:
        """One more replica for each, where it lacks any. False: the mover wants no more now."""
        keepers = sight.keepers(self._cluster, lot.place)
        if not keepers:
            return True
        for replicas, keys in self._rules.by_replicas(lot.namespace, lot.keys).items():
            if not self._enough(keepers, replicas):
                free = [key for key in keys if not self._mover.busy(lot.namespace, key)]
                if free and not self._copy(lot.namespace, free, keepers, now_s, evict=evict):
                    return False
        return True

    def _copy(
        self,
        namespace: NamespaceId,
        keys: list[Key],
        keepers: set[NodeId],
        now_s: float,
        *,
        evict: bool,
    ) -> bool:
        move = self._repair.wanting(now_s)
        if move is None:
            return False
        source = sight.one_of(keepers, keys[0])
        size_bytes = sight.shard_bytes(self._cluster, source)
        # Without room it is found again by the next walk.
        if evict or self._mover.targets.best(source, keepers, size_bytes, now_s):
            self._mover.add(move, namespace, keys, source, now_s, evict=evict)
        return True

    def _lots(self, subjects: Iterable[Subject]) -> Iterable[Lot]:
        """The subjects, by namespace and place."""
        rooms: dict[NamespaceId, list[Key]] = {}
        for namespace, key in subjects:
            rooms.setdefault(namespace, []).append(key)
        for namespace, keys in rooms.items():
            for place, alike in sight.places(self._cluster, namespace, keys).items():
                yield Lot(namespace, place, alike)

    def _count_possible(self) -> None:
        takers = sight.takers(self._cluster)
        self._possible = (len(takers), sight.zones(self._cluster, takers))

    def _enough(self, keepers: Collection[NodeId], wanted: int) -> bool:
        """Whether there are as many replicas, in as many zones, as wanted and possible."""
        nodes, zones = self._possible
        if len(keepers) < min(wanted, nodes):
            return False
        return sight.zones(self._cluster, keepers) >= min(wanted, zones)
