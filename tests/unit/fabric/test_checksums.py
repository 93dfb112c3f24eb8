"""A shard's parts and their checksums are those of proto/vectors.json."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric import checksums
from kvfabric.errors import Refused

_layers = st.integers(1, 40)
_layer_bytes = st.integers(1, 3 * checksums.PART_BYTES)


def _shard(size_bytes: int) -> memoryview:
    pattern = bytes(range(251))
    return memoryview((pattern * (size_bytes // 251 + 1))[:size_bytes])


def test_checksums_are_those_of_the_vectors(vectors: dict[str, Any]) -> None:
    for case in vectors["checksums"]["cases"]:
        sums = checksums.checksums(_shard(case["size_bytes"]), case["layers"])
        assert [f"{value:016x}" for value in sums] == case["checksums"]


@given(_layers, _layer_bytes)
def test_the_parts_tile_a_shard_and_none_crosses_a_layer(layers: int, layer_bytes: int) -> None:
    ranges = checksums.parts(layers * layer_bytes, layers)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == layers * layer_bytes
    assert all(end == start for (_, end), (start, _) in pairwise(ranges))
    for start, end in ranges:
        assert 0 < end - start <= checksums.PART_BYTES
        assert start // layer_bytes == (end - 1) // layer_bytes


@pytest.mark.parametrize(("size_bytes", "layers"), [(0, 1), (-8, 1), (7, 2), (8, 3)])
def test_a_size_that_the_layers_do_not_divide_is_refused(size_bytes: int, layers: int) -> None:
    with pytest.raises(Refused, match=f"shard of {size_bytes} bytes"):
        checksums.parts(size_bytes, layers)


def test_no_number_of_layers_means_one() -> None:
    assert checksums.parts(1000, 0) == checksums.parts(1000, 1)


@given(st.integers(0, 8 * 300_000 * 2 - 1))
def test_one_flipped_bit_is_seen(bit: int) -> None:
    shard = bytearray(_shard(600_000))
    sums = checksums.checksums(memoryview(shard), 2)
    assert checksums.matches(memoryview(shard), 2, sums)
    shard[bit // 8] ^= 1 << bit % 8
    assert not checksums.matches(memoryview(shard), 2, sums)


def test_a_missing_checksum_is_no_match() -> None:
    shard = _shard(600_000)
    sums = checksums.checksums(shard, 2)
    assert not checksums.matches(shard, 2, sums[:-1])
    assert not checksums.matches(shard, 2, [])
