"""One connection over which a node is asked to attend, and what its answers say."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvfabric.attention.floats import narrowed
from kvfabric.errors import Broken
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import DEFAULT_TENANT, Key, NamespaceId, Status
from kvfabric_client.bench.attention.shapes import BLOCK_TOKENS, Shape
from kvfabric_client.bench.lanes import STORED
from kvfabric_client.deadline import milliseconds
from kvfabric_client.link import Link
from kvfabric_client.prepared import REQUEST_BYTES

TIMEOUT_S: Final = 30.0
FRESH_S: Final = 0.5  # a node keeps what it prepared for twice as long


@dataclass(frozen=True, slots=True)
class Answer:
    """To one Attend: the seconds until it was here, and of the kernel alone."""

    total_s: float
    kernel_s: float
    read_bytes: int
    kernel: str
    sent_bytes: int
    received_bytes: int


class Asker:
    """See the module. Broken where a node did not attend all that it was asked for."""

    def __init__(self, address: str, namespace: NamespaceId) -> None:
        token = os.environ.get("KVFABRIC_TOKEN", "").encode()
        self._namespace = namespace
        self._link = Link(address, DEFAULT_TENANT, token, _deadline_s())
        self._link.open(STORED, namespace, _deadline_s())
        self._spans: dict[tuple[Shape, Key, int, int], int] = {}
        self._vectors: dict[tuple[Shape, int], bytes] = {}
        self._prepared = self._link.take_prepared(_deadline_s())
        self._numbers: dict[int, int] = {}  # of what is prepared, by its span
        self._until_s: dict[int, float] = {}  # it is used so long

    def close(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
        self._link.close()

    def attend(
        self, shape: Shape, layer: int, keys: Sequence[Key], requests: Sequence[int] = (0,)
    ) -> Answer:
        """One row of each of the requests, which have these blocks as their contexts. One alone is
        prepared, off the clock: an engine that decodes asks the same hundreds of times before it
        has to be prepared anew, while the bench goes from context to context."""
        spans = [self._span(shape, keys, number) for number in requests]
        if len(spans) == 1 and self._prepared is not None:
            if self._until_s.get(spans[0], 0.0) < time.monotonic():
                self._ask(shape, 0, spans, 1)
            if self._numbers[spans[0]]:
                return self._again(shape, layer, spans[0], len(keys) * BLOCK_TOKENS)
        return self._ask(shape, layer, spans, len(keys) * BLOCK_TOKENS)

    def _again(self, shape: Shape, layer: int, span: int, tokens: int) -> Answer:
        assert self._prepared is not None
        vectors = self._queries(shape, 1)
        numbers = shape.query_heads * (shape.head_dim + 1)
        before, until_s = self._prepared.moved_bytes, _deadline_s()
        start = time.perf_counter()
        self._prepared.begin(self._numbers[span], layer, tokens, vectors, numbers, until_s)
        answer = self._prepared.finish(until_s)
        total_s = time.perf_counter() - start
        if isinstance(answer, int):
            raise Broken(f"a query that was prepared a moment ago got verdict {answer}")
        if answer.tokens != tokens:
            raise Broken(f"of {tokens} tokens a node attended {answer.tokens}")
        received = self._prepared.moved_bytes - before - len(vectors) - REQUEST_BYTES
        return Answer(
            total_s,
            answer.kernel_s,
            answer.read_bytes,
            "native",
            len(vectors) + REQUEST_BYTES,
            received,
        )

    def _ask(self, shape: Shape, layer: int, spans: Sequence[int], tokens: int) -> Answer:
        request = node_pb2.AttendRequest(
            layer=layer,
            query_heads=shape.query_heads,
            scale=shape.head_dim**-0.5,
            deadline_ms=milliseconds(TIMEOUT_S),
            vectors=self._queries(shape, len(spans)),
            prepare=len(spans) == 1,
        )
        for span in spans:
            request.queries.add(span=span, rows=1, visible=tokens)
        start = time.perf_counter()
        answer = self._link.call("attend", request, _deadline_s()).attend_response
        total_s = time.perf_counter() - start
        if answer.gaps or set(answer.tokens) != {tokens}:
            raise Broken(f"of {tokens} tokens a node attended {list(answer.tokens)}")
        if request.prepare:
            self._numbers[spans[0]] = answer.prepared
            self._until_s[spans[0]] = time.monotonic() + FRESH_S
        return Answer(
            total_s,
            answer.kernel_us / 1e6,
            answer.read_bytes,
            answer.kernel,
            request.ByteSize(),
            answer.ByteSize(),
        )

    def _span(self, shape: Shape, keys: Sequence[Key], number: int) -> int:
        """Of these shards, for request `number`, opened once."""
        name = (shape, keys[0], len(keys), number)
        if name not in self._spans:
            self._spans[name] = self._open(shape, keys)
        return self._spans[name]

    def _open(self, shape: Shape, keys: Sequence[Key]) -> int:
        span = 0
        batch = self._link.hello.max_batch
        for at in range(0, len(keys), batch):
            some = keys[at : at + batch]
            request = node_pb2.OpenSpanRequest(
                namespace_id=self._namespace,
                format=shape.format().to_proto(),
                keys=some,
                first_tokens=range(
                    at * BLOCK_TOKENS, (at + len(some)) * BLOCK_TOKENS, BLOCK_TOKENS
                ),
                span=span,
            )
            answer = self._link.call("open_span", request, _deadline_s()).open_span_response
            if set(answer.statuses) != {Status.OK}:
                raise Broken("a shard of the bench is not at its node any more")
            span = answer.span
        return span

    def _queries(self, shape: Shape, rows: int) -> bytes:
        if (shape, rows) not in self._vectors:
            sizes = (rows, shape.query_heads, shape.head_dim)
            values = np.random.default_rng(rows).standard_normal(sizes, np.float32)
            self._vectors[shape, rows] = narrowed(values, shape.dtype).tobytes()
        return self._vectors[shape, rows]


def _deadline_s() -> float:
    return time.monotonic() + TIMEOUT_S
