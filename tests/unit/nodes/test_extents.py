"""The allocator of integers: nothing leaks, nothing overlaps, tenants never share a segment."""

from __future__ import annotations

import itertools
import random

import pytest

from kvfabric_nodes.store.extents import Extent, Extents, slot_bytes

SEGMENT_BYTES = 64 << 10


def _overlaps(extents: list[Extent]) -> bool:
    spans = sorted((e.segment, e.offset, e.offset + e.size_bytes) for e in extents)
    return any(a[0] == b[0] and a[2] > b[1] for a, b in itertools.pairwise(spans))


def test_a_slot_is_a_shard_rounded_up_to_a_cache_line_not_to_a_power_of_two() -> None:
    assert [slot_bytes(n) for n in (1, 64, 65, 1000, 100_000)] == [64, 64, 128, 1024, 100_032]


def test_a_hundred_thousand_allocations_and_frees_leak_nothing() -> None:
    chance = random.Random(20261123)
    extents = Extents(8, SEGMENT_BYTES)
    sizes = [100, 1000, 5000, 20_000, SEGMENT_BYTES]
    used: list[tuple[str, Extent]] = []
    generations: set[int] = set()
    for step in range(100_000):
        if used and chance.random() < 0.5:
            place = chance.randrange(len(used))
            used[place], used[-1] = used[-1], used[place]
            extents.free(used.pop()[1])
        else:
            tenant = chance.choice("ab")
            extent = extents.allocate(tenant, chance.choice(sizes))
            if extent is None:
                retired = extents.retire_empty(tenant)
                if retired is not None:
                    extents.replace(retired.id)
                continue
            assert extents.segments[extent.segment].tenant == tenant
            assert extent.generation not in generations
            generations.add(extent.generation)
            used.append((tenant, extent))
        if step % 5000 == 0:
            extents.check()
            assert not _overlaps([extent for _, extent in used])
    for _, extent in used:
        extents.free(extent)
    extents.check()
    assert not any(segment.used for segment in extents.segments.values())
    # Every byte can be had again, by one tenant, in one size.
    for segment in list(extents.segments.values()):
        if segment.tenant == "b":
            retired = extents.retire_empty("a")
            assert retired is not None
            extents.replace(retired.id)
    whole = [extents.allocate("a", SEGMENT_BYTES) for _ in range(8)]
    assert all(whole)
    assert extents.allocate("a", 64) is None


def test_a_retired_segment_counts_until_a_fresh_one_with_a_new_id_takes_its_place() -> None:
    extents = Extents(1, SEGMENT_BYTES)
    extent = extents.allocate("a", 64)
    assert extent is not None
    assert extents.retire_empty("b") is None, "it is in use"
    extents.free(extent)
    assert extents.retire_empty("a") is None, "it is the tenant's own"

    retired = extents.retire_empty("b")
    assert retired is not None
    assert extents.allocate("b", 64) is None
    extents.check()

    fresh = extents.replace(retired.id)
    assert fresh.id != retired.id
    assert extents.allocate("b", 64) is not None
    extents.check()


def test_a_held_extent_cannot_be_freed() -> None:
    extents = Extents(1, SEGMENT_BYTES)
    extent = extents.allocate("a", 64)
    assert extent is not None
    extent.holders = 1
    with pytest.raises(AssertionError, match="still held"):
        extents.free(extent)


def test_an_extent_cannot_be_freed_twice() -> None:
    extents = Extents(1, SEGMENT_BYTES)
    extent = extents.allocate("a", 64)
    assert extent is not None
    extents.free(extent)
    with pytest.raises(KeyError):
        extents.free(extent)


def test_the_tails_of_slabs_are_wasted_bytes() -> None:
    extents = Extents(2, SEGMENT_BYTES)
    assert extents.allocate("a", 3 * SEGMENT_BYTES // 4) is not None
    assert extents.wasted_bytes() == SEGMENT_BYTES // 4


def test_check_finds_a_slot_that_is_lost() -> None:
    extents = Extents(1, SEGMENT_BYTES)
    assert extents.allocate("a", 64) is not None
    next(iter(extents.segments.values())).free_offsets.pop()
    with pytest.raises(AssertionError):
        extents.check()
