"""Sealed shards by (namespace, key), their chains, and the order in which to evict them.

Eviction is least recently used, leaf first: a shard goes only after everything that
continues it. A heap holds the evictable leaves; a use only stamps the shard, and the
heap is put right when a stale entry comes to its top.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.store.extents import Extent, Pool

SWEEP_ENTRIES = 1024  # so many of shards that are gone may lie in the heaps


@dataclass(slots=True, eq=False)
class Shard:
    """Immutable bytes in an extent, and who still needs them."""

    namespace: NamespaceId
    key: Key
    parent: Key | None
    pool: Pool
    extent: Extent
    size_bytes: int
    layers: int  # 0: written without checksums
    checksums: tuple[int, ...]
    owner: str
    expires_s: float | None
    last_used: int = 0
    reads: int = 0  # since the last heartbeat that told of them
    pinned: bool = False
    queued: bool = False  # has an entry in its pool's heap
    present: bool = True


_Candidate = tuple[int, int, Shard]  # last use, a tie-breaker, the shard


class Shards:
    """The index of what a node holds."""

    def __init__(self) -> None:
        self.count = 0
        self.size_bytes = 0
        self.claimed_bytes = 0  # of those here that somebody needs
        self.considered = 0  # how often one may have become evictable
        self._rooms: dict[NamespaceId, dict[Key, Shard]] = {}
        self._children: dict[NamespaceId, dict[Key, dict[Key, None]]] = {}
        self._queues: dict[Pool, list[_Candidate]] = {}
        self._candidates = 0  # in all queues, with those of shards that are gone
        self._sequence = 0
        self._use = 0
        # How many sequences, groups, states and loans need a key, whether it is here or not.
        self._claims: dict[tuple[NamespaceId, Key], int] = {}

    def room(self, namespace: NamespaceId) -> dict[Key, Shard]:
        """The shards of one namespace; read only."""
        return self._rooms.get(namespace, {})

    def get(self, namespace: NamespaceId, key: Key) -> Shard | None:
        return self.room(namespace).get(key)

    def __iter__(self) -> Iterator[Shard]:
        for room in self._rooms.values():
            yield from room.values()

    def next_use(self) -> int:
        """A stamp for `Shard.last_used`, greater than all before."""
        self._use += 1
        return self._use

    def add(self, shard: Shard) -> None:
        room = self._rooms.setdefault(shard.namespace, {})
        assert shard.key not in room, f"{shard.key.hex()} is held already"
        room[shard.key] = shard
        self.count += 1
        self.size_bytes += shard.size_bytes
        if self.claimed(shard):
            self.claimed_bytes += shard.size_bytes
        shard.last_used = self.next_use()
        if shard.parent is not None and self._continues(shard.parent, shard.key, shard.namespace):
            shard.parent = None  # a chain that bites its tail would have no leaf to evict
        if shard.parent is not None:
            siblings = self._children.setdefault(shard.namespace, {})
            siblings.setdefault(shard.parent, {})[shard.key] = None
        self.consider(shard)

    def remove(self, shard: Shard) -> None:
        """Out of the index; its extent is the caller's to free."""
        room = self._rooms[shard.namespace]
        del room[shard.key]
        shard.present = False
        self.count -= 1
        self.size_bytes -= shard.size_bytes
        if self.claimed(shard):
            self.claimed_bytes -= shard.size_bytes
        if not room:
            del self._rooms[shard.namespace]
        if shard.parent is None:
            return
        families = self._children[shard.namespace]
        del families[shard.parent][shard.key]
        if families[shard.parent]:
            return
        del families[shard.parent]
        if not families:
            del self._children[shard.namespace]
        parent = self.get(shard.namespace, shard.parent)
        if parent is not None:
            self.consider(parent)

    def claim(self, namespace: NamespaceId, key: Key) -> None:
        """Somebody needs this shard: it is not evicted, and outlives its time to live.

        It need not be here yet. Each claim ends by one `unclaim`.
        """
        count = self._claims.get((namespace, key), 0)
        self._claims[namespace, key] = count + 1
        if not count and (shard := self.get(namespace, key)) is not None:
            self.claimed_bytes += shard.size_bytes

    def unclaim(self, namespace: NamespaceId, key: Key) -> None:
        count = self._claims.pop((namespace, key)) - 1
        if count:
            self._claims[namespace, key] = count
            return
        shard = self.get(namespace, key)
        if shard is not None:
            self.claimed_bytes -= shard.size_bytes
            self.consider(shard)

    def claims(self, namespace: NamespaceId, key: Key) -> int:
        """How many need this key."""
        return self._claims.get((namespace, key), 0)

    @property
    def any_claims(self) -> bool:
        return bool(self._claims)

    def claimed(self, shard: Shard) -> bool:
        return (shard.namespace, shard.key) in self._claims

    def evictable(self, shard: Shard) -> bool:
        """Nothing needs it, and nothing that is here continues it."""
        return (
            shard.present
            and not shard.pinned
            and shard.extent.holders == 0
            and not self.claimed(shard)
            and shard.key not in self._children.get(shard.namespace, {})
        )

    def consider(self, shard: Shard) -> None:
        """To be called whenever a shard may have become evictable."""
        self.considered += 1
        if shard.extent.holders and shard.present:
            shard.extent.then = partial(self.consider, shard)
        if shard.queued or not self.evictable(shard):
            return
        shard.queued = True
        self._sequence += 1
        candidate = (shard.last_used, self._sequence, shard)
        heapq.heappush(self._queues.setdefault(shard.pool, []), candidate)
        self._candidates += 1
        if self._candidates > 2 * self.count + SWEEP_ENTRIES:
            self._sweep()

    def _sweep(self) -> None:
        """Forgets shards that are gone: where there is room, no eviction would come by."""
        for pool, queue in list(self._queues.items()):
            queue[:] = [candidate for candidate in queue if candidate[2].present]
            heapq.heapify(queue)
            if not queue:
                del self._queues[pool]
        self._candidates = sum(map(len, self._queues.values()))

    def coldest(self, pool: Pool) -> Shard | None:
        """The evictable shard of the pool that was not used for longest; it stays queued."""
        queue = self._queues.get(pool, [])
        while queue:
            last_used, _, shard = queue[0]
            if last_used == shard.last_used and self.evictable(shard):
                return shard
            heapq.heappop(queue)
            self._candidates -= 1
            shard.queued = False
            self.consider(shard)
        self._queues.pop(pool, None)
        return None

    def pools(self) -> list[Pool]:
        """Those that may have something to evict."""
        return list(self._queues)

    def descendants(self, shards: Iterable[Shard]) -> list[Shard]:
        """All other present shards that continue any of these, once each, deepest last."""
        frontier = list(shards)
        seen = set(frontier)
        found: list[Shard] = []
        while frontier:
            frontier = [c for s in frontier for c in self._continuations(s) if c not in seen]
            seen.update(frontier)
            found += frontier
        return found

    def _continuations(self, shard: Shard) -> list[Shard]:
        room = self.room(shard.namespace)
        families = self._children.get(shard.namespace, {})
        return [room[key] for key in families.get(shard.key, ())]

    def _continues(self, key: Key, ancestor: Key, namespace: NamespaceId) -> bool:
        """Whether `key` is `ancestor` or continues it."""
        if key == ancestor:
            return True
        if ancestor not in self._children.get(namespace, {}):
            return False
        link: Key | None = key
        room = self.room(namespace)
        while link is not None and link != ancestor:
            shard = room.get(link)
            link = shard.parent if shard else None
        return link == ancestor

    def check(self) -> None:
        """Asserts that index, chains and heap agree."""
        assert self.count == sum(len(room) for room in self._rooms.values())
        assert self.size_bytes == sum(shard.size_bytes for shard in self)
        assert self.claimed_bytes == sum(s.size_bytes for s in self if self.claimed(s))
        for namespace, families in self._children.items():
            for parent, children in families.items():
                assert children, f"{parent.hex()} has an empty family"
                for key in children:
                    child = self.get(namespace, key)
                    assert child is not None
                    assert child.parent == parent
        assert self._candidates == sum(map(len, self._queues.values()))
        queued = {id(shard) for queue in self._queues.values() for _, _, shard in queue}
        for shard in self:
            assert shard.present
            assert shard.queued == (id(shard) in queued)
            assert shard.queued or not self.evictable(shard), f"{shard.key.hex()} is forgotten"
