"""The calls on attention: spans, and what is computed over them.

It runs on the core's thread: it looks up what lies here and holds it, has it computed in the
engine's thread, and answers.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kvfabric.attention.shape import AttentionShape, attention_shape
from kvfabric.errors import Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Format, Key, NamespaceId, Status
from kvfabric_nodes.attention import asked as asking
from kvfabric_nodes.attention.asked import Asked, Options
from kvfabric_nodes.attention.attending import Attend, compute
from kvfabric_nodes.attention.desk import Desk, Opened, put_gaps
from kvfabric_nodes.attention.engine import Task
from kvfabric_nodes.attention.kernels.choice import Kernels
from kvfabric_nodes.attention.kernels.native import NativeKernel
from kvfabric_nodes.attention.pieces import cut
from kvfabric_nodes.attention.prepared import Preparations
from kvfabric_nodes.attention.spans import Placed, Span
from kvfabric_nodes.serving.handler import Call, Handler, checked_keys
from kvfabric_nodes.store.promises import Session


class AttentionCalls:
    """See the module."""

    def __init__(
        self,
        handler: Handler,
        desk: Desk,
        kernels: Kernels,
        preparations: Preparations | None = None,
    ) -> None:
        self.spans = spans = desk.spans
        self._handler = handler
        self._desk = desk
        self._kernels = kernels
        self.preparations = preparations
        self._compute = partial(compute, kernels=kernels)
        handler.metrics.attention.kernels = kernels.flows
        handler.metrics.gauges["spans"] = lambda: spans.count

    def calls(self) -> Mapping[str, Call]:
        """All of them, by their names in lower case."""
        return {
            "open_span": self.open_span,
            "close_span": self.close_span,
            "attend": self.attend,
        }

    def open_span(
        self,
        session: Session,
        request: node_pb2.OpenSpanRequest,
        response: node_pb2.OpenSpanResponse,
    ) -> None:
        self._desk.admit(session)
        keys = checked_keys(request.keys)
        if request.span:
            if request.sequence or not keys:
                raise Refused("give the keys that come to the span")
            shape = self.spans.find(session, request.span).shape
            span = self.spans.extend(session, request.span, _placed(request, keys, shape))
        else:
            span = self._open(session, request, keys)
        response.span = span.id
        here = self.spans.here(span, keys)
        response.statuses.extend([Status.OK if found else Status.MISS for found in here])

    def _open(
        self, session: Session, request: node_pb2.OpenSpanRequest, keys: Sequence[Key]
    ) -> Span:
        namespace = NamespaceId(request.namespace_id)
        shape = attention_shape(Format.from_proto(request.format), request.value_dim)
        if bool(request.sequence) == bool(keys):
            raise Refused("a span is of a sequence or of keys: name one of them")
        if request.sequence:
            return self.spans.open_sequence(
                session, namespace, shape, request.sequence, self._handler.clock.now()
            )
        return self.spans.open_keys(session, namespace, shape, _placed(request, keys, shape))

    def close_span(
        self,
        session: Session,
        request: node_pb2.CloseSpanRequest,
        response: node_pb2.CloseSpanResponse,
    ) -> None:
        self.spans.close(session, request.spans)

    def attend(
        self,
        session: Session,
        request: node_pb2.AttendRequest,
        response: node_pb2.AttendResponse,
    ) -> Coroutine[Any, Any, None]:
        self._desk.admit(session)
        asking.check_queries(request.queries)
        opened = self._desk.opened(session, [query.span for query in request.queries])
        options = asking.options_of(request, opened.shape)
        attend = Attend(options, self._asked(request, opened, options))
        task = self._desk.submit(
            session,
            attend.extents,
            attend,
            options,
            self._compute,
            request.deadline_ms,
        )
        return self._answer(session, request, task, opened, attend, response)

    async def _answer(
        self,
        session: Session,
        request: node_pb2.AttendRequest,
        task: Task,
        opened: Opened,
        attend: Attend,
        response: node_pb2.AttendResponse,
    ) -> None:
        await task.computed()
        opened.check()
        _put(response, attend)
        if request.prepare:
            response.prepared = self._prepare(session, request, opened, attend)
        self._count(attend)

    def _prepare(
        self,
        session: Session,
        request: node_pb2.AttendRequest,
        opened: Opened,
        attend: Attend,
    ) -> int:
        """0 where it cannot be: several queries, rows that see differently far, something that is
        not here, or another kernel than the native one."""
        query, one = request.queries[0], attend.asked[0]
        if self.preparations is None or len(attend.asked) > 1 or query.positions:
            return 0
        blocks, sequence = opened.ahead(0)
        ranges, ends = asking.ranges_ahead(
            query, opened.own(0, query.visible), open_ended=sequence is not None
        )
        here = cut(blocks, ranges)
        missing = here.gaps[:-1] if ends else here.gaps
        if missing or not len(here.pieces):
            return 0
        job = asking.work(replace(attend.options, layer=0), [one], here.pieces)
        if self._kernels.best(job) != NativeKernel.name:
            return 0
        return self.preparations.prepare(
            session, job, request.window, here.extents, sequence, ends=ends
        )

    def _count(self, attend: Attend) -> None:
        tally = self._handler.metrics.attention
        tally.rows += sum(len(one.vectors) for one in attend.asked)
        tally.stacked += len(attend.asked) if attend.stacked > 1 else 0
        tally.gap_tokens += sum(end - first for one in attend.asked for first, end in one.here.gaps)

    def _asked(
        self, request: node_pb2.AttendRequest, opened: Opened, options: Options
    ) -> list[Asked]:
        queries, shape = request.queries, options.shape
        rows = sum(query.rows for query in queries)
        asking.check_outputs(rows, options.query_heads, shape.value_dim)
        vectors = asking.vectors_of(
            request.vectors, queries, options.query_heads, shape.key_dim, options.query_dtype
        )
        found = []
        for index, query in enumerate(queries):
            blocks, otherwise = opened.blocks(index, options.layer), partial(opened.own, index)
            found.append(
                asking.asked(
                    vectors[index], query, blocks, otherwise, request.window, request.sinks
                )
            )
        return found


def _placed(
    request: node_pb2.OpenSpanRequest, keys: Sequence[Key], shape: AttentionShape
) -> list[Placed]:
    tokens = list(request.tokens) or [shape.block_tokens] * len(keys)
    if len(request.first_tokens) != len(keys) or len(tokens) != len(keys):
        raise Refused(
            f"{len(keys)} keys with {len(request.first_tokens)} first tokens and "
            f"{len(request.tokens)} token counts; give a first token each, and no counts or one "
            "each"
        )
    return list(map(Placed, keys, request.first_tokens, tokens))


def _put(response: node_pb2.AttendResponse, attend: Attend) -> None:
    response.outputs = attend.outputs
    response.lse = attend.lse
    response.tokens.extend([one.here.pieces.tokens for one in attend.asked])
    for index, one in enumerate(attend.asked):
        put_gaps(response.gaps, index, one.here.gaps)
    response.kernel = attend.kernel
    response.kernel_us = int(attend.kernel_s * 1e6)
    response.stacked = attend.stacked
    response.read_bytes = attend.read_bytes
