"""The calls top_k and reduce: what they say is checked, and answered when it is computed."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric_nodes.attention import asked as asking
from kvfabric_nodes.attention.asked import Asked
from kvfabric_nodes.attention.desk import Desk, Opened, put_gaps
from kvfabric_nodes.attention.engine import Task
from kvfabric_nodes.attention.scoring import Reduce, Sum, TopK, sum_of, whole_pages
from kvfabric_nodes.attention.spans import MAX_POSITION
from kvfabric_nodes.serving.handler import Call
from kvfabric_nodes.store.promises import Session

MAX_K = 4096
MAX_SUMMED = 65536  # tokens of a reduce
FOUND_BYTES = 16  # at most, of one that is found, in an answer


class OperatorCalls:
    """See the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def calls(self) -> Mapping[str, Call]:
        """All of them, by their names in lower case."""
        return {"top_k": self.top_k, "reduce": self.reduce}

    def top_k(
        self, session: Session, request: node_pb2.TopKRequest, response: node_pb2.TopKResponse
    ) -> Coroutine[Any, Any, None]:
        self._desk.admit(session)
        asking.check_queries(request.queries)
        opened = self._desk.opened(session, [query.span for query in request.queries])
        top = TopK(
            opened.shape,
            request.layer,
            request.k,
            request.page_tokens or 1,
            request.values,
            asking.query_dtype(request.dtype, opened.shape),
            [],
        )
        _check_top(request, top)
        top.asked = self._asked(request, opened, top)
        extents = [extent for one in top.asked for extent in one.here.extents]
        task = self._desk.submit(session, extents, top, None, _compute, request.deadline_ms)
        return self._answer_top(task, opened, top, response)

    def _asked(self, request: node_pb2.TopKRequest, opened: Opened, top: TopK) -> Sequence[Asked]:
        queries, shape = request.queries, top.shape
        dim = shape.value_dim if top.values else shape.key_dim
        vectors = asking.vectors_of(
            request.vectors, queries, request.query_heads, dim, top.query_dtype
        )
        found = []
        for index, query in enumerate(queries):
            blocks, otherwise = opened.blocks(index, top.layer), partial(opened.own, index)
            one = asking.asked(vectors[index], query, blocks, otherwise)
            found.append(Asked(one.vectors, one.sight, whole_pages(one.here, top.page_tokens)))
        return found

    async def _answer_top(
        self, task: Task, opened: Opened, top: TopK, response: node_pb2.TopKResponse
    ) -> None:
        await task.computed()
        opened.check()
        for best in top.best:
            response.counts.append(len(best.scores))
            response.first_tokens.extend(best.first_tokens.tolist())
            response.scores.extend(best.scores.tolist())
        for index, one in enumerate(top.asked):
            put_gaps(response.gaps, index, one.here.gaps)

    def reduce(
        self, session: Session, request: node_pb2.ReduceRequest, response: node_pb2.ReduceResponse
    ) -> Coroutine[Any, Any, None]:
        self._desk.admit(session)
        _check_sums(request)
        opened = self._desk.opened(session, [one.span for one in request.sums])
        shape = opened.shape
        asking.check_layer(request.layer, shape)
        dim = shape.value_dim if request.values else shape.key_dim
        asking.check_outputs(len(request.sums), shape.kv_heads, dim)
        sums = [_sum(opened, index, one, request.layer) for index, one in enumerate(request.sums)]
        work = Reduce(shape, request.layer, request.values, sums)
        extents = [extent for one in sums for extent in one.extents]
        task = self._desk.submit(session, extents, work, None, _compute, request.deadline_ms)
        return self._answer_sums(task, opened, work, response)

    async def _answer_sums(
        self, task: Task, opened: Opened, work: Reduce, response: node_pb2.ReduceResponse
    ) -> None:
        await task.computed()
        opened.check()
        response.outputs = b"".join(one.tobytes() for one in work.outputs)
        for index, one in enumerate(work.sums):
            put_gaps(response.gaps, index, one.gaps)


def _compute(works: Sequence[TopK | Reduce]) -> None:
    for work in works:
        work.compute()


def _check_top(request: node_pb2.TopKRequest, top: TopK) -> None:
    asking.check_layer(request.layer, top.shape)
    top.shape.check_heads(request.query_heads)
    if not 0 < top.k <= MAX_K:
        raise Refused(f"the best {top.k}; give 1 to {MAX_K}")
    if top.page_tokens > top.shape.block_tokens or top.shape.block_tokens % top.page_tokens:
        raise Refused(
            f"pages of {top.page_tokens} tokens in blocks of {top.shape.block_tokens}: the first "
            "must divide the second"
        )
    rows = sum(query.rows for query in request.queries)
    if rows * top.k * FOUND_BYTES > asking.MAX_OUTPUTS_BYTES:
        raise Refused(
            f"the best {top.k} of {rows} rows do not fit into an answer of "
            f"{asking.MAX_OUTPUTS_BYTES} bytes; ask in several calls"
        )


def _check_sums(request: node_pb2.ReduceRequest) -> None:
    if not 0 < len(request.sums) <= asking.MAX_QUERIES:
        raise Refused(f"{len(request.sums)} sums in a call; give 1 to {asking.MAX_QUERIES}")
    tokens = sum(len(one.tokens) for one in request.sums)
    if tokens > MAX_SUMMED:
        raise Refused(f"{tokens} tokens in a call; the limit is {MAX_SUMMED}")
    for index, one in enumerate(request.sums):
        if len(one.tokens) != len(one.weights):
            raise Refused(
                f"sum {index} has {len(one.tokens)} tokens and {len(one.weights)} weights; give "
                "one each"
            )
        if max(one.tokens, default=0) > MAX_POSITION:
            raise Refused(f"position {max(one.tokens)}; the limit is {MAX_POSITION}")


def _sum(opened: Opened, index: int, one: node_pb2.ReduceRequest.Sum, layer: int) -> Sum:
    weights = np.array(one.weights, np.float32)
    if not np.isfinite(weights).all():
        raise Refused(f"sum {index} has a weight that is no number")
    return sum_of(opened.blocks(index, layer), np.array(one.tokens, np.int64), weights)
