"""The operator `attend`: queries out, normalised outputs and their lse back, merged by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvfabric.attention.floats import widened
from kvfabric.attention.merge import Partial, combine
from kvfabric.errors import Broken
from kvfabric.rpc.v1 import node_pb2
from kvfabric_client.attention.answers import Traffic
from kvfabric_client.attention.fetched import HERE, Fetched
from kvfabric_client.attention.local import attend_new
from kvfabric_client.attention.operator import Again, Ask, Call, Item
from kvfabric_client.attention.parts import Options, Part, items_of, messages_of
from kvfabric_client.attention.runs import Runs, count, joined, without
from kvfabric_client.attention.spans import Alike


@dataclass(slots=True)
class Gathered:
    """What has come back for one part."""

    partials: dict[Item, Partial] = field(default_factory=dict)
    covered: dict[str, Runs] = field(default_factory=dict)  # tokens, by the node's name

    @property
    def tokens(self) -> dict[str, int]:
        return {node: count(joined(runs)) for node, runs in self.covered.items()}


class Attention:
    """An `Operator`. `gathered` has what came, by part."""

    name = "attend"

    def __init__(self, parts: Sequence[Part], options: Options, traffic: Traffic) -> None:
        self.parts = parts
        self.options = options
        self.traffic = traffic
        self.gathered = {part: Gathered() for part in parts}

    @property
    def layer(self) -> int:
        return self.options.layer

    def items(self) -> list[Item]:
        return items_of(self.parts, self.options, _max_rows)

    def calls(self, asks: Sequence[Ask], deadline_ms: int) -> Iterator[Call]:
        for some in messages_of(self.parts, asks, _max_rows):
            yield self._call(some, deadline_ms)

    def _call(self, asks: Sequence[Ask], deadline_ms: int) -> Call:
        options, part = self.options, self.parts[asks[0].item.query]
        request = node_pb2.AttendRequest(
            layer=options.layer,
            query_heads=part.heads,
            dtype="" if part.dtype == part.shape.dtype else part.dtype,
            scale=options.scale,
            softcap=options.softcap,
            window=options.window,
            sinks=options.sinks,
            deadline_ms=deadline_ms,
            queries=[self.parts[ask.item.query].asked(ask, options) for ask in asks],
            vectors=b"".join([self._vectors(ask) for ask in asks]),
        )
        if alike := self._alike(asks):
            request.prepare = alike.prepare()
        self.traffic.sent_bytes += len(request.vectors)
        return Call(request, asks)

    def _alike(self, asks: Sequence[Ask]) -> Alike | None:
        """Of the only query of a message, if it may be prepared."""
        part = self.parts[asks[0].item.query]
        return part.alike(asks[0], self.options) if len(asks) == 1 else None

    def again(self, asks: Sequence[Ask]) -> Again | None:
        alike = self._alike(asks)
        if alike is None or not alike.number:
            return None
        (ask,), part = asks, self.parts[asks[0].item.query]
        rows = ask.item.rows * part.heads
        return Again(
            asks,
            alike,
            self.options.layer,
            part.visible,
            self._vectors(ask),
            outputs=rows * part.shape.value_dim,
            lse=rows,
        )

    def _vectors(self, ask: Ask) -> memoryview:
        return self.parts[ask.item.query].rows_of(ask).cast("B")

    def take(self, asks: Sequence[Ask], answer: Any, node: str, gaps: Sequence[Runs]) -> None:
        part = self.parts[asks[0].item.query]
        rows = sum(ask.item.rows for ask in asks)
        heads, dim = part.heads, part.shape.value_dim
        asked = [count(ask.runs) - count(gap) for ask, gap in zip(asks, gaps, strict=True)]
        sizes = (len(answer.outputs), len(answer.lse))
        if sizes != (4 * rows * heads * dim, 4 * rows * heads) or asked != list(answer.tokens):
            raise Broken(
                f"node {node} answered {sizes} bytes over {list(answer.tokens)} tokens, asked for "
                f"{rows} rows of {heads} heads of {dim} over {asked}; see its log"
            )
        o = np.frombuffer(answer.outputs, np.float32).reshape(rows, heads, dim)
        lse = np.frombuffer(answer.lse, np.float32).reshape(rows, heads)
        at = 0
        for ask, gap in zip(asks, gaps, strict=True):
            end = at + ask.item.rows
            covered = without(ask.runs, gap) if gap else ask.runs
            self._add(ask.item, Partial(o[at:end], lse[at:end]), node, covered)
            at = end
        self.traffic.received_bytes += sum(sizes)
        self.traffic.kernels.add(answer.kernel)
        if answer.prepared and (alike := self._alike(asks)):
            alike.number = answer.prepared

    def compute(self, ask: Ask, some: Fetched) -> None:
        options, item, part = self.options, ask.item, self.parts[ask.item.query]
        rows = part.vectors[item.first : item.first + item.rows]
        partial = attend_new(
            widened(rows, part.dtype),
            some.keys,
            some.values[..., : part.shape.value_dim],
            some.positions,
            part.sight(options, item.first, item.rows),
            options.scale,
            options.softcap,
        )
        self._add(item, partial, HERE, some.runs)

    def _add(self, item: Item, partial: Partial, node: str, covered: Runs) -> None:
        gathered = self.gathered[self.parts[item.query]]
        before = gathered.partials.get(item)
        gathered.partials[item] = partial if before is None else combine([before, partial])
        gathered.covered.setdefault(node, []).extend(covered)

    def partial(self, part: Part) -> Partial:
        """All of one part that has come back; rows that saw nothing are empty."""
        came = self.gathered[part].partials
        if len(came) == 1:
            ((item, whole),) = came.items()
            if item.rows == part.rows:
                return whole
        o = np.zeros((part.rows, part.heads, part.shape.value_dim), np.float32)
        lse = np.full((part.rows, part.heads), -np.inf, np.float32)
        for item, partial in came.items():
            o[item.first : item.first + item.rows] = partial.o
            lse[item.first : item.first + item.rows] = partial.lse
        return Partial(o, lse)


def _max_rows(part: Part) -> int:
    return part.max_rows(4 * part.heads * (part.shape.value_dim + 1))
