"""The operator `top_k`: the tokens, or pages, whose keys have the greatest product with a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvfabric.attention.floats import widened
from kvfabric.attention.masks import within
from kvfabric.errors import Broken, Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric_client.attention.answers import Best
from kvfabric_client.attention.fetched import Fetched
from kvfabric_client.attention.operator import Ask, Call, Item
from kvfabric_client.attention.parts import Options, Part, items_of, messages_of
from kvfabric_client.attention.route import Block
from kvfabric_client.attention.runs import Runs, joined

MAX_K = 4096
FOUND_BYTES = 16  # at most, of one that is found, in an answer


@dataclass(slots=True)
class TopK:
    """An `Operator`. `found` has, per part and row, (score, first token) of what is best."""

    parts: Sequence[Part]
    options: Options
    k: int
    page_tokens: int = 0
    values: bool = False
    name: str = "top_k"
    found: dict[Part, list[list[tuple[float, int]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.k <= MAX_K:
            raise Refused(f"the best {self.k}; give 1 to {MAX_K}")
        self.found = {part: [[] for _ in range(part.rows)] for part in self.parts}

    @property
    def layer(self) -> int:
        return self.options.layer

    def items(self) -> list[Item]:
        return items_of(self.parts, self.options, self._max_rows)

    def calls(self, asks: Sequence[Ask], deadline_ms: int) -> Iterator[Call]:
        for some in messages_of(self.parts, asks, self._max_rows):
            yield self._call(some, deadline_ms)

    def _max_rows(self, part: Part) -> int:
        return part.max_rows(FOUND_BYTES * self.k)

    def _call(self, asks: Sequence[Ask], deadline_ms: int) -> Call:
        part = self.parts[asks[0].item.query]
        request = node_pb2.TopKRequest(
            layer=self.options.layer,
            query_heads=part.heads,
            dtype=part.dtype,
            k=self.k,
            page_tokens=self.page_tokens,
            values=self.values,
            deadline_ms=deadline_ms,
            queries=[self.parts[ask.item.query].asked(ask, self.options) for ask in asks],
            vectors=b"".join(self.parts[ask.item.query].rows_of(ask) for ask in asks),
        )
        return Call(request, asks)

    def again(self, asks: Sequence[Ask]) -> None:
        """It is not prepared."""

    def take(self, asks: Sequence[Ask], answer: Any, node: str, gaps: Sequence[Runs]) -> None:
        rows = [(ask.item, row) for ask in asks for row in range(ask.item.rows)]
        if len(answer.counts) != len(rows) or sum(answer.counts) != len(answer.scores):
            raise Broken(f"node {node} answered {len(answer.counts)} rows of {len(rows)}")
        pairs = zip(answer.scores, answer.first_tokens, strict=True)
        for (item, row), size in zip(rows, answer.counts, strict=True):
            mine = self.found[self.parts[item.query]][item.first + row]
            mine += [next(pairs) for _ in range(size)]

    def compute(self, ask: Ask, some: Fetched) -> None:
        """Its pages are whole: what is asked for is, and blocks are."""
        item, part = ask.item, self.parts[ask.item.query]
        page = max(1, self.page_tokens)
        plane = some.values[..., : part.shape.value_dim] if self.values else some.keys
        means = plane.reshape(len(plane), -1, page, plane.shape[2]).mean(2)
        rows = widened(part.vectors[item.first : item.first + item.rows], part.dtype)
        folded = rows.reshape(item.rows, len(plane), -1, rows.shape[2])
        scores = np.einsum("rhgd,hpd->rhgp", folded, means, optimize=True).max((1, 2))
        first = some.positions[::page]
        hi = part.sight(self.options, item.first, item.rows).hi
        for row, (mine, end) in enumerate(zip(scores, hi.tolist(), strict=True), item.first):
            seen = first + page <= end
            pairs = zip(mine[seen].tolist(), first[seen].tolist(), strict=True)
            found = self.found[part]
            found[row] = _first([*found[row], *pairs], self.k)

    def best(self, part: Part) -> list[Best]:
        """Of each row: the greatest first, of equal ones the earlier token."""
        return [
            Best([first for _, first in top], [score for score, _ in top])
            for top in (_first(found, self.k) for found in self.found[part])
        ]


def _first(found: list[tuple[float, int]], k: int) -> list[tuple[float, int]]:
    return sorted(found, key=lambda one: (-one[0], one[1]))[:k]


def whole_pages(blocks: Sequence[Block], tokens: Runs, page_tokens: int) -> Runs:
    """The pages that lie in one sealed block each, with all their tokens among these."""
    found = [
        (-(-block.start // page_tokens) * page_tokens, block.end // page_tokens * page_tokens)
        for block in blocks
    ]
    inside = within(tokens, joined(found))
    return joined(
        (-(-first // page_tokens) * page_tokens, end // page_tokens * page_tokens)
        for first, end in inside
    )
