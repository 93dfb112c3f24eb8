"""Spans as a client keeps them: what of one context a node attends for this session.

A span is a node's table entry; it is opened when it is first needed, grows when further blocks
come to the node, and is opened again when the session ended or its blocks were cut. One whose
context nobody has any more is closed when the next is opened in its session.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import BATCH_KEYS, Key, NamespaceId
from kvfabric_client.attention.route import Block
from kvfabric_client.attention.runs import Runs, joined
from kvfabric_client.blocks import BlockShape
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link

CLOSE_S = 1.0
MOST_ALIKE = 64  # kinds of queries that are remembered of a span


@dataclass(slots=True)
class Alike:
    """Queries of one span that one preparation serves. `number`: as the node has it; 0: not."""

    number: int = 0
    asked: bool = False  # one of them
    pays: bool = True  # whether the short way is there

    def prepare(self) -> bool:
        """Whether the one that is asked now shall be prepared: not the first, which may be the
        only one."""
        before, self.asked = self.asked, True
        return before and self.pays and not self.number


_left: weakref.WeakKeyDictionary[Link, deque[int]] = weakref.WeakKeyDictionary()
"""Spans, by session, that nobody has any more and nobody has closed."""


@dataclass(slots=True, eq=False)
class Span:
    """One span of one session. `sequence`: it is all of it that lies there; else it is of keys."""

    link: Link
    namespace: NamespaceId
    shape: BlockShape
    value_dim: int
    sequence: int = 0
    id: int = 0  # 0: not opened yet
    keys: dict[int, Key] = field(default_factory=dict)  # by their first token
    runs: Runs = field(default_factory=list)  # of these
    _alike: dict[object, Alike] = field(default_factory=dict)  # by what they have in common

    def alike(self, common: object) -> Alike:
        found = self._alike.get(common)
        if found is None:
            if len(self._alike) >= MOST_ALIKE:
                self._alike.clear()
            found = self._alike[common] = Alike()
        return found

    _left: deque[int] = field(init=False)  # of its session

    def __post_init__(self) -> None:
        self._left = _left.setdefault(self.link, deque())

    def __del__(self) -> None:
        """In whatever thread that is, in the middle of anything: it only takes a note."""
        if self.id:
            self._left.append(self.id)

    def ensure(self, blocks: Sequence[Block], deadline: Deadline) -> None:
        """Opens it, or extends it by those of these blocks that it does not have."""
        fresh = [block for block in blocks if block.start not in self.keys]
        if self.sequence:
            if not self.id:
                self._call([], deadline)
            return
        for start in range(0, len(fresh), BATCH_KEYS):
            some = fresh[start : start + BATCH_KEYS]
            self._call(some, deadline)
            self.keys.update((block.start, block.key) for block in some)
        if fresh:
            self.runs = joined([*self.runs, *((block.start, block.end) for block in fresh)])

    def _call(self, blocks: Sequence[Block], deadline: Deadline) -> None:
        if not self.id:
            _close(self.link, _taken(self._left))
        full = self.shape.block_tokens
        request = node_pb2.OpenSpanRequest(
            namespace_id=self.namespace,
            format=self.shape.format.to_proto(),
            value_dim=self.value_dim,
            sequence=self.sequence,
            keys=[block.key for block in blocks],
            first_tokens=[block.start for block in blocks],
            span=self.id,
        )
        if any(block.end - block.start < full for block in blocks):
            request.tokens.extend(block.end - block.start for block in blocks)
        answer = self.link.call("open_span", request, deadline.at_s)
        self.id = answer.open_span_response.span

    def holds_others(self, keys: dict[int, Key]) -> bool:
        """Whether some of its blocks are not these any more, by their first tokens."""
        return any(keys.get(first) != key for first, key in self.keys.items())


def close(spans: Iterable[Span]) -> None:
    """Tells their nodes, which would forget them with the session."""
    by_link: dict[Link, list[int]] = {}
    for span in spans:
        by_link.setdefault(span.link, []).append(span.id)
        span.id = 0
    for link, ids in by_link.items():
        _close(link, [span_id for span_id in ids if span_id])


def _close(link: Link, span_ids: Sequence[int]) -> None:
    if not span_ids or not link.alive():
        return
    request = node_pb2.CloseSpanRequest(spans=span_ids)
    until_s = time.monotonic() + CLOSE_S
    with contextlib.suppress(FabricError), link.connection(until_s) as connection:
        connection.tell("close_span", request, until_s)


def _taken(left: deque[int]) -> list[int]:
    """All of it, in this thread."""
    taken: list[int] = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(left.popleft())
    return taken
