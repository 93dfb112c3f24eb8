"""The calls on attention: spans, and what is computed over them.

It runs on the core's thread: it looks up what lies here and holds it, has it computed in the
engine's thread, and answers.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from kvfabric.attention.shape import AttentionShape, attention_shape
from kvfabric.errors import Conflict, Denied, Refused, Unsupported
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Format, Key, NamespaceId, Status
from kvfabric_nodes.attention import asked as asking
from kvfabric_nodes.attention.asked import Asked, Options
from kvfabric_nodes.attention.attending import Attend, compute
from kvfabric_nodes.attention.engine import Engine, Task
from kvfabric_nodes.attention.kernels.choice import Kernels
from kvfabric_nodes.attention.spans import Placed, Span, Spans
from kvfabric_nodes.sequences.sequence import OpenSequence
from kvfabric_nodes.serving.handler import Call, Handler, checked_keys, seconds
from kvfabric_nodes.store.promises import Session

Opened = tuple[Span, OpenSequence | None]


class AttentionCalls:
    """See the module. Without an engine this node computes no attention."""

    def __init__(
        self, handler: Handler, spans: Spans, engine: Engine | None, kernels: Kernels
    ) -> None:
        self.spans = spans
        self._handler = handler
        self._core = handler.core
        self._engine = engine
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
        self._admit(session)
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
        shape = attention_shape(_format(request.format), request.value_dim)
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
        engine = self._admit(session)
        opened = self._opened(session, request.queries)
        options = asking.options_of(request, opened[0][0].shape)
        attend = Attend(options, self._asked(request, opened, options))
        cuts = [(sequence, sequence.cuts) for _, sequence in opened if sequence is not None]
        reading = self._core.begin_reading(
            [extent for one in attend.asked for extent in one.here.extents]
        )
        task = Task(
            attend,
            options,
            self._handler.clock.now() + seconds(request.deadline_ms),
            self._compute,
            partial(self._core.end_reading, reading),
        )
        engine.submit(task)
        return self._answer(task, attend, cuts, response)

    async def _answer(
        self,
        task: Task,
        attend: Attend,
        cuts: Sequence[tuple[OpenSequence, int]],
        response: node_pb2.AttendResponse,
    ) -> None:
        await task.computed()
        for sequence, count in cuts:
            if not sequence.open or sequence.cuts != count:  # its open blocks are written anew
                raise Conflict(
                    f"sequence {sequence.id} was cut or ended while it was attended; ask again"
                )
        _put(response, attend)
        self._count(attend)

    def _count(self, attend: Attend) -> None:
        tally = self._handler.metrics.attention
        tally.rows += sum(len(one.vectors) for one in attend.asked)
        tally.stacked += len(attend.asked) if attend.stacked > 1 else 0
        tally.gap_tokens += sum(end - first for one in attend.asked for first, end in one.here.gaps)

    def _asked(
        self, request: node_pb2.AttendRequest, opened: Sequence[Opened], options: Options
    ) -> list[Asked]:
        queries, shape = request.queries, options.shape
        rows = sum(query.rows for query in queries)
        asking.check_outputs(rows, options.query_heads, shape.value_dim)
        vectors = asking.vectors_of(
            request.vectors, queries, options.query_heads, shape.key_dim, options.query_dtype
        )
        found = []
        for query, (span, sequence), own in zip(queries, opened, vectors, strict=True):
            sight = asking.sight_of(query, request.window, request.sinks)
            otherwise = span.ranges if sequence is None else [(0, query.visible)]
            ranges = asking.ranges_of(query, otherwise)
            blocks = self.spans.blocks(span, sequence, options.layer)
            found.append(asking.asked(own, sight, ranges, blocks))
        return found

    def _opened(self, session: Session, queries: Sequence[node_pb2.SpanQuery]) -> list[Opened]:
        """The spans of these, which have one shape."""
        asking.check_queries(queries)
        now_s = self._handler.clock.now()
        spans = [self.spans.find(session, query.span) for query in queries]
        for span in spans:
            if span.shape != spans[0].shape:
                raise Refused(
                    f"spans {spans[0].id} and {span.id} have different formats; ask for each "
                    "format in a call of its own"
                )
        return [(span, self.spans.sequence_of(session, span, now_s)) for span in spans]

    def _admit(self, session: Session) -> Engine:
        if session.between_nodes:
            raise Denied("attention is for clients; this session is another node's")
        if self._engine is None:
            raise Unsupported(
                "this node computes no attention: its attention_threads are 0; read its shards"
            )
        return self._engine


def _format(form: types_pb2.Format) -> Format:
    return Format(
        dtype=form.dtype,
        block_tokens=form.block_tokens,
        packing=form.packing,
        layers=form.layers,
        kv_heads=form.kv_heads,
        head_dim=form.head_dim,
        kind=form.kind,
    )


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
    response.outputs = attend.outputs.tobytes()
    response.lse = attend.lse.tobytes()
    response.tokens.extend([one.here.pieces.tokens for one in attend.asked])
    for index, one in enumerate(attend.asked):
        for first, end in one.here.gaps:
            response.gaps.add(query=index, first_token=first, end_token=end)
    response.kernel = attend.kernel
    response.kernel_us = int(attend.kernel_s * 1e6)
    response.stacked = attend.stacked
    response.read_bytes = attend.read_bytes
