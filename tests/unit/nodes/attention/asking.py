"""A client that says the calls on attention as they are, and what the answers should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvfabric_client
from kvfabric.attention import oracle
from kvfabric.attention.floats import narrowed, widened
from kvfabric.attention.masks import sight
from kvfabric.attention.merge import Partial
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Format, Namespace
from kvfabric_client import Client, Room
from kvfabric_client.deadline import Deadline

Array = NDArray[Any]
SPACE = Namespace("default", b"f" * 32)
TIMEOUT_S = 20.0


def opening(namespace: bytes, form: Format, sequence: int) -> node_pb2.OpenSpanRequest:
    return node_pb2.OpenSpanRequest(
        namespace_id=namespace, format=form.to_proto(), sequence=sequence
    )


def space() -> types_pb2.Namespace:
    return types_pb2.Namespace(tenant=SPACE.tenant, fingerprint=SPACE.fingerprint)


def ids(count: int, seed: int = 0) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, 50_000, count)]


def kv(form: Format, tokens: int, seed: int = 0) -> Array:
    """[layers, 2, heads, tokens, head dim], as the format stores it."""
    shape = (form.layers, 2, form.kv_heads, tokens, form.head_dim)
    return narrowed(np.random.default_rng(seed).standard_normal(shape, np.float32), form.dtype)


@dataclass(slots=True)
class Query:
    """Rows over a span; `context` is all KV of it, [layers, 2, heads, tokens, head dim]."""

    span: int
    vectors: Array  # [rows, query heads, head dim], float32
    visible: int
    context: Array
    positions: Sequence[int] = ()
    ranges: Sequence[tuple[int, int]] = ()

    def message(self) -> node_pb2.SpanQuery:
        return node_pb2.SpanQuery(
            span=self.span,
            rows=len(self.vectors),
            visible=self.visible,
            positions=self.positions,
            ranges=[bound for pair in self.ranges for bound in pair],
        )


@dataclass(slots=True)
class Call:
    """An attend, and what it should come to over tokens that are all here."""

    form: Format
    queries: list[Query]
    layer: int = 0
    dtype: str = ""
    scale: float = 0.25
    softcap: float = 0.0
    window: int = 0
    sinks: int = 0
    value_dim: int = 0
    deadline_ms: int = 0

    @property
    def query_dtype(self) -> str:
        return self.dtype or self.form.dtype

    def message(self) -> node_pb2.AttendRequest:
        vectors = np.concatenate([query.vectors for query in self.queries])
        return node_pb2.AttendRequest(
            layer=self.layer,
            query_heads=vectors.shape[1],
            dtype=self.dtype,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            sinks=self.sinks,
            deadline_ms=self.deadline_ms,
            queries=[query.message() for query in self.queries],
            vectors=narrowed(vectors, self.query_dtype).tobytes(),
        )

    def expected(self) -> list[Partial]:
        return [self._expected(query) for query in self.queries]

    def _expected(self, query: Query) -> Partial:
        tokens = query.context.shape[-2]
        at = np.arange(tokens)
        if query.ranges:
            at = np.concatenate([np.arange(*pair) for pair in query.ranges])
            at = at[at < tokens]
        plane = widened(query.context[self.layer], self.form.dtype).swapaxes(1, 2)[:, at]
        values = plane[0][..., : self.value_dim] if self.form.kind == "mla" else plane[1]
        rounded = widened(narrowed(query.vectors, self.query_dtype), self.query_dtype)
        rows = len(query.vectors)
        seen = sight(rows, query.positions, query.visible, self.window, self.sinks)
        return oracle.attend(rounded, plane[0], values, at, seen, self.scale, self.softcap)


class Asker:
    """One session at a node."""

    def __init__(self, client: Client, space: Namespace = SPACE) -> None:
        self.client = client
        self.room: Room = client.open(space)

    def say(self, name: str, request: Any) -> Any:
        answer = self.room._call(name, request, Deadline.after(TIMEOUT_S))
        return getattr(answer, f"{name}_response")

    def span_of(self, form: Format, sequence: int, value_dim: int = 0) -> int:
        request = opening(self.room.id, form, sequence)
        request.value_dim = value_dim
        return int(self.say("open_span", request).span)

    def span_of_keys(self, form: Format, **fields: Any) -> node_pb2.OpenSpanResponse:
        request = node_pb2.OpenSpanRequest(
            namespace_id=self.room.id, format=form.to_proto(), **fields
        )
        answer: node_pb2.OpenSpanResponse = self.say("open_span", request)
        return answer

    def attend(self, call: Call) -> node_pb2.AttendResponse:
        answer: node_pb2.AttendResponse = self.say("attend", call.message())
        return answer


def parts(answer: node_pb2.AttendResponse, call: Call) -> list[Partial]:
    """The answer, query by query."""
    heads = call.queries[0].vectors.shape[1]
    o = np.frombuffer(answer.outputs, np.float32)
    lse = np.frombuffer(answer.lse, np.float32).reshape(-1, heads)
    o = o.reshape(len(lse), heads, -1)
    found, at = [], 0
    for query in call.queries:
        end = at + len(query.vectors)
        found.append(Partial(o[at:end], lse[at:end]))
        at = end
    return found


def check(answer: node_pb2.AttendResponse, call: Call, tolerance: float = 5e-6) -> None:
    """All of it is here, and right."""
    assert not answer.gaps
    for found, expected in zip(parts(answer, call), call.expected(), strict=True):
        assert np.array_equal(found.lse == -np.inf, expected.lse == -np.inf)
        np.testing.assert_allclose(found.lse, expected.lse, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(found.o, expected.o, rtol=0, atol=tolerance * 4)


def rows(form: Format, count: int, group: int = 2, seed: int = 7) -> Array:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, form.kv_heads * group, form.head_dim), np.float32)


@contextmanager
def asker(address: str, space: Namespace = SPACE) -> Iterator[Asker]:
    client = kvfabric_client.connect(address, timeout_s=TIMEOUT_S, tenant=space.tenant)
    try:
        yield Asker(client, space)
    finally:
        client.close()
