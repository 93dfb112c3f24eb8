"""Segments cut into extents: an allocator of integers only.

The arena is a number of equal segments. A segment belongs to one tenant at a time
and is cut into slots of one size at a time (a slab); the slots of equal size of a
tenant form a sub-pool. Slot sizes are shard sizes rounded up to a cache line, not
to a power of two. Bytes, files and policies are somebody else's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

SLOT_ALIGNMENT_BYTES = 64


def slot_bytes(size_bytes: int) -> int:
    """The slot that a shard of this size takes."""
    return -(-size_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES


@dataclass(slots=True, eq=False)
class Extent:
    """A slot in use. Its generation tells it from earlier uses of the same bytes."""

    segment: int
    offset: int
    size_bytes: int  # of the slot
    generation: int
    holders: int = 0  # leases, transfers and kernels of the node that may still touch the bytes
    then: Callable[[], None] | None = None  # what waits until nobody holds it

    def let_go(self) -> None:
        """One holder less."""
        self.holders -= 1
        if self.then is not None and not self.holders:
            then, self.then = self.then, None
            then()


@dataclass(slots=True, eq=False)
class Segment:
    """Equal slots of one tenant; `tenant` None: nobody's, and all zero."""

    id: int
    size_bytes: int
    tenant: str | None = None
    slot_bytes: int = 0
    free_offsets: list[int] = field(default_factory=list)
    used: dict[int, Extent] = field(default_factory=dict)  # by offset

    def cut(self, tenant: str, size_bytes: int) -> None:
        """Becomes a slab of `tenant` with slots of `size_bytes`; must be empty."""
        assert not self.used, f"segment {self.id} is in use"
        self.tenant = tenant
        self.slot_bytes = size_bytes
        slots = self.size_bytes // size_bytes
        self.free_offsets = [i * size_bytes for i in range(slots - 1, -1, -1)]


Pool = tuple[str, int]  # tenant, slot size


