"""A sequence's blocks as its home node has them: leased, without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvfabric.types import Key
from kvfabric_client import shm
from kvfabric_client.answers import Leased
from kvfabric_client.block_reader import Reader
from kvfabric_client.blocks import Array, Bytes
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link
from kvfabric_client.outline import Piece, Sealed
from kvfabric_client.sequence_home import Home

VIEW_LEASE_S = 30.0


@dataclass(frozen=True, slots=True)
class ViewedBlock:
    """One sealed block, read-only. `data` is all of it, None where it is lost."""

    tokens: range
    key: Key
    data: Bytes | None
    kv: Array | None
    """`[layers, 2, heads, tokens, head dim]` of the tokens asked for; None: lost, or a packing
    of one's own."""


class SequenceView(Leased):
    """Iterate over it, or index it. Not to be touched after its end."""

    def __init__(self, link: Link, lease: int, blocks: list[ViewedBlock]) -> None:
        super().__init__(link, lease)
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> ViewedBlock:
        return self._blocks[index]

    def __iter__(self) -> Iterator[ViewedBlock]:
        return iter(self._blocks)

    def release(self) -> None:
        self._blocks = []
        super().release()


def view_of(
    home: Home,
    pieces: Sequence[Piece],
    blocks: Sequence[Sealed],
    lease_s: float,
    deadline: Deadline,
) -> SequenceView:
    """A view of these blocks; at most what one lease covers."""
    keys = [block.key for block in blocks]
    memory: list[Bytes | None] = [None] * len(keys)
    lease = 0
    link = home.link
    if keys and link.shares_memory and link.alive():
        held = shm.acquire(link, home.room.id, keys, lease_s, deadline, checked=False)
        lease = held.lease
        for index, place in held.found():
            if len(place) == home.shape.size_bytes:
                memory[index] = np.frombuffer(place.toreadonly(), dtype=np.uint8)
    try:
        missing = [index for index, found in enumerate(memory) if found is None]
        reader = Reader(home, range(home.shape.layers))
        numbers = [pieces[index].index for index in missing]
        copies = reader.fetch(numbers, [keys[index] for index in missing], deadline)
        for index, copy in zip(missing, copies, strict=True):
            memory[index] = copy
    except BaseException:
        if lease:
            link.release(lease)
        raise
    return SequenceView(
        link,
        lease,
        [
            ViewedBlock(range(piece.start, piece.end), block.key, found, _kv(home, found, piece))
            for piece, block, found in zip(pieces, blocks, memory, strict=True)
        ],
    )


def _kv(home: Home, block: Bytes | None, piece: Piece) -> Array | None:
    if block is None or not home.shape.plain:
        return None
    inside = home.shape.look(block)[..., piece.lo : piece.hi, :]
    return inside.view(home.shape.array_type())
