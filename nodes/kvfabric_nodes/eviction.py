"""Which shards go when there is no room: the coldest leaf, or a whole slab that lies colder.

Demand shifts between shard sizes. A sub-pool that turned over a slab's worth of its own
shards looks whether another sub-pool has a slab whose latest use is longer ago than that
of its own coldest shard; such a slab is emptied and moves.
"""

from __future__ import annotations

from typing import Protocol

from kvfabric_nodes.extents import Extents, Pool, Segment
from kvfabric_nodes.shards import Shard, Shards


class Drop(Protocol):
    """Takes a shard out of the books."""

    def __call__(self, shard: Shard, what: str, why: str, now_s: float) -> None: ...


class Eviction:
    """Least recently used, leaf first; never past a pin or a holder."""

    def __init__(self, extents: Extents, shards: Shards, drop: Drop) -> None:
        self.extents = extents
        self.shards = shards
        self.drop = drop
        self._turned_over: dict[Pool, int] = {}  # evictions since the last look elsewhere

    def make_room(self, pool: Pool, now_s: float) -> bool:
        """Evicts one shard of the pool, or empties a slab of another; False: nothing can go."""
        victim = self.shards.coldest(pool)
        slots = self.extents.segment_bytes // pool[1]
        if victim is None or self._turned_over.get(pool, 0) >= slots:
            # The pool has nothing to give, or turned over a whole slab's worth of its own:
            # time to see whether demand has shifted to it from a pool that lies colder.
            self._turned_over[pool] = 0
            slab = self._coldest_slab(pool, victim.last_used if victim else None)
            if slab is not None:
                self._empty(slab, pool, now_s)
                return True
        if victim is None:
            return False
        self._turned_over[pool] = self._turned_over.get(pool, 0) + 1
        self.drop(victim, "evicted", "the coldest leaf of its sub-pool", now_s)
        return True

    def _coldest_slab(self, pool: Pool, older_than: int | None) -> Segment | None:
        """The slab outside `pool` whose latest use is longest ago, if all of it can go.

        It must lie colder than the pool's own coldest shard (`older_than`), else moving
        it would throw away the warmer bytes.
        """
        by_slab: dict[int, list[Shard]] = {}
        for shard in self.shards:
            if shard.pool != pool and shard.pool[0] == pool[0]:
                by_slab.setdefault(shard.extent.segment, []).append(shard)
        best: tuple[int, Segment] | None = None
        for segment_id, shards in by_slab.items():
            segment = self.extents.segments[segment_id]
            if len(shards) < len(segment.used):
                continue  # reserved or quarantined extents lie there
            if any(shard.pinned or shard.extent.holders for shard in shards):
                continue
            latest = max(shard.last_used for shard in shards)
            if older_than is not None and latest >= older_than:
                continue
            if best is None or latest < best[0]:
                best = (latest, segment)
        return best[1] if best else None

    def _empty(self, slab: Segment, pool: Pool, now_s: float) -> None:
        """Evicts every shard of a slab, and what continues them first."""
        inside = [s for s in self.shards if s.extent.segment == slab.id]
        why = f"its slab moves to shards of {pool[1]} bytes"
        for shard in inside:
            for descendant in reversed(self.shards.descendants(shard)):
                if self.shards.evictable(descendant):
                    self.drop(descendant, "evicted", why, now_s)
            if shard.present:
                self.drop(shard, "evicted", why, now_s)
