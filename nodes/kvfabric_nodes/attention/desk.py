"""What all calls that compute have in common: the spans they are about, what they hold while they
are computed, and whether what they read still stands when they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

from kvfabric.attention.shape import AttentionShape
from kvfabric.errors import Conflict, Denied, Refused, Unsupported
from kvfabric_nodes.attention.engine import Engine, Task
from kvfabric_nodes.attention.pieces import Blocks
from kvfabric_nodes.attention.spans import Span, Spans
from kvfabric_nodes.sequences.sequence import OpenSequence
from kvfabric_nodes.serving.handler import Handler, seconds
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.promises import Session


class Opened:
    """The spans of one call, one per query."""

    def __init__(self, spans: Spans, found: Sequence[tuple[Span, OpenSequence | None]]) -> None:
        self._spans = spans
        self._found = found
        self._cuts = [(sequence, sequence.cuts) for _, sequence in found if sequence is not None]

    @property
    def shape(self) -> AttentionShape:
        return self._found[0][0].shape

    def blocks(self, index: int, layer: int) -> Blocks:
        return self._spans.blocks(*self._found[index], layer)

    def own(self, index: int, visible: int) -> Sequence[tuple[int, int]]:
        """What is asked for where no ranges are."""
        span, sequence = self._found[index]
        return span.ranges if sequence is None else [(0, visible)]

    def ahead(self, index: int) -> tuple[Blocks, OpenSequence | None]:
        """All that lies here, open blocks in full, and of which sequence."""
        span, sequence = self._found[index]
        return self._spans.blocks_ahead(span, sequence), sequence

    def check(self) -> None:
        """Conflict where open blocks may have been written anew."""
        for sequence, count in self._cuts:
            if not sequence.open or sequence.cuts != count:
                raise Conflict(
                    f"sequence {sequence.id} was cut or ended while it was attended; ask again"
                )


class Desk:
    """See the module. Without an engine this node computes no attention."""

    def __init__(self, handler: Handler, spans: Spans, engine: Engine | None) -> None:
        self.spans = spans
        self._handler = handler
        self._engine = engine

    def admit(self, session: Session) -> Engine:
        if session.between_nodes:
            raise Denied("attention is for clients; this session is another node's")
        if self._engine is None:
            raise Unsupported(
                "this node computes no attention: its attention_threads are 0; read its shards"
            )
        return self._engine

    def opened(self, session: Session, span_ids: Iterable[int]) -> Opened:
        """The spans of these, which have one shape."""
        now_s = self._handler.clock.now()
        spans = [self.spans.find(session, span_id) for span_id in span_ids]
        for span in spans[1:]:
            if span.shape != spans[0].shape:
                raise Refused(
                    f"spans {spans[0].id} and {span.id} have different formats; ask for each "
                    "format in a call of its own"
                )
        for span in spans:
            self.spans.use(span, now_s)
        found = [(span, self.spans.sequence_of(session, span, now_s)) for span in spans]
        return Opened(self.spans, found)

    def submit(
        self,
        session: Session,
        extents: list[Extent],
        what: Any,
        kind: Hashable,
        compute: Callable[[Sequence[Any]], None],
        deadline_ms: int,
    ) -> Task:
        """Has it computed; the extents stay as they are until then."""
        engine, core = self.admit(session), self._handler.core
        reading = core.begin_reading(extents)
        deadline_s = self._handler.clock.now() + seconds(deadline_ms)
        task = Task(what, kind, deadline_s, compute, partial(core.end_reading, reading))
        engine.submit(task)
        return task


def put_gaps(gaps: Any, query: int, found: Iterable[tuple[int, int]]) -> None:
    for first, end in found:
        gaps.add(query=query, first_token=first, end_token=end)