class Extents:
    """Allocates extents; every byte is in use, free in a slab, or in a nobody's segment.

    `segments` equal segments of `segment_bytes`. Segment ids are never used twice:
    when a segment leaves its tenant it is `retired`, and comes back under a new id
    through `add` once its old bytes are out of everybody's reach.
    """

    def __init__(
        self, segments: int, segment_bytes: int, first_segment: int = 1, first_generation: int = 1
    ) -> None:
        self.segment_bytes = segment_bytes
        self.segments: dict[int, Segment] = {}
        self.retired: dict[int, Segment] = {}
        self.freed = 0  # extents and segments, since the start
        self._count = segments
        self._next_segment = first_segment
        self._next_generation = first_generation
        self._pools: dict[Pool, dict[int, Segment]] = {}  # all slabs of a pool, by id
        self._open: dict[Pool, dict[int, Segment]] = {}  # those with free slots
        self._nobodys: dict[int, Segment] = {}
        for _ in range(segments):
            self.add()

    @property
    def capacity_bytes(self) -> int:
        return self._count * self.segment_bytes

    def add(self) -> Segment:
        """A fresh segment, zeroed and nobody's."""
        segment = Segment(self._next_segment, self.segment_bytes)
        self._next_segment += 1
        self.freed += 1
        self.segments[segment.id] = self._nobodys[segment.id] = segment
        return segment

    def allocate(self, tenant: str, size_bytes: int) -> Extent | None:
        """An extent for a shard of `size_bytes`, or None where no slab has room for it.

        Takes, in this order: a free slot of the sub-pool, an empty slab of the same
        tenant, a nobody's segment.
        """
        slot = slot_bytes(size_bytes)
        pool = (tenant, slot)
        available = self._open.get(pool)
        if not available:
            segment = self._empty_slab(tenant) or self._take_nobodys()
            if segment is None:
                return None
            segment.cut(tenant, slot)
            self._pools.setdefault(pool, {})[segment.id] = segment
            available = self._open.setdefault(pool, {})
            available[segment.id] = segment
        segment = next(iter(available.values()))
        offset = segment.free_offsets.pop()
        if not segment.free_offsets:
            del available[segment.id]
        extent = Extent(segment.id, offset, slot, self._next_generation)
        self._next_generation = (self._next_generation + 1) & 0xFFFFFFFF
        segment.used[offset] = extent
        return extent

    def free(self, extent: Extent) -> None:
        """Gives the extent's bytes back to its slab."""
        assert extent.holders == 0, f"{extent} is still held"
        self.freed += 1
        segment = self.segments[extent.segment]
        found = segment.used.pop(extent.offset)
        assert found is extent, f"{extent} is not the one in use there"
        segment.free_offsets.append(extent.offset)
        self._open.setdefault(self._pool(segment), {})[segment.id] = segment

    def retire_empty(self, tenant: str) -> Segment | None:
        """Takes an empty slab away from a tenant other than this one, if there is one.

        Its bytes count as retired until `add` brings a fresh segment in its place.
        """
        for segment in self.segments.values():
            if segment.tenant not in (None, tenant) and not segment.used:
                self._leave_pool(segment)
                del self.segments[segment.id]
                self.retired[segment.id] = segment
                return segment
        return None

    def replace(self, retired_id: int) -> Segment:
        """A fresh segment for a retired one whose bytes nobody can reach any more."""
        del self.retired[retired_id]
        return self.add()

    def restore(self, segment_id: int, pool: Pool, used: Mapping[int, int]) -> list[Extent]:
        """A slab of an earlier start under its old id, in the place of a nobody's segment.

        `used`: the generation by offset of each slot that is in use.
        """
        segment = self._instead_of_nobodys(segment_id)
        segment.cut(*pool)
        segment.free_offsets = [o for o in segment.free_offsets if o not in used]
        extents = [
            Extent(segment_id, offset, pool[1], generation) for offset, generation in used.items()
        ]
        segment.used = {extent.offset: extent for extent in extents}
        self.segments[segment_id] = segment
        self._pools.setdefault(pool, {})[segment_id] = segment
        if segment.free_offsets:
            self._open.setdefault(pool, {})[segment_id] = segment
        return extents

    def all_ids(self) -> list[int]:
        """Every segment that has memory, the retired ones included."""
        return [*self.segments, *self.retired]

    def restore_retired(self, segment_id: int) -> None:
        """A segment of an earlier start that holds nothing but may still be mapped."""
        self.retired[segment_id] = self._instead_of_nobodys(segment_id)

    def _instead_of_nobodys(self, segment_id: int) -> Segment:
        fresh = self._take_nobodys()
        assert fresh is not None, f"there is no place for segment {segment_id}"
        assert segment_id not in self.segments
        assert segment_id not in self.retired
        del self.segments[fresh.id]
        return Segment(segment_id, self.segment_bytes)

    def slabs(self, pool: Pool) -> Iterator[Segment]:
        yield from self._pools.get(pool, {}).values()

    def all_slabs(self) -> Iterator[Segment]:
        """Every slab that has a tenant."""
        for slabs in self._pools.values():
            yield from slabs.values()

    def wasted_bytes(self) -> int:
        """Tails of slabs that are too short for a slot."""
        return sum(s.size_bytes % s.slot_bytes for s in self.all_slabs())

    def check(self) -> None:
        """Asserts that the books are right to the byte."""
        assert len(self.segments) + len(self.retired) == self._count
        for segment in self.segments.values():
            if segment.tenant is None:
                assert segment.id in self._nobodys
                assert not segment.used
                continue
            assert segment.id not in self._nobodys
            assert self._pools[self._pool(segment)][segment.id] is segment
            slots = segment.size_bytes // segment.slot_bytes
            offsets = sorted([*segment.free_offsets, *segment.used])
            assert offsets == [i * segment.slot_bytes for i in range(slots)]
            is_open = segment.id in self._open.get(self._pool(segment), {})
            assert is_open == bool(segment.free_offsets)

    def _empty_slab(self, tenant: str) -> Segment | None:
        for (owner, _), slabs in self._open.items():
            if owner != tenant:
                continue
            for segment in slabs.values():
                if not segment.used:
                    self._leave_pool(segment)
                    return segment
        return None

    def _take_nobodys(self) -> Segment | None:
        if not self._nobodys:
            return None
        return self._nobodys.pop(next(iter(self._nobodys)))

    def _leave_pool(self, segment: Segment) -> None:
        pool = self._pool(segment)
        del self._pools[pool][segment.id]
        self._open[pool].pop(segment.id, None)
        for books in (self._pools, self._open):
            if not books[pool]:
                del books[pool]

    def _pool(self, segment: Segment) -> Pool:
        assert segment.tenant is not None
        return (segment.tenant, segment.slot_bytes)
