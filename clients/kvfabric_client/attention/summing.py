"""The operator `reduce`: weighted sums of keys or values, computed where these lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.merge import Floats
from kvfabric.attention.shape import AttentionShape
from kvfabric.errors import Broken, Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric_client.attention.context import Context
from kvfabric_client.attention.fetched import Fetched
from kvfabric_client.attention.operator import MAX_OUTPUT_BYTES, Ask, Call, Item, packs, slices
from kvfabric_client.attention.runs import Runs, joined

MAX_SUMMED = 65536  # tokens of a call


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """One weighted sum, over tokens in any order; a token that comes twice counts twice."""

    tokens: NDArray[np.int64]
    weights: Floats


def sum_of(tokens: Any, weights: Any) -> Sum:
    """Refused where these are not one weight per position."""
    at, factors = np.asarray(tokens, np.int64), np.asarray(weights, np.float32)
    if at.ndim != 1 or at.shape != factors.shape or (len(at) and at.min() < 0):
        raise Refused(
            f"tokens of shape {list(at.shape)} with weights of {list(factors.shape)}; give a "
            "weight for each position"
        )
    return Sum(at, factors)


@dataclass(slots=True)
class Reduce:
    """An `Operator`. An item's rows are tokens of its sum. `outputs`: [sums, KV heads, dim]."""

    context: Context
    shape: AttentionShape
    sums: Sequence[Sum]
    layer: int
    values: bool
    name: str = "reduce"
    outputs: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = np.zeros((len(self.sums), self.shape.kv_heads, self._dim), np.float32)

    @property
    def _dim(self) -> int:
        return self.shape.value_dim if self.values else self.shape.key_dim

    def items(self) -> list[Item]:
        return [
            Item(self.context, number, first, rows, _runs(one.tokens[first : first + rows]))
            for number, one in enumerate(self.sums)
            for first, rows in slices(len(one.tokens), MAX_SUMMED)
        ]

    def calls(self, asks: Sequence[Ask], deadline_ms: int) -> Iterator[Call]:
        most = MAX_OUTPUT_BYTES // (4 * self.shape.kv_heads * (self._dim + 1))
        for some in packs(asks, MAX_SUMMED, most):
            sums = [self._asked(ask) for ask in some]
            yield Call(
                node_pb2.ReduceRequest(
                    layer=self.layer, values=self.values, deadline_ms=deadline_ms, sums=sums
                ),
                some,
            )

    def _asked(self, ask: Ask) -> node_pb2.ReduceRequest.Sum:
        item, one = ask.item, self.sums[ask.item.query]
        assert ask.span is not None
        tokens = one.tokens[item.first : item.first + item.rows]
        firsts, ends = np.array(ask.runs, np.int64).T
        mine = tokens < ends[np.searchsorted(firsts, tokens, "right") - 1]
        mine &= tokens >= firsts[0]
        weights = one.weights[item.first : item.first + item.rows]
        return node_pb2.ReduceRequest.Sum(
            span=ask.span.id, tokens=tokens[mine].tolist(), weights=weights[mine].tolist()
        )

    def again(self, asks: Sequence[Ask]) -> None:
        """It is not prepared."""

    def take(self, asks: Sequence[Ask], answer: Any, node: str, gaps: Sequence[Runs]) -> None:
        size = self.shape.kv_heads * self._dim
        if len(answer.outputs) != 4 * size * len(asks):
            raise Broken(f"node {node} answered {len(answer.outputs)} bytes for {len(asks)} sums")
        outputs = np.frombuffer(answer.outputs, np.float32).reshape(-1, *self.outputs.shape[1:])
        for ask, output in zip(asks, outputs, strict=True):
            self.outputs[ask.item.query] += output

    def compute(self, ask: Ask, some: Fetched) -> None:
        item, one = ask.item, self.sums[ask.item.query]
        tokens = one.tokens[item.first : item.first + item.rows]
        weights = one.weights[item.first : item.first + item.rows]
        at = np.minimum(some.positions.searchsorted(tokens), len(some.positions) - 1)
        mine = some.positions[at] == tokens
        plane = some.values[..., : self.shape.value_dim] if self.values else some.keys
        self.outputs[item.query] += np.einsum("t,htd->hd", weights[mine], plane[:, at[mine]])


def _runs(tokens: NDArray[np.int64]) -> Runs:
    at = np.unique(tokens)
    starts = np.flatnonzero(np.diff(at, prepend=-2) > 1)
    ends = np.append(starts[1:], len(at))
    return joined(zip(at[starts].tolist(), (at[ends - 1] + 1).tolist(), strict=True))
