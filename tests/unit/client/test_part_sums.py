"""Checksums taken while the bytes pass are those of the whole shard."""

from __future__ import annotations

import os

import pytest

from kvfabric import checksums
from kvfabric_client.buffers import PartSums, Pieces

KIB = 1 << 10


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("step_bytes", [1, 100 * KIB, 256 * KIB, 1500 * KIB])
def test_parts_are_hashed_once_whichever_way_the_bytes_come(layers: int, step_bytes: int) -> None:
    raw = os.urandom(900 * KIB)
    halves = [memoryview(raw)[: 333 * KIB], memoryview(raw)[333 * KIB :]]
    passed = PartSums(Pieces(halves), layers)
    for end in range(step_bytes, len(raw), max(step_bytes, 10 * KIB)):
        passed.reach(end)
    passed.reach(len(raw))
    assert passed.sums == checksums.checksums(memoryview(raw), layers)


def test_a_part_is_not_hashed_before_all_of_it_has_passed() -> None:
    passed = PartSums(Pieces(bytes(600 * KIB)), 1)
    passed.reach(256 * KIB - 1)
    assert passed.sums == []
    passed.reach(512 * KIB)
    assert len(passed.sums) == 2
