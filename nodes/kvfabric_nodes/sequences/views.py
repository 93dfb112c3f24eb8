"""What lending and the manager want to know of open sequences."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized

from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.sequences.sequence import OpenSequence
from kvfabric_nodes.store.extents import Pool
from kvfabric_nodes.store.shards import Shard, Shards

REPORTED_SEQUENCES = 256  # with a heartbeat, at most

Sharers = Mapping[tuple[NamespaceId, Key], Sized]


def victims(
    sequences: Iterable[OpenSequence],
    sharers: Sharers,
    shards: Shards,
    pool: Pool | None,
    size_bytes: int,
    skip: Callable[[Shard], bool],
) -> list[Shard]:
    """Sealed blocks at home that could be lent to make room for so much: the longest sequence
    first, of each the oldest blocks first; the pool's own before others.

    Left out: what is leased or pinned, what others than sequences need, and what `skip` says.
    """
    longest = sorted(sequences, key=lambda s: (-s.length, s.id))
    found: dict[Shard, None] = {}
    elsewhere: dict[Shard, None] = {}
    taken = 0
    for shard in _at_home(longest, shards):
        if taken >= size_bytes:
            break
        free = not (shard.extent.holders or shard.pinned or shard in found or shard in elsewhere)
        name = (shard.namespace, shard.key)
        if not free or shards.claims(*name) > len(sharers[name]) or skip(shard):
            continue
        if pool is None or shard.pool == pool:
            found[shard] = None
            taken += shard.extent.size_bytes
        else:
            elsewhere[shard] = None
    for shard in elsewhere:
        if taken >= size_bytes:
            break
        found[shard] = None
        taken += shard.extent.size_bytes
    return list(found)


def _at_home(sequences: Iterable[OpenSequence], shards: Shards) -> Iterator[Shard]:
    for sequence in sequences:
        room, blocks = shards.room(sequence.namespace), sequence.blocks
        while sequence.lent_first < len(blocks) and blocks[sequence.lent_first].key not in room:
            sequence.lent_first += 1
        for index in range(sequence.lent_first, len(blocks)):
            shard = room.get(blocks[index].key)
            if shard is not None:
                yield shard


def columns(sequences: Iterable[OpenSequence]) -> control_pb2.Sequences:
    """The longest sequences, for a heartbeat. What is not here counts as lent."""
    longest = heapq.nsmallest(REPORTED_SEQUENCES, sequences, key=lambda s: (-s.length, s.id))
    sizes = [sequence.shape.size_bytes for sequence in longest]
    return control_pb2.Sequences(
        sequence=[sequence.id for sequence in longest],
        namespace_id=[sequence.namespace for sequence in longest],
        tokens=[sequence.length for sequence in longest],
        local_bytes=[
            (len(s.blocks) - s.away) * size for s, size in zip(longest, sizes, strict=True)
        ],
        remote_bytes=[s.away * size for s, size in zip(longest, sizes, strict=True)],
        block_bytes=sizes,
    )
