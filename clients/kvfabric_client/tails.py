"""A sequence's open blocks as its writer sees them: the node's own memory, or a copy of it.

Where memory is not shared a copy is kept here: what is appended is taken from it, checksums
are made of it, and it is what a read of the tail gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvfabric.rpc.v1 import node_pb2
from kvfabric_client.blocks import BlockShape, Bytes
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link
from kvfabric_client.outline import Piece

APPEND_BYTES = 512 << 10  # of an Append's payload
APPEND_PIECES = 4096

Place = tuple[int, int, int]
"""Segment, offset and generation: one use of some memory."""


@dataclass(frozen=True, slots=True)
class Payload:
    """What one Append brings along."""

    blocks: list[int]
    offsets: list[int]
    size_bytes: list[int]
    data: bytes


class Tails:
    """The open blocks of a sequence, in their order."""

    def __init__(self, link: Link, shape: BlockShape) -> None:
        self.link = link
        self.shape = shape
        self.first_token = 0
        self.blocks: list[Bytes] = []
        self._places: list[Place] = []

    @property
    def shared(self) -> bool:
        return self.link.shares_memory

    def __len__(self) -> int:
        return len(self.blocks)

    def update(self, tails: node_pb2.Tails, deadline: Deadline) -> None:
        """Takes over what the node says is open; copies of blocks that stay open are kept."""
        places = list(zip(tails.segments, tails.offsets, tails.generations, strict=True))
        known = dict(zip(self._places, self.blocks, strict=True))
        fresh = [place for place in places if place not in known]
        if fresh and self.shared:
            self.link.map_segments({place[0] for place in fresh}, deadline.at_s)
        self.blocks = [known[place] if place in known else self._open(place) for place in places]
        self._places = places
        self.first_token = tails.first_token

    def _open(self, place: Place) -> Bytes:
        if self.shared:
            memory = self.link.place(place[0], place[1], self.shape.size_bytes)
            return np.frombuffer(memory, dtype=np.uint8)
        return np.zeros(self.shape.size_bytes, dtype=np.uint8)

    def restore(self, blocks: list[Bytes]) -> None:
        """What the first open blocks hold, where these are copies and were cut anew."""
        count = min(len(blocks), len(self.blocks))
        if not self.shared:
            self.blocks[:count] = blocks[:count]

    def inherit(self, other: Tails) -> None:
        """Knows the other's open blocks too, some of which the next `update` brings."""
        self.blocks = self.blocks + other.blocks
        self._places = self._places + other._places

    def payloads(self, pieces: list[Piece], layers: range) -> Iterator[Payload]:
        """What was written into these pieces, cut into what an Append may carry."""
        runs: list[tuple[int, int, int]] = []
        total = 0
        for index, offset, size in self._runs(pieces, layers):
            if total + size > APPEND_BYTES or len(runs) == APPEND_PIECES:
                yield self._payload(runs)
                runs, total = [], 0
            runs.append((index, offset, size))
            total += size
        if runs:
            yield self._payload(runs)

    def _runs(self, pieces: list[Piece], layers: range) -> Iterator[tuple[int, int, int]]:
        for piece in pieces:
            whole = [(0, self.shape.size_bytes)]
            runs = self.shape.tail_runs(piece.lo, piece.hi, layers) if self.shape.plain else whole
            for offset, size_bytes in runs:
                for start in range(0, size_bytes, APPEND_BYTES):
                    yield piece.index, offset + start, min(APPEND_BYTES, size_bytes - start)

    def _payload(self, runs: list[tuple[int, int, int]]) -> Payload:
        data = b"".join(self.blocks[i][start : start + size].data for i, start, size in runs)
        indices, offsets, sizes = zip(*runs, strict=True)
        return Payload(list(indices), list(offsets), list(sizes), data)
