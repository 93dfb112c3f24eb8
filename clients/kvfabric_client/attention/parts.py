"""Parts of queries, which operators over rows have in common: one part is rows over one context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.masks import Sight, seen, sight, within
from kvfabric.attention.shape import AttentionShape
from kvfabric.rpc.v1 import node_pb2
from kvfabric_client.attention.context import Context
from kvfabric_client.attention.operator import (
    MAX_OUTPUT_BYTES,
    MAX_ROWS,
    Ask,
    Item,
    packs,
    slices,
)
from kvfabric_client.attention.runs import Runs
from kvfabric_client.attention.spans import Alike
from kvfabric_client.blocks import Array
from kvfabric_client.prepared import MAX_VECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Options:
    """Of one call: how its queries attend."""

    layer: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    sinks: int = 0


@dataclass(slots=True, eq=False)
class Part:
    """Rows of one query over one context, with the query heads that belong to its KV heads."""

    context: Context
    shape: AttentionShape
    vectors: Array  # [rows, query heads, key dim], contiguous, as `STORED[dtype]`
    dtype: str
    visible: int
    positions: NDArray[np.int64]  # of the rows; none: they say no more than `visible`
    tokens: Runs  # of these, what the rows see

    @property
    def rows(self) -> int:
        return int(self.vectors.shape[0])

    @property
    def heads(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def form(self) -> tuple[int, str, AttentionShape]:
        """Parts of equal forms may go in one message."""
        return self.heads, self.dtype, self.shape

    def max_rows(self, row_bytes: int) -> int:
        """Of a message, where each row's answer has so many bytes."""
        vector_bytes = self.vectors.itemsize * self.heads * self.vectors.shape[2]
        most = min(MAX_VECTOR_BYTES // vector_bytes, MAX_OUTPUT_BYTES // row_bytes, MAX_ROWS)
        return max(1, int(most))

    def sight(self, options: Options, first: int, rows: int) -> Sight:
        at = self.positions[first : first + rows]
        return sight(rows, at, self.visible, options.window, options.sinks)

    def seen(self, options: Options, first: int, rows: int) -> Runs:
        """What of its tokens these rows see at most."""
        if not len(self.positions) and not options.window:
            return self.tokens
        return within(self.tokens, seen(self.sight(options, first, rows)))

    def rows_of(self, ask: Ask) -> memoryview:
        item = ask.item
        return self.vectors[item.first : item.first + item.rows].data

    def asked(self, ask: Ask, options: Options) -> node_pb2.SpanQuery:
        """As a message; ranges only where they say more than `visible`."""
        item, span = ask.item, ask.span
        assert span is not None
        whole = self.whole(ask, options)
        return node_pb2.SpanQuery(
            span=span.id,
            rows=item.rows,
            visible=self.visible,
            positions=self.positions[item.first : item.first + item.rows].tolist(),
            ranges=() if whole else [bound for run in ask.runs for bound in run],
        )

    def whole(self, ask: Ask, options: Options) -> bool:
        """Whether all is asked for that the span has and the rows see."""
        item, span = ask.item, ask.span
        assert span is not None
        if not span.sequence:
            return ask.runs == span.runs
        if self.tokens != [(0, self.visible)]:
            return False
        return ask.runs == self.seen(options, item.first, item.rows)

    def alike(self, ask: Ask, options: Options) -> Alike | None:
        """The queries that differ from this one by the layer and by what is visible. None: rows
        have positions, which no other query will have."""
        span = ask.span
        assert span is not None
        if len(self.positions):
            return None
        runs: list[object] = []
        if not (self.whole(ask, options) and span.sequence):
            runs = [*ask.runs]
            first, end = ask.runs[-1]
            if end == self.visible and ask.runs != span.runs:
                runs[-1] = first  # it goes on ending there
        how = (options.scale, options.softcap, options.window, options.sinks)
        return span.alike((ask.item.rows, self.heads, self.dtype, *how, *runs))


def items_of(
    parts: Sequence[Part], options: Options, max_rows: Callable[[Part], int]
) -> list[Item]:
    """What is to be asked, cut so that each fits a message."""
    return [
        Item(part.context, number, first, rows, wanted)
        for number, part in enumerate(parts)
        for first, rows in slices(part.rows, max_rows(part))
        if (wanted := part.seen(options, first, rows))
    ]


def messages_of(
    parts: Sequence[Part], asks: Sequence[Ask], max_rows: Callable[[Part], int]
) -> Iterator[list[Ask]]:
    """Asks of one node, as they go into its messages: parts of different forms apart."""
    by_form: dict[object, list[Ask]] = {}
    for ask in asks:
        by_form.setdefault(parts[ask.item.query].form, []).append(ask)
    for alike in by_form.values():
        yield from packs(alike, max_rows(parts[alike[0].item.query]))
