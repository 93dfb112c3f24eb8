"""What of a context lies here, as columns, and what of that a query asks for.

Vectorised: a call on a long context meets a thousand blocks, in every layer of every token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.masks import Sight
from kvfabric_nodes.store.extents import Extent

Longs = NDArray[np.int64]
Range = tuple[int, int]  # positions: the first, and the one behind the last
Row = tuple[int, int, int, Extent]  # a block: its address, first position, end, and extent


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Blocks by ascending position, which do not overlap: the address at which each begins, the
    positions of its first token and behind its last. `views`: what was asked of them lately,
    for every layer of a token asks the same."""

    address: Longs
    first: Longs
    end: Longs
    extents: list[Extent]
    gapless: bool
    views: dict[Hashable, View] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of blocks: the block's address, how many of its tokens come before, and the positions
    of the first token and behind the last."""

    address: Longs
    skipped: Longs
    first: Longs
    end: Longs
    begins: dict[bool, Longs] = field(default_factory=dict)  # of layer 0: keys; True: values

    def __len__(self) -> int:
        return len(self.address)

    @cached_property
    def counts(self) -> NDArray[np.int32]:
        """Of tokens."""
        return (self.end - self.first).astype(np.int32)

    @cached_property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def take(self, index: Longs | list[int]) -> Pieces:
        return Pieces(self.address[index], self.skipped[index], self.first[index], self.end[index])


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What lies here of some ranges: the pieces, their extents, and the gaps between them."""

    pieces: Pieces
    extents: list[Extent]
    gaps: list[Range]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What the rows of a query see, and what lies here of that."""

    sight: Sight
    here: Cut


def blocks_of(rows: Sequence[Row]) -> Blocks:
    """By ascending position."""
    columns = np.array([row[:3] for row in rows], np.int64).reshape(-1, 3)
    address, first, end = np.ascontiguousarray(columns.T)
    gapless = bool((first[1:] == end[:-1]).all())
    return Blocks(address, first, end, [row[3] for row in rows], gapless)


def joined(blocks: Blocks, behind: Blocks) -> Blocks:
    """Blocks, and others behind them."""
    if not behind.extents:
        return blocks
    if not blocks.extents:
        return behind
    return Blocks(
        np.concatenate([blocks.address, behind.address]),
        np.concatenate([blocks.first, behind.first]),
        np.concatenate([blocks.end, behind.end]),
        blocks.extents + behind.extents,
        blocks.gapless and behind.gapless and bool(blocks.end[-1] == behind.first[0]),
    )


def cut(blocks: Blocks, ranges: Sequence[Range]) -> Cut:
    """The parts of blocks that lie within ascending ranges."""
    if len(ranges) == 1 and blocks.gapless:
        return _cut_out(blocks, *ranges[0])
    return _cut(blocks, ranges)


def _cut_out(blocks: Blocks, low: int, high: int) -> Cut:
    """One range of blocks without a gap: a slice of their columns."""
    begin = int(blocks.end.searchsorted(low, "right"))
    behind = int(blocks.first.searchsorted(high, "left"))
    if begin >= behind:
        none = blocks.address[:0]
        return Cut(Pieces(none, none, none, none), [], [(low, high)] if low < high else [])
    first, end = blocks.first[begin:behind], blocks.end[begin:behind]
    skipped = np.zeros(behind - begin, np.int64)
    gaps = [(low, int(first[0])), (int(end[-1]), high)]
    if first[0] < low:
        first = first.copy()
        skipped[0], first[0] = low - first[0], low
    if end[-1] > high:
        end = end.copy()
        end[-1] = high
    return Cut(
        Pieces(blocks.address[begin:behind], skipped, first, end),
        blocks.extents[begin:behind],
        [gap for gap in gaps if gap[0] < gap[1]],
    )


def _cut(blocks: Blocks, ranges: Sequence[Range]) -> Cut:
    asked = np.array(ranges, np.int64).reshape(-1, 2)
    low, high = asked[:, 0], asked[:, 1]
    begin = np.searchsorted(blocks.end, low, "right")
    counts = np.searchsorted(blocks.first, high, "left") - begin
    which = np.repeat(np.arange(len(asked)), counts)  # of the ranges, for each piece
    before = np.cumsum(counts) - counts  # pieces of earlier ranges
    index = np.arange(len(which)) + np.repeat(begin - before, counts)
    starts = blocks.first[index]
    extents = [blocks.extents[i] for i in index.tolist()]
    first = np.maximum(starts, low[which])
    end = np.minimum(blocks.end[index], high[which])
    pieces = Pieces(blocks.address[index], first - starts, first, end)
    return Cut(pieces, extents, _gaps(asked, counts, which, first, end))


def _gaps(asked: Longs, counts: Longs, which: Longs, first: Longs, end: Longs) -> list[Range]:
    """Between a range's begin, its pieces and its end: one possible gap more than pieces."""
    lefts = np.empty(len(which) + len(asked), np.int64)
    rights = np.empty_like(lefts)
    place = np.arange(len(which)) + which
    order = np.arange(len(asked))
    rights[place], lefts[place + 1] = first, end
    lefts[np.cumsum(counts) - counts + order] = asked[:, 0]
    rights[np.cumsum(counts) + order] = asked[:, 1]
    empty = np.flatnonzero(lefts < rights)
    return list(zip(lefts[empty].tolist(), rights[empty].tolist(), strict=True))


def run_of(lows: Longs, highs: Longs) -> list[Range]:
    """Ranges that do not overlap, those that are not empty, ascending, neighbours joined."""
    some = np.flatnonzero(lows < highs)
    order = some[np.argsort(lows[some])]
    low, high = lows[order], highs[order]
    apart = np.flatnonzero(low[1:] != high[:-1])
    firsts, ends = [*low[:1], *low[apart + 1]], [*high[apart], *high[-1:]]
    return [(int(first), int(end)) for first, end in zip(firsts, ends, strict=True)]
