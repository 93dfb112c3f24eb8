"""Which shards go when there is no room: the coldest leaf, or a whole slab that lies colder.

Demand shifts between shard sizes, and between tenants. A sub-pool whose own coldest shard
is not the coldest of all looks for a slab elsewhere whose latest use is longer ago; such a
slab is emptied and moves. Where it finds none, it turns over a slab's worth of its own
shards before it looks again, so that looking stays cheap; one that has nothing to turn over
looks again when enough has changed.
"""

from __future__ import annotations

from typing import Protocol

from kvfabric_nodes.store.extents import Extents, Pool
from kvfabric_nodes.store.shards import Shard, Shards

LOOK_AGAIN_S = 1.0  # for a slab that may go, where nothing else can
CHANGES_PART = 64  # or when so large a part of the shards may have become evictable
POOLS_IN_VAIN = 1024  # remembered


class Drop(Protocol):
    """Takes a shard out of the books."""

    def __call__(self, shard: Shard, what: str, why: str, now_s: float) -> None: ...


class Eviction:
    """Least recently used, leaf first; never past a pin or a holder."""

    def __init__(self, extents: Extents, shards: Shards, drop: Drop) -> None:
        self.extents = extents
        self.shards = shards
        self.drop = drop
        self._patience: dict[Pool, int] = {}  # own evictions until the next look elsewhere
        # Pools that found no slab and have nothing of their own: when they look again, as a
        # number of changes and as a time.
        self._in_vain: dict[Pool, tuple[int, float]] = {}

    def make_room(self, pool: Pool, now_s: float) -> bool:
        """Evicts one shard of the pool, or empties a slab of another; False: nothing can go.

        An emptied slab of another tenant is not yet the pool's: it has to be retired.
        """
        victim = self.shards.coldest(pool)
        if victim is None and not any(map(self.shards.coldest, self.shards.pools())):
            return False  # no slab can go either: it would begin with a leaf
        if victim is None and self._is_vain(pool, now_s):
            return False
        patience = self._patience.pop(pool, 0)
        if victim is None or (not patience and self._colder_elsewhere(victim)):
            slab = self._coldest_slab(pool, victim.last_used if victim else None)
            if slab is not None:
                for shard in slab:
                    why = f"its slab moves to shards of {pool[1]} bytes"
                    self.drop(shard, "evicted", why, now_s)
                return True
            patience = self.extents.segment_bytes // pool[1]
        if victim is None:
            self._note_vain(pool, now_s)
            return False
        if patience > 1:
            self._patience[pool] = patience - 1
        self.drop(victim, "evicted", "the coldest leaf of its sub-pool", now_s)
        return True

    def _is_vain(self, pool: Pool, now_s: float) -> bool:
        """Whether a look at all slabs would find no more than the last one."""
        changes, at_s = self._in_vain.pop(pool, (0, now_s))
        if self._changes >= changes or now_s >= at_s:
            return False
        self._in_vain[pool] = (changes, at_s)
        return True

    def _note_vain(self, pool: Pool, now_s: float) -> None:
        if len(self._in_vain) >= POOLS_IN_VAIN:
            self._in_vain.clear()
        changes = self._changes + 1 + self.shards.count // CHANGES_PART
        self._in_vain[pool] = (changes, now_s + LOOK_AGAIN_S)

    @property
    def _changes(self) -> int:
        """Grows with all that may let a slab go that could not."""
        return self.shards.considered + self.extents.freed

    def _colder_elsewhere(self, victim: Shard) -> bool:
        """Whether some pool has a leaf that was not used for longer: a first, cheap look."""
        leaves = (self.shards.coldest(pool) for pool in self.shards.pools())
        return any(leaf and leaf.last_used < victim.last_used for leaf in leaves)

    def _coldest_slab(self, pool: Pool, older_than: int | None) -> list[Shard] | None:
        """The shards of the slab outside `pool` whose latest use is longest ago, leaves first,
        with what continues them; None where no slab can go.

        All of it must be colder than the pool's own coldest shard (`older_than`), else moving
        the slab would throw away the warmer bytes. Another tenant's slab goes only while none
        is on its way already: it may take its clients a while to let go of one.
        """
        abroad = not self.extents.retired
        by_slab: dict[int, list[Shard]] = {}
        for shard in self.shards:
            if shard.pool != pool and (abroad or shard.pool[0] == pool[0]):
                by_slab.setdefault(shard.extent.segment, []).append(shard)
        ranked = sorted((max(s.last_used for s in slab), slot) for slot, slab in by_slab.items())
        for latest, segment in ranked:
            if older_than is not None and latest >= older_than:
                return None
            slab = by_slab[segment]
            if len(slab) < len(self.extents.segments[segment].used):
                continue  # reserved or quarantined extents lie there
            all_of_it = [*slab, *self.shards.descendants(slab)]
            if all(self._can_go(shard, older_than) for shard in all_of_it):
                return all_of_it[::-1]
        return None

    def _can_go(self, shard: Shard, older_than: int | None) -> bool:
        return (
            not shard.pinned
            and not shard.extent.holders
            and not self.shards.claimed(shard)
            and (older_than is None or shard.last_used < older_than)
        )
