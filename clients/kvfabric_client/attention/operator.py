"""What nodes compute for contexts: attention, top-k, reduce. The contract, and what all share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import Message

from kvfabric_client.attention.context import Context
from kvfabric_client.attention.fetched import Fetched
from kvfabric_client.attention.runs import Runs
from kvfabric_client.attention.spans import Alike, Span

MAX_QUERIES = 1024  # of a call
MAX_OUTPUT_BYTES = 960 << 10
MAX_ROWS = 65536  # each may have a position
MAX_RUNS = 3072  # of tokens that are asked for: all may be gaps, which share a frame with outputs


@dataclass(slots=True, eq=False)
class Item:
    """Some rows of one query over one context: what is asked of a node in one piece."""

    context: Context
    query: int  # its number, for the operator
    first: int  # of the query's rows
    rows: int
    wanted: Runs  # tokens that nobody has answered for yet


@dataclass(slots=True)
class Ask:
    """An item at one node."""

    item: Item
    place: str  # as the context's route has it
    runs: Runs
    span: Span | None = None  # None: it has not been opened


@dataclass(frozen=True, slots=True)
class Call:
    """One message to a node."""

    request: Message
    asks: Sequence[Ask]  # one for each of its queries


@dataclass(frozen=True, slots=True)
class Again:
    """A query, one of those `alike` that its node has prepared."""

    asks: Sequence[Ask]  # just one
    alike: Alike
    layer: int
    visible: int
    vectors: memoryview
    outputs: int  # numbers of o that come back, and then of
    lse: int


class Operator(Protocol):
    """Makes messages of asks, and takes the answers in."""

    @property
    def name(self) -> str:
        """Of the call."""

    @property
    def layer(self) -> int: ...

    def calls(self, asks: Sequence[Ask], deadline_ms: int) -> Iterator[Call]:
        """Cuts what goes to one node into messages within the limits."""

    def again(self, asks: Sequence[Ask]) -> Again | None:
        """What goes to one node, where that has prepared it."""

    def take(self, asks: Sequence[Ask], answer: Any, node: str, gaps: Sequence[Runs]) -> None:
        """An answer; `gaps`: per ask, what it does not cover. Broken where it is none."""

    def compute(self, ask: Ask, some: Fetched) -> None:
        """What a node would have computed, over these of the tokens that it is asked for."""


def packs(asks: Sequence[Ask], max_rows: int, max_asks: int = MAX_QUERIES) -> Iterator[list[Ask]]:
    """Cuts asks into messages of at most so many rows, so many asks, and MAX_RUNS."""
    max_asks = min(max_asks, MAX_QUERIES)
    some: list[Ask] = []
    rows = runs = 0
    for ask in asks:
        rows, runs = rows + ask.item.rows, runs + len(ask.runs)
        if some and (rows > max_rows or runs > MAX_RUNS or len(some) >= max_asks):
            yield some
            some, rows, runs = [], ask.item.rows, len(ask.runs)
        some.append(ask)
    if some:
        yield some


def slices(rows: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """(first, rows) of pieces of so many rows at most, as equal as can be."""
    pieces = -(-rows // max_rows)
    for piece in range(pieces):
        first, end = rows * piece // pieces, rows * (piece + 1) // pieces
        yield first, end - first
