"""Which nodes hold which shards: (namespace, key) -> place, where a place is a set of replicas.

Built for millions of keys: a key costs one dict entry whose value is a shared small
integer, nothing that the garbage collector follows. Replacing or losing a whole
node's inventory rewrites the places, not the keys; keys that are left without
replicas are swept away later, a slice at a time.

The caller says what a node holds and decides whom to believe; this only keeps books.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvfabric.errors import Broken
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId, Tier

# A namespace's keys are spread over as many dicts, so that none is ever resized or
# swept for longer than a few milliseconds.
BUCKETS = 64
SWEEP_KEYS = 65_536
_NOWHERE = 0
_HASH_MASK = 2**64 - 1


class Replica(NamedTuple):
    """One copy: on which node, in which tier."""

    node: NodeId
    tier: Tier


Place = tuple[Replica, ...]
"""The replicas of a key, best first: fastest tier, then the node's name."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a node holds, in brief: replicas, and the sum modulo 2^64 of their keys' heads.

    A head is a key's first 8 bytes, little-endian. A key counts once for every
    namespace and tier that holds it.
    """

    count: int = 0
    hash: int = 0

    def plus(self, keys: bytes) -> Inventory:
        """With these keys (32 bytes each) too."""
        count = len(keys) // DIGEST_BYTES
        return Inventory(self.count + count, (self.hash + _heads(keys)) & _HASH_MASK)

    def minus(self, keys: bytes) -> Inventory:
        """Without these keys (32 bytes each)."""
        count = len(keys) // DIGEST_BYTES
        return Inventory(self.count - count, (self.hash - _heads(keys)) & _HASH_MASK)


class Located(NamedTuple):
    """Answer i tells of key i: an index into `places`, or their number for none."""

    indices: list[int]
    places: list[Place]


class Cursor(NamedTuple):
    """Where a walk over all keys goes on."""

    namespace: NamespaceId
    bucket: int
    offset: int = 0  # keys of the bucket that were looked at


class Lot(NamedTuple):
    """Keys of one namespace that lie at one place."""

    namespace: NamespaceId
    place: Place
    keys: list[Key]


@dataclass(slots=True)
class _Holder:
    """One tier of one node, under one report: what places are made of.

    `plus` and `minus` remember from which place to which a key moves when this
    holder takes it or lets it go.
    """

    replica: Replica
    shown: bool
    count: int = 0
    hash: int = 0
    plus: dict[int, int] = field(default_factory=dict)
    minus: dict[int, int] = field(default_factory=dict)


_Holders = tuple[int, ...]  # ids of holders, ascending


class Directory:
    """See the module. Not thread-safe: it belongs to the core that owns it."""

    def __init__(self) -> None:
        self._rooms: dict[NamespaceId, list[dict[bytes, int]]] = {}
        self._holders: dict[int, _Holder] = {}
        self._current: dict[NodeId, dict[Tier, int]] = {}
        self._drafts: dict[NodeId, dict[Tier, int]] = {}
        # Several place ids may mean the same holders after one of them is gone;
        # `_ids` has the one that new keys get, the sweep moves the others over.
        self._places: dict[int, _Holders] = {_NOWHERE: ()}
        self._ids: dict[_Holders, int] = {(): _NOWHERE}
        self._counts: dict[int, int] = {_NOWHERE: 0}  # keys per place id; nowhere stays 0
        self._shown: dict[int, Place] = {}
        self._last_id = 0
        self._unswept: dict[tuple[NamespaceId, int], None] = {}

    # What nodes hold

    def add(
        self, node: NodeId, namespace: NamespaceId, tier: Tier, keys: bytes, *, draft: bool = False
    ) -> int:
        """`node` holds `keys` (32 bytes each) in `tier`. Returns how many it did not before.

        With `draft` they join the node's draft: unseen until `publish`.
        """
        holder = self._holder_id(node, tier, self._drafts if draft else self._current, not draft)
        room = self._rooms.get(namespace)
        if room is None:
            room = self._rooms[namespace] = [{} for _ in range(BUCKETS)]
        changed, heads = self._shift(room, keys, holder, adding=True)
        self._holders[holder].count += changed
        self._holders[holder].hash += heads
        return changed

    def remove(
        self, node: NodeId, namespace: NamespaceId, tier: Tier, keys: bytes, *, draft: bool = False
    ) -> int:
        """`node` no longer holds `keys` in `tier`. Returns how many it did before."""
        room = self._rooms.get(namespace)
        holder = (self._drafts if draft else self._current).get(node, {}).get(tier)
        if room is None or holder is None:
            return 0
        changed, heads = self._shift(room, keys, holder, adding=False)
        self._holders[holder].count -= changed
        self._holders[holder].hash -= heads
        if changed and not any(room):
            self._drop_room(namespace)
        return changed

    def publish(self, node: NodeId) -> None:
        """The node's draft replaces what it held, at once and as a whole."""
        old = self._current.pop(node, {})
        self._current[node] = self._drafts.pop(node, {})
        for holder in self._current[node].values():
            self._holders[holder].shown = True
        self._shown.clear()
        self._forget(old.values())

    def discard_draft(self, node: NodeId) -> None:
        """As if the node's draft had never been. May be repeated."""
        self._forget(self._drafts.pop(node, {}).values())

    def drop(self, node: NodeId) -> int:
        """The node holds nothing any more. Returns the replicas that went."""
        gone = self.inventory(node).count
        self._forget(self._current.pop(node, {}).values())
        self.discard_draft(node)
        return gone

    def inventory(self, node: NodeId, *, draft: bool = False) -> Inventory:
        """What the node, or its draft, holds."""
        ids = (self._drafts if draft else self._current).get(node, {}).values()
        holders = [self._holders[each] for each in ids]
        return Inventory(
            sum(holder.count for holder in holders),
            sum(holder.hash for holder in holders) & _HASH_MASK,
        )

    def sweep(self, limit_keys: int = SWEEP_KEYS) -> bool:
        """One slice of tidying after nodes or reports went. Returns whether more is left.

        Looks at `limit_keys` keys or one bucket, whichever is more.
        """
        if not self._unswept:
            return False
        targets = {each: self._ids[holders] for each, holders in self._places.items()}
        stale = {each: target for each, target in targets.items() if target != each}
        while self._unswept and limit_keys > 0:
            namespace, number = next(iter(self._unswept))
            del self._unswept[namespace, number]
            bucket = self._rooms[namespace][number]
            limit_keys -= len(bucket)
            self._tidy(bucket, stale)
        if not self._unswept:
            self._tidy_tables()
        return bool(self._unswept)

    # Where keys lie

    def locate(self, namespace: NamespaceId, keys: Sequence[Key], *, prefix: bool) -> Located:
        """Where each of `keys` lies; with `prefix` the answer ends before the first miss."""
        room = self._rooms.get(namespace)
        if room is None:
            return Located([] if prefix else [0] * len(keys), [])
        ids: list[int] = []
        places: dict[int, Place] = {}
        for key in keys:
            place = room[key[0] % BUCKETS].get(key, _NOWHERE)
            if place not in places:
                replicas = self._replicas(place)
                if not replicas:
                    place = _NOWHERE
                    if prefix:
                        break
                else:
                    places[place] = replicas
            ids.append(place)
        index = {place: number for number, place in enumerate(places)}
        none = len(index)
        return Located([index.get(place, none) for place in ids], list(places.values()))

    def find(
        self, prefix: bytes, namespace: NamespaceId | None, limit: int
    ) -> list[tuple[NamespaceId, Key, Place]]:
        """Up to `limit` keys that start with `prefix` (at least one byte) and have replicas.

        In `namespace`, or in any. Looks through one bucket of each: for people, not
        for the way to a token.
        """
        found: list[tuple[NamespaceId, Key, Place]] = []
        for room in sorted(self._rooms) if namespace is None else (namespace,):
            buckets = self._rooms.get(room)
            bucket = buckets[prefix[0] % BUCKETS] if buckets else {}
            for key, place in bucket.items():
                if key.startswith(prefix) and (replicas := self._replicas(place)):
                    found.append((room, Key(key), replicas))
                    if len(found) == limit:
                        return found
        return found

    def count(self, wanted: Callable[[Place], bool]) -> int:
        """How many keys lie at places that are `wanted`. Asks once per place, not per key."""
        return sum(
            count
            for place, count in self._counts.items()
            if count and (replicas := self._replicas(place)) and wanted(replicas)
        )

    def pick(
        self,
        wanted: Callable[[Place], bool],
        after: Cursor | None = None,
        limit_keys: int = SWEEP_KEYS,
        *,
        namespace: NamespaceId | None = None,
    ) -> tuple[list[Lot], Cursor | None]:
        """Keys at places that are `wanted`, in `namespace` or in all; one slice at a time.

        Returns what was found and where to go on: pass it as `after`, until it is None.
        Looks at no more than `limit_keys` keys, and asks once per place. Nothing is kept
        between two calls: of keys that come or go meanwhile, and of those behind them, some
        may be missed. Who needs all walks until a whole walk finds none.
        """
        places = {
            place: replicas
            for place in self._places
            if self._counts[place] and (replicas := self._replicas(place)) and wanted(replicas)
        }
        found: dict[tuple[NamespaceId, int], list[Key]] = {}
        at = self._next_bucket(after or Cursor(namespace or NamespaceId(b""), 0), namespace)
        while at is not None and places and limit_keys > 0:
            bucket = self._rooms[at.namespace][at.bucket]
            end = min(len(bucket), at.offset + limit_keys)
            limit_keys -= max(1, end - at.offset)
            for key, place in itertools.islice(bucket.items(), at.offset, end):
                if place in places:
                    found.setdefault((at.namespace, place), []).append(Key(key))
            if end < len(bucket):
                at = at._replace(offset=end)
            else:
                at = self._next_bucket(Cursor(at.namespace, at.bucket + 1), namespace)
        lots = [Lot(room, places[place], keys) for (room, place), keys in found.items()]
        return lots, at if places else None

    def _next_bucket(self, at: Cursor, only: NamespaceId | None) -> Cursor | None:
        """The first bucket that is there at `at` or behind it; in namespace `only`, if given."""
        if at.bucket < BUCKETS and at.namespace in self._rooms:
            return at
        if only is not None:
            return Cursor(only, 0) if at.namespace < only and only in self._rooms else None
        later = [room for room in self._rooms if room > at.namespace]
        return Cursor(min(later), 0) if later else None

    @property
    def keys(self) -> int:
        """Keys with at least one replica."""
        return sum(count for place, count in self._counts.items() if self._replicas(place))

    @property
    def replicas(self) -> int:
        """Replicas of all keys."""
        return sum(holder.count for holder in self._holders.values() if holder.shown)

    def check(self) -> None:
        """Broken unless every book equals what the keys themselves say. Reads every key."""
        counts = dict.fromkeys(self._places, 0)
        held = {holder: [0, 0] for holder in self._holders}
        for namespace, room in self._rooms.items():
            _require(len(room) == BUCKETS, f"{namespace.hex()} has {len(room)} buckets")
            for number, bucket in enumerate(room):
                for key, place in bucket.items():
                    _require(key[0] % BUCKETS == number, f"{key.hex()} lies in the wrong bucket")
                    _require(place in counts, f"{key.hex()} lies at a forgotten place")
                    counts[place] += 1
                    for each in self._places[place]:
                        held[each][0] += 1
                        held[each][1] += int.from_bytes(key[:8], "little")
        _require(counts == self._counts, "keys per place are miscounted")
        for number, holder in self._holders.items():
            _require(held[number] == [holder.count, holder.hash], f"{holder.replica} is miscounted")
        self._check_tables()

    # Books

    def _shift(
        self, room: list[dict[bytes, int]], keys: bytes, holder: int, *, adding: bool
    ) -> tuple[int, int]:
        """Moves keys to the place with (or without) `holder`. Returns (moved, sum of heads)."""
        steps = self._holders[holder].plus if adding else self._holders[holder].minus
        moved: dict[int, int] = {}  # keys by the place that they leave
        heads = 0
        for first in range(0, len(keys), DIGEST_BYTES):
            key = keys[first : first + DIGEST_BYTES]
            bucket = room[key[0] % BUCKETS]
            old = bucket.get(key, _NOWHERE)
            new = steps.get(old)
            if new is None:
                new = steps[old] = self._neighbour(old, holder, adding=adding)
            if new == old:
                continue
            if new == _NOWHERE:
                del bucket[key]
            else:
                bucket[key] = new
            moved[old] = moved.get(old, 0) + 1
            heads += int.from_bytes(key[:8], "little")
        for old, count in moved.items():
            self._count(old, -count)
            self._count(steps[old], count)
        return sum(moved.values()), heads

    def _neighbour(self, place: int, holder: int, *, adding: bool) -> int:
        """The id of `place` with or without `holder`; `place` itself where nothing changes."""
        holders = self._places[place]
        if (holder in holders) == adding:
            return place
        if adding:
            return self._place_id(tuple(sorted((*holders, holder))))
        return self._place_id(tuple(each for each in holders if each != holder))

    def _place_id(self, holders: _Holders) -> int:
        place = self._ids.get(holders)
        if place is None:
            self._last_id += 1
            place = self._ids[holders] = self._last_id
            self._places[place] = holders
            self._counts[place] = 0
        return place

    def _holder_id(
        self, node: NodeId, tier: Tier, books: dict[NodeId, dict[Tier, int]], shown: bool
    ) -> int:
        tiers = books.setdefault(node, {})
        if tier not in tiers:
            self._last_id += 1
            tiers[tier] = self._last_id
            self._holders[self._last_id] = _Holder(Replica(node, tier), shown)
        return tiers[tier]

    def _count(self, place: int, change: int) -> None:
        if place != _NOWHERE:
            self._counts[place] += change

    def _replicas(self, place: int) -> Place:
        replicas = self._shown.get(place)
        if replicas is None:
            holders = (self._holders[each] for each in self._places[place])
            shown = (holder.replica for holder in holders if holder.shown)
            replicas = tuple(sorted(shown, key=lambda each: (each.tier, each.node)))
            self._shown[place] = replicas
        return replicas

    # Tidying

    def _forget(self, holders: Iterable[int]) -> None:
        """These holders are gone: every place is rewritten without them."""
        gone = set(holders)
        if not gone:
            return
        for each in gone:
            del self._holders[each]
        for place, old in list(self._places.items()):
            if gone.isdisjoint(old):
                continue
            left = tuple(each for each in old if each not in gone)
            self._places[place] = left
            if self._ids.get(old) == place:
                del self._ids[old]
        self._tidy_tables()
        if any(self._ids[holders] != place for place, holders in self._places.items()):
            for namespace in self._rooms:
                self._unswept.update(((namespace, number), None) for number in range(BUCKETS))

    def _tidy(self, bucket: dict[bytes, int], stale: dict[int, int]) -> None:
        """Moves the bucket's keys from places that are not current to those that are."""
        for key, place in [item for item in bucket.items() if item[1] in stale]:
            target = stale[place]
            if target == _NOWHERE:
                del bucket[key]
            else:
                bucket[key] = target
            self._count(place, -1)
            self._count(target, 1)

    def _tidy_tables(self) -> None:
        """Drops places without keys and rooms without keys, and everything remembered of them."""
        for place, holders in list(self._places.items()):
            if place != _NOWHERE and self._counts[place] == 0:
                del self._places[place], self._counts[place]
                if self._ids.get(holders) == place:
                    del self._ids[holders]
        # Where no place with these holders is the one that new keys get, this becomes it.
        for place, holders in self._places.items():
            self._ids.setdefault(holders, place)
        for namespace in [each for each, room in self._rooms.items() if not any(room)]:
            self._drop_room(namespace)
        for holder in self._holders.values():
            holder.plus.clear()
            holder.minus.clear()
        self._shown.clear()

    def _drop_room(self, namespace: NamespaceId) -> None:
        del self._rooms[namespace]
        for number in range(BUCKETS):
            self._unswept.pop((namespace, number), None)

    def _check_tables(self) -> None:
        owners = [
            holder
            for books in (self._current, self._drafts)
            for tiers in books.values()
            for holder in tiers.values()
        ]
        _require(sorted(owners) == sorted(self._holders), "a holder has no node, or two")
        for tiers in self._current.values():
            _require(all(self._holders[each].shown for each in tiers.values()), "hidden replicas")
        for tiers in self._drafts.values():
            _require(not any(self._holders[each].shown for each in tiers.values()), "shown draft")
        for holders, place in self._ids.items():
            _require(self._places[place] == holders, f"place {place} has two meanings")
        for place, holders in self._places.items():
            _require(set(holders) <= set(self._holders), f"place {place} has a dead holder")
            _require(holders in self._ids, f"place {place} cannot be reached")
        stale = any(
            self._ids[holders] != place and self._counts[place]
            for place, holders in self._places.items()
        )
        _require(bool(self._unswept) or not stale, "stale places that no sweep will reach")


def _heads(keys: bytes) -> int:
    return sum(
        int.from_bytes(keys[first : first + 8], "little")
        for first in range(0, len(keys), DIGEST_BYTES)
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(f"the directory is wrong: {otherwise}; restart the manager and report this")
