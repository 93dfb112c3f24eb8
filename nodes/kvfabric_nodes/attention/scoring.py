"""The other operators over KV where it lies: the best of inner products, and weighted sums.

numpy, in the engine's thread. Pages are scored by the mean of their keys, or values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.floats import widened
from kvfabric.attention.shape import AttentionShape
from kvfabric_nodes.attention.asked import Asked, begins
from kvfabric_nodes.attention.kernels.fused import chunks
from kvfabric_nodes.attention.kernels.memory import gathered, tokens_at
from kvfabric_nodes.attention.pieces import Blocks, Cut, Longs, Pieces, Range, run_of

CHUNK_TOKENS = 4096

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Best:
    """Of one row, the best first."""

    first_tokens: Longs
    scores: Floats


@dataclass(slots=True, eq=False)
class TopK:
    """One call: `asked` has whole pages only. `best`: of every row of all queries."""

    shape: AttentionShape
    layer: int
    k: int
    page_tokens: int  # 1: single tokens
    values: bool
    query_dtype: str
    asked: Sequence[Asked]
    best: list[Best] = field(default_factory=list)

    def compute(self) -> None:
        for one in self.asked:
            self.best += self._best(one)

    def _best(self, one: Asked) -> list[Best]:
        pieces = one.here.pieces
        heads = self.shape.kv_heads
        q = widened(one.vectors, self.query_dtype)
        q = q.reshape(len(q), heads, -1, q.shape[-1]).swapaxes(0, 1)  # [heads, rows, group, dim]
        found = np.empty(0, np.int64), np.empty((len(one.vectors), 0), np.float32)
        for chunk in chunks(np.arange(len(pieces)), pieces.counts, CHUNK_TOKENS):
            found = self._better(found, self._scored(one, pieces.take(chunk), q))
        first, scores = found
        return [self._row(first, row, one.sight.hi[i]) for i, row in enumerate(scores)]

    def _scored(self, one: Asked, pieces: Pieces, q: Floats) -> tuple[Longs, Floats]:
        """First tokens [pages], and scores [rows, pages]; -inf of what a row does not see."""
        page = self.page_tokens
        address = begins(self.shape, self.layer, pieces, values=self.values)
        k = gathered(self.shape, address, pieces.counts, values=self.values)
        means = k.reshape(-1, page, *k.shape[1:]).mean(1)  # [pages, heads, dim]
        products = q.reshape(len(q), -1, q.shape[-1]) @ means.transpose(1, 2, 0)
        scores = products.reshape(*q.shape[:3], -1).max((0, 2))
        starts = [np.arange(a, b, page) for a, b in zip(pieces.first, pieces.end, strict=True)]
        first = np.concatenate(starts)
        unseen = first + page > one.sight.hi[:, None]
        return first, np.where(unseen, np.float32(-np.inf), scores)

    def _better(
        self, found: tuple[Longs, Floats], more: tuple[Longs, Floats]
    ) -> tuple[Longs, Floats]:
        """What some row still wants, of both."""
        first = np.concatenate([found[0], more[0]])
        scores = np.concatenate([found[1], more[1]], axis=1)
        if len(first) <= self.k:
            return first, scores
        order = np.lexsort((np.broadcast_to(first, scores.shape), -scores), axis=1)
        wanted = np.unique(order[:, : self.k])
        return first[wanted], scores[:, wanted]

    def _row(self, first: Longs, scores: Floats, hi: int) -> Best:
        order = np.lexsort((first, -scores))[: self.k]
        order = order[scores[order] > -np.inf]
        return Best(first[order], scores[order])


@dataclass(slots=True, eq=False)
class Sum:
    """One weighted sum: of each token that is here its block's address, its place and weight."""

    blocks: Longs
    places: Longs
    weights: Floats
    extents: list[Any]
    gaps: list[Range]


@dataclass(slots=True, eq=False)
class Reduce:
    """One call. `outputs`: [sums, KV heads, dim]."""

    shape: AttentionShape
    layer: int
    values: bool
    sums: Sequence[Sum]
    outputs: list[Floats] = field(default_factory=list)

    def compute(self) -> None:
        self.outputs = [self._sum(one) for one in self.sums]

    def _sum(self, one: Sum) -> Floats:
        shape = self.shape
        dim = shape.value_dim if self.values else shape.key_dim
        total = np.zeros((shape.kv_heads, dim), np.float32)
        order = np.argsort(one.blocks, kind="stable")
        starts = np.flatnonzero(np.diff(one.blocks[order], prepend=-1))
        begin = self.layer * shape.layer_bytes + (shape.value_offset if self.values else 0)
        for start, end in itertools.pairwise([*starts.tolist(), len(order)]):
            own = order[start:end]
            address = int(one.blocks[own[0]]) + begin
            block = tokens_at(shape, address, shape.block_tokens, values=self.values)
            rows = widened(block[one.places[own]], shape.dtype)
            total += np.tensordot(one.weights[own], rows, 1)
        return total


def sum_of(blocks: Blocks, positions: Longs, weights: Floats) -> Sum:
    """What of these tokens lies here."""
    which = blocks.end.searchsorted(positions, "right")
    inside = which < len(blocks.end)
    inside[inside] = blocks.first[which[inside]] <= positions[inside]
    which = which[inside]
    missing = np.unique(positions[~inside])
    return Sum(
        blocks.address[which],
        positions[inside] - blocks.first[which],
        weights[inside],
        [blocks.extents[i] for i in np.unique(which).tolist()],
        run_of(missing, missing + 1),
    )


def whole_pages(here: Cut, page: int) -> Cut:
    """Of each piece the whole pages, which begin at multiples of `page`; the rest is missing."""
    pieces = here.pieces
    first, end = -(-pieces.first // page) * page, pieces.end // page * page
    some = first < end
    cut_off = np.where(some, first, pieces.end), np.where(some, end, pieces.end)
    gaps = np.array(here.gaps, np.int64).reshape(-1, 2)
    lows = np.concatenate([gaps[:, 0], pieces.first, cut_off[1]])
    highs = np.concatenate([gaps[:, 1], cut_off[0], pieces.end])
    index = np.flatnonzero(some)
    return Cut(
        Pieces(
            pieces.address[some],
            (pieces.skipped + first - pieces.first)[some],
            first[some],
            end[some],
        ),
        [here.extents[i] for i in index.tolist()],
        run_of(lows, highs),
    )
