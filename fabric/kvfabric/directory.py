"""Which nodes hold which shards: (namespace, key) -> place, where a place is a set of replicas.

Built for millions of keys: a key costs one dict entry whose value is a shared small
integer, nothing that the garbage collector follows. Replacing or losing a whole
node's inventory rewrites the places, not the keys; keys that are left without
replicas are swept away later, a slice at a time. See `places` for the numbers' meaning.

The caller says what a node holds and decides whom to believe; this only keeps books.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvfabric.errors import Broken
from kvfabric.places import NOWHERE, Place, Places, Replica
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId, Tier

__all__ = ["BUCKETS", "Cursor", "Directory", "Inventory", "Located", "Lot", "Place", "Replica"]

# A namespace's keys are spread over as many dicts, so that none is ever resized or swept for
# longer than a few milliseconds. They get unequal shares, or all would be resized at once.
BUCKETS = 128
SWEEP_KEYS = 65_536
_TIDY_KEYS = 16_384  # moved at once; to look at a key is cheaper by far
_FEW_PLACES = 4096  # so many are judged beforehand, where keys at some of them are wanted
_HEADS = 2**64
_KEYS = struct.Struct(f"{DIGEST_BYTES}s")


def _bucket_table() -> bytes:
    """The bucket of a key by its first two bytes, big-endian: the last gets twice the first's."""
    shares = 2.0 ** (np.arange(BUCKETS) / BUCKETS)
    ends = np.cumsum(shares) / shares.sum() * 65_536
    numbers = np.searchsorted(ends, np.arange(65_536), side="right").clip(0, BUCKETS - 1)
    return numbers.astype(np.uint8).tobytes()


_BUCKET = _bucket_table()
_BUCKETS = np.frombuffer(_BUCKET, np.uint8)


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
        return Inventory(self.count + count, (self.hash + _heads(keys)) % _HEADS)

    def minus(self, keys: bytes) -> Inventory:
        """Without these keys (32 bytes each)."""
        count = len(keys) // DIGEST_BYTES
        return Inventory(self.count - count, (self.hash - _heads(keys)) % _HEADS)


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


