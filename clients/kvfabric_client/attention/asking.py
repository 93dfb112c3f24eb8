"""Queries made ready: each taken apart into parts, one per sequence, and its new tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.floats import STORED, widened
from kvfabric.attention.masks import sight
from kvfabric.attention.merge import Floats, Partial
from kvfabric.attention.shape import AttentionShape
from kvfabric.errors import Refused
from kvfabric_client.attention.local import attend_new
from kvfabric_client.attention.parts import Options, Part
from kvfabric_client.attention.queries import (
    Query,
    heads_of,
    positions_of,
    shape_for,
    telling_positions,
    token_runs,
    vectors_of,
)
from kvfabric_client.blocks import Array, BlockShape, Source, source_of
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import checked_ids
from kvfabric_client.sequence_writer import Writer


@dataclass(slots=True)
class New:
    """New tokens of one part: appended to its sequence, and attended here."""

    writer: Writer
    source: Source
    part: Part
    positions: NDArray[np.int64]  # of its rows; none: they see all new tokens
    start: int
    ids: array[int]
    partial: Partial | None = None

    @property
    def kv_bytes(self) -> int:
        return sum(plane.nbytes for _, plane in self.source.planes)

    def append(self, layer: int, deadline: Deadline) -> int:
        """Answers how many bytes went over sockets and into shared memory for it."""
        home = self.writer.home
        before = home.moved_bytes
        self.writer.append(self.start, self.ids, self.source, layer, deadline)
        return home.moved_bytes - before + (self.kv_bytes if home.tails.shared else 0)

    def attend(self, options: Options) -> Partial:
        part, shape = self.part, self.part.shape
        planes = [_floats(plane, shape) for _, plane in self.source.planes]
        end = self.start + len(self.ids)
        return attend_new(
            widened(part.vectors, part.dtype),
            planes[0],
            planes[-1][..., : shape.value_dim],
            np.arange(self.start, end),
            sight(part.rows, self.positions, end, options.window, options.sinks),
            options.scale,
            options.softcap,
        )


@dataclass(slots=True)
class Asked:
    """One query. `missing`: tokens that were lost with the home node before it was asked."""

    query: Query
    parts: list[Part] = field(default_factory=list)
    news: list[New] = field(default_factory=list)  # one per part, or none
    missing: list[range] = field(default_factory=list)
    local: Partial | None = None  # the engine's own


def ask(
    query: Query, sequences: Sequence[Any], options: Options, value_dim: int, deadline: Deadline
) -> Asked:
    """Makes a query over these sequences ready, which are held by the caller."""
    layer = options.layer
    shapes = [shape_for(sequence.shape, value_dim) for sequence in sequences]
    reached = min(_reached(sequence.writer, layer) for sequence in sequences)
    for sequence in sequences:
        sequence.writer.ready(deadline)
    has = min(_reached(sequence.writer, layer) for sequence in sequences)
    vectors, dtype = vectors_of(query.queries, shapes[0])
    ids = checked_ids(query.new[0]) if query.new is not None else array("I")
    at = positions_of(query.positions, len(vectors))
    visible = _visible(query, at, len(vectors), len(ids), reached)
    if visible > has:
        return Asked(query, missing=[range(has, visible)])
    if not len(at) and len(ids):
        at = visible + np.arange(len(ids))
    runs = token_runs(query.tokens, visible)
    telling = telling_positions(at, visible, options.window)
    asked = Asked(query)
    heads = heads_of(tuple(sequence.shape for sequence in sequences), vectors.shape[1])
    for sequence, shape, mine in zip(sequences, shapes, heads, strict=True):
        sequence.context.begin(deadline)
        rows = np.ascontiguousarray(vectors[:, mine])
        part = Part(sequence.context, shape, rows, dtype, visible, telling, runs)
        asked.parts.append(part)
        if len(ids):
            source = _source(query, sequences, sequence.shape, ids, layer)
            asked.news.append(New(sequence.writer, source, part, at, visible, ids))
    return asked


def _reached(writer: Writer, layer: int) -> int:
    if not 0 <= layer < writer.shape.layers:
        raise Refused(f"layer {layer} of {writer.shape.layers}; layers count from 0 in each part")
    return writer.outline.visible[layer]


def _visible(query: Query, at: NDArray[np.int64], rows: int, new: int, reached: int) -> int:
    """Tokens before this one are asked of nodes; new ones begin here."""
    if query.visible is not None:
        if query.visible < 0:
            raise Refused(f"visible {query.visible}; give a number of tokens")
        return query.visible
    if not new:
        return reached
    if rows != new:
        raise Refused(
            f"{rows} rows with {new} new tokens; give a row for each, or positions, and by "
            "`visible` where the new tokens begin"
        )
    return int(at[0]) if len(at) else reached


def _source(
    query: Query, sequences: Sequence[Any], shape: BlockShape, ids: array[int], layer: int
) -> Source:
    """The new KV of one part's heads."""
    assert query.new is not None
    planes = query.new[1 : 1 + shape.planes]
    heads = sum(sequence.shape.heads for sequence in sequences)
    if any(len(plane) != heads for plane in planes):
        raise Refused(f"new KV of {[len(plane) for plane in planes]} heads; there are {heads}")
    first = shape.first_head - sequences[0].shape.first_head
    mine = slice(first, first + shape.heads)
    return source_of(shape, tuple(plane[mine] for plane in planes), len(ids), layer)


def _floats(plane: Array, shape: AttentionShape) -> Floats:
    return widened(plane.view(STORED[shape.dtype]), shape.dtype)
