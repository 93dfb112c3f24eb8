"""KV at nodes that compute no attention: it comes here, a few blocks at a time, to be attended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.floats import STORED, widened
from kvfabric.attention.merge import Floats
from kvfabric.errors import Refused
from kvfabric.types import BATCH_KEYS, Status
from kvfabric_client.attention.context import Context
from kvfabric_client.attention.route import HOME, touched
from kvfabric_client.attention.runs import Runs
from kvfabric_client.blocks import Array, BlockShape, Bytes
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link
from kvfabric_client.node_reader import NodeReader

HERE = ""  # as the name of a node: this process, which attends for those that do not
CHUNK_BYTES = 8 << 20  # of a layer's KV in float32


@dataclass(frozen=True, slots=True)
class Fetched:
    """The KV of some tokens in one layer, in float32; `positions` ascend."""

    positions: NDArray[np.int64]
    keys: Floats  # [KV heads, tokens, dim]
    values: Floats  # the same; of latents the values are the first numbers

    @property
    def runs(self) -> Runs:
        starts = np.flatnonzero(np.diff(self.positions, prepend=-2) > 1)
        ends = [*starts[1:].tolist(), len(self.positions)]
        at = self.positions.tolist()
        return [(at[a], at[b - 1] + 1) for a, b in zip(starts.tolist(), ends, strict=True)]

    @property
    def size_bytes(self) -> int:
        return self.keys.nbytes + (self.values.nbytes if self.values is not self.keys else 0)

    def within(self, runs: Runs) -> Fetched:
        """Of these tokens alone."""
        bounds = np.array(runs, np.int64).reshape(-1)  # ascending: odd places are inside
        mine = np.searchsorted(bounds, self.positions, "right") % 2 == 1
        return Fetched(self.positions[mine], self.keys[:, mine], self.values[:, mine])


def fetched(
    context: Context, place: str, runs: Runs, layer: int, patience: Callable[[], Deadline]
) -> Iterator[Fetched]:
    """What a node has of these tokens, and those of their blocks beside them. `patience`: of each
    part. Raises Retry where the node does not go on."""
    shape = context.source.shape
    if not 0 <= layer < shape.layers:
        raise Refused(f"layer {layer} of {shape.layers}; layers count from 0 in each part")
    token_bytes = 4 * shape.planes * shape.heads * shape.head_dim
    count = min(BATCH_KEYS, max(1, CHUNK_BYTES // (token_bytes * shape.block_tokens)))
    blocks = touched(context.source.blocks, runs)
    for at in range(0, len(blocks), count):
        yield from _blocks(context, place, blocks[at : at + count], layer, patience())
    if place == HOME:
        for piece in context.source.opened(runs, layer, patience):
            yield _of(shape, [piece])


def _blocks(
    context: Context, place: str, numbers: Sequence[int], layer: int, deadline: Deadline
) -> Iterator[Fetched]:
    source = context.source
    blocks = [source.blocks[number] for number in numbers]
    found: dict[int, Array] = {}

    def deliver(index: int, block: Bytes) -> None:
        tokens = blocks[index].end - blocks[index].start
        found[index] = source.shape.look(block)[layer, ..., :tokens, :].copy()

    def read(link: Link) -> list[Status]:
        reader = NodeReader(source.room, source.shape, range(layer, layer + 1))
        keys = [block.key for block in blocks]
        return reader.read(link, keys, deliver, deadline, verify=True)

    statuses = context.client.at(context.address(place), read, deadline)
    good = [i for i, status in enumerate(statuses) if status is Status.OK]
    if good:
        yield _of(source.shape, [(blocks[i].start, found[i]) for i in good])


def _of(shape: BlockShape, pieces: Sequence[tuple[int, Array]]) -> Fetched:
    """`pieces`: first tokens, and [planes, heads, tokens, dim] of the blocks' numbers."""
    at = [np.arange(first, first + planes.shape[2]) for first, planes in pieces]
    bits = np.concatenate([planes for _, planes in pieces], axis=2)
    wide = widened(bits.view(STORED[shape.dtype]), shape.dtype)
    return Fetched(np.concatenate(at), wide[0], wide[1] if shape.planes > 1 else wide[0])