class Directory:
    """See the module. Not thread-safe: it belongs to the core that owns it."""

    def __init__(self) -> None:
        self._rooms: dict[NamespaceId, list[dict[bytes, int]]] = {}
        self._entries = 0  # keys in all rooms
        self._places = Places()
        self._current: dict[NodeId, dict[Tier, int]] = {}
        self._drafts: dict[NodeId, dict[Tier, int]] = {}
        self._unswept: dict[NamespaceId, int] = {}  # the first bucket that may be stale

    # What nodes hold

    def add(
        self, node: NodeId, namespace: NamespaceId, tier: Tier, keys: bytes, *, draft: bool = False
    ) -> int:
        """`node` holds `keys` (32 bytes each) in `tier`. Returns how many it did not before.

        With `draft` they join the node's draft: unseen until `publish`.
        """
        if not keys:
            return 0
        holder = self._holder_id(node, tier, self._drafts if draft else self._current, not draft)
        room = self._rooms.get(namespace)
        if room is None:
            room = self._rooms[namespace] = [{} for _ in range(BUCKETS)]
        return self._shift(room, keys, holder, adding=True)

    def remove(
        self, node: NodeId, namespace: NamespaceId, tier: Tier, keys: bytes, *, draft: bool = False
    ) -> int:
        """`node` no longer holds `keys` in `tier`. Returns how many it did before."""
        room = self._rooms.get(namespace)
        holder = (self._drafts if draft else self._current).get(node, {}).get(tier)
        if room is None or holder is None:
            return 0
        changed = self._shift(room, keys, holder, adding=False)
        if changed and not any(room):
            self._drop_room(namespace)
        return changed

    def publish(self, node: NodeId) -> None:
        """The node's draft replaces what it held, at once and as a whole."""
        old = self._current.pop(node, {})
        self._current[node] = self._drafts.pop(node, {})
        for holder in self._current[node].values():
            self._places.show(holder)
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
        holders = [self._places.holders[each] for each in ids]
        return Inventory(
            sum(holder.count for holder in holders),
            sum(holder.hash for holder in holders) % _HEADS,
        )

    def sweep(self, limit_keys: int = SWEEP_KEYS) -> bool:
        """One slice of tidying after nodes or reports went. Returns whether more is left.

        Looks at `limit_keys` keys or one bucket, whichever is more; of a bucket where many
        keys have to be moved, a part.
        """
        while self._unswept and limit_keys > 0:
            namespace, number = next(iter(self._unswept.items()))
            bucket = self._rooms[namespace][number]
            limit_keys -= max(1, len(bucket))
            if self._tidy(bucket):
                number += 1
                self._unswept[namespace] = number
            else:
                limit_keys = 0
            if not self._places.stale:
                self._end_sweep(list(self._unswept))
            elif number == BUCKETS:
                self._end_sweep([namespace])
        return bool(self._unswept)

    # Where keys lie

    def locate(self, namespace: NamespaceId, keys: Sequence[Key], *, prefix: bool) -> Located:
        """Where each of `keys` lies; with `prefix` the answer ends before the first miss."""
        room = self._rooms.get(namespace)
        if room is None:
            return Located([] if prefix else [0] * len(keys), [])
        if prefix:
            found = (room[_BUCKET[key[0] << 8 | key[1]]].get(key, NOWHERE) for key in keys)
            ids = list(itertools.takewhile(self._places.replicas, found))
        else:
            ids = [room[_BUCKET[key[0] << 8 | key[1]]].get(key, NOWHERE) for key in keys]
        places = {place: self._places.replicas(place) for place in dict.fromkeys(ids)}
        held = [place for place, replicas in places.items() if replicas]
        index = {place: number for number, place in enumerate(held)}
        none = len(held)
        return Located([index.get(place, none) for place in ids], [places[place] for place in held])

    def find(
        self, prefix: bytes, namespace: NamespaceId | None, limit: int
    ) -> list[tuple[NamespaceId, Key, Place]]:
        """Up to `limit` keys that start with `prefix` (at least one byte) and have replicas.

        In `namespace`, or in any. Looks through a few buckets of each: for people, not
        for the way to a token.
        """
        found: list[tuple[NamespaceId, Key, Place]] = []
        low, high = prefix[:2].ljust(2, b"\0"), prefix[:2].ljust(2, b"\xff")
        numbers = range(_BUCKET[int.from_bytes(low)], _BUCKET[int.from_bytes(high)] + 1)
        for room in sorted(self._rooms) if namespace is None else (namespace,):
            for number in numbers if room in self._rooms else ():
                for key, place in self._rooms[room][number].items():
                    if key.startswith(prefix) and (replicas := self._places.replicas(place)):
                        found.append((room, Key(key), replicas))
                        if len(found) == limit:
                            return found
        return found

    def count(self, wanted: Callable[[Place], bool]) -> int:
        """How many keys lie at places that are `wanted`. Asks once per place, not per key."""
        return sum(
            count
            for place, count in self._places.counts()
            if (replicas := self._places.replicas(place)) and wanted(replicas)
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
        places: dict[int, Place] = {}
        judged: set[int] = set()

        def judge(numbers: Iterable[int]) -> None:
            fresh = judged.symmetric_difference(judged.union(numbers))
            judged.update(fresh)
            for number in fresh:
                replicas = self._places.replicas(number)
                if replicas and wanted(replicas):
                    places[number] = replicas

        few = len(self._places) <= _FEW_PLACES
        if few:
            judge(self._places)
        found: dict[tuple[NamespaceId, int], list[Key]] = {}
        at = self._next_bucket(after or Cursor(namespace or NamespaceId(b""), 0), namespace)
        while at is not None and limit_keys > 0 and (places or not few):
            bucket = self._rooms[at.namespace][at.bucket]
            end = min(len(bucket), at.offset + limit_keys)
            limit_keys -= max(1, end - at.offset)
            if not few:
                judge(itertools.islice(bucket.values(), at.offset, end))
            for key, place in itertools.islice(bucket.items(), at.offset, end):
                if place in places:
                    found.setdefault((at.namespace, place), []).append(Key(key))
            if end < len(bucket):
                at = at._replace(offset=end)
            else:
                at = self._next_bucket(Cursor(at.namespace, at.bucket + 1), namespace)
        lots = [Lot(room, places[place], keys) for (room, place), keys in found.items()]
        return lots, at if places or not few else None

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
        return self._entries - self._places.hidden

    @property
    def replicas(self) -> int:
        """Replicas of all keys."""
        return sum(holder.count for holder in self._places.holders.values() if holder.shown)

    def check(self) -> None:
        """Broken unless every book equals what the keys themselves say. Reads every key."""
        counts: dict[int, int] = {}
        heads: dict[int, int] = {}
        for namespace, room in self._rooms.items():
            _require(len(room) == BUCKETS, f"{namespace.hex()} has {len(room)} buckets")
            _require(
                any(room) or namespace in self._unswept, f"{namespace.hex()} is kept without keys"
            )
            first = self._unswept.get(namespace, BUCKETS)
            for number, bucket in enumerate(room):
                for key, place in bucket.items():
                    _require(_bucket_of(key) == number, f"{key.hex()} lies in the wrong bucket")
                    _require(
                        number >= first or place not in self._places.stale,
                        f"{key.hex()} lies at a stale place that no sweep will reach",
                    )
                    counts[place] = counts.get(place, 0) + 1
                    heads[place] = heads.get(place, 0) + int.from_bytes(key[:8], "little")
        _require(self._entries == sum(counts.values()), "keys are miscounted")
        _require(self._unswept.keys() <= self._rooms.keys(), "a room that is gone is to be swept")
        self._places.check(counts, heads)
        self._check_holders()

    # Books

    def _shift(
        self, room: list[dict[bytes, int]], keys: bytes, number: int, *, adding: bool
    ) -> int:
        """Moves keys to the place with (or without) a holder. Returns how many moved."""
        steps: dict[int, int] = {}
        moves: dict[int, int] = {}  # keys by the place that they leave
        unmoved: list[bytes] = []
        buckets = map(room.__getitem__, _bucket_numbers(keys))
        for (key,), bucket in zip(_KEYS.iter_unpack(keys), buckets, strict=True):
            old = bucket.get(key, NOWHERE)
            new = steps.get(old)
            if new is None:
                new = steps[old] = self._places.neighbour(old, number, adding=adding)
            if new == old:
                unmoved.append(key)
                continue
            if new == NOWHERE:
                del bucket[key]
            else:
                bucket[key] = new
            moves[old] = moves.get(old, 0) + 1
        self._entries += self._places.moved({(old, steps[old]): n for old, n in moves.items()})
        holder = self._places.holders[number]
        changed = len(keys) // DIGEST_BYTES - len(unmoved)
        heads = _heads(keys) - _heads(b"".join(unmoved))
        holder.count += changed if adding else -changed
        holder.hash = (holder.hash + (heads if adding else -heads)) % _HEADS
        return changed

    def _holder_id(
        self, node: NodeId, tier: Tier, books: dict[NodeId, dict[Tier, int]], shown: bool
    ) -> int:
        tiers = books.setdefault(node, {})
        if tier not in tiers:
            tiers[tier] = self._places.open(Replica(node, tier), shown=shown)
        return tiers[tier]

    # Tidying

    def _forget(self, holders: Iterable[int]) -> None:
        """These holders are gone: keys at places with them are tidied up later."""
        gone = list(holders)
        if not gone:
            return
        self._places.forget(gone)
        if self._places.stale:
            self._unswept = dict.fromkeys(self._rooms, 0)

    def _tidy(self, bucket: dict[bytes, int]) -> bool:
        """Moves keys of the bucket from stale places to current ones. Returns whether all."""
        stale = self._places.stale
        found = (key for key, place in bucket.items() if place in stale)
        keys = list(itertools.islice(found, _TIDY_KEYS))
        targets: dict[int, int] = {}
        moves: dict[tuple[int, int], int] = {}
        for key in keys:
            place = bucket[key]
            target = targets.get(place)
            if target is None:
                target = targets[place] = self._places.current(place)
            if target == place:
                continue
            if target == NOWHERE:
                del bucket[key]
            else:
                bucket[key] = target
            moves[place, target] = moves.get((place, target), 0) + 1
        self._entries += self._places.moved(moves)
        return len(keys) < _TIDY_KEYS

    def _end_sweep(self, namespaces: Iterable[NamespaceId]) -> None:
        for namespace in namespaces:
            del self._unswept[namespace]
            if not any(self._rooms[namespace]):
                self._drop_room(namespace)

    def _drop_room(self, namespace: NamespaceId) -> None:
        del self._rooms[namespace]
        self._unswept.pop(namespace, None)

    def _check_holders(self) -> None:
        holders = self._places.holders
        owners = [
            holder
            for books in (self._current, self._drafts)
            for tiers in books.values()
            for holder in tiers.values()
        ]
        _require(sorted(owners) == sorted(holders), "a holder has no node, or two")
        for tiers in self._current.values():
            _require(all(holders[each].shown for each in tiers.values()), "hidden replicas")
        for tiers in self._drafts.values():
            _require(not any(holders[each].shown for each in tiers.values()), "shown draft")


def _bucket_of(key: bytes) -> int:
    return _BUCKET[key[0] << 8 | key[1]]


def _bucket_numbers(keys: bytes) -> list[int]:
    heads = np.frombuffer(keys, ">u2")[:: DIGEST_BYTES // 2]
    numbers: list[int] = _BUCKETS[heads].tolist()
    return numbers


def _heads(keys: bytes) -> int:
    """The sum of the keys' first 8 bytes, little-endian, modulo 2^64."""
    return int(np.frombuffer(keys, "<u8")[:: DIGEST_BYTES // 8].sum(dtype=np.uint64))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(f"the directory is wrong: {otherwise}; restart the manager and report this")
