"""Checksums of a shard: XXH3-64 (seed 0) of every layer part, in order.

A shard of `layers` equal layers is cut at every layer and, within a layer, every
256 KiB, so that a layer can be read and verified alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import xxhash

from kvfabric.errors import Refused

PART_BYTES = 256 * 1024

checksum = xxhash.xxh3_64_intdigest
"""Of one part, as an unsigned 64-bit integer. Releases the GIL on large parts."""


@lru_cache(maxsize=1024)
def parts(size_bytes: int, layers: int) -> tuple[tuple[int, int], ...]:
    """(start, end) of every part of a shard. Refused where layers do not divide its size."""
    layers = layers or 1
    if size_bytes <= 0 or size_bytes % layers:
        raise Refused(f"a shard of {size_bytes} bytes cannot have {layers} equal layers")
    layer_bytes = size_bytes // layers
    return tuple(
        (first, min(first + PART_BYTES, layer + layer_bytes))
        for layer in range(0, size_bytes, layer_bytes)
        for first in range(layer, layer + layer_bytes, PART_BYTES)
    )


def checksums(shard: memoryview, layers: int = 1) -> list[int]:
    """One checksum per part of `shard` (contiguous bytes)."""
    return [checksum(shard[start:end]) for start, end in parts(len(shard), layers)]


def matches(shard: memoryview, layers: int, expected: Sequence[int]) -> bool:
    """Whether every part of `shard` has its expected checksum."""
    return checksums(shard, layers) == list(expected)
