"""Attention over sequences: what of it nodes compute, what is computed here, and the merge."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvfabric.attention.merge import Partial, combine, merge
from kvfabric.errors import Refused
from kvfabric_client.attention.answers import Attended, Pages, Traffic
from kvfabric_client.attention.asking import Asked, ask
from kvfabric_client.attention.exact import Attention
from kvfabric_client.attention.gather import Gather
from kvfabric_client.attention.parts import Options, Part
from kvfabric_client.attention.queries import Query, scale_of, shape_for
from kvfabric_client.attention.runs import Runs, count, joined
from kvfabric_client.attention.sparse import choose
from kvfabric_client.deadline import Deadline
from kvfabric_client.sequence_reads import Missing, SequenceReads


def attend_batch(
    queries: Sequence[Query],
    *,
    layer: int,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: int = 0,
    value_dim: int = 0,
    pages: Pages | None = None,
    timeout_s: float | None = None,
) -> list[Attended | Missing]:
    """`Sequence.attend` for many sequences at once, with one message per node: per query what it
    comes to, or which of its tokens are nowhere.

    All queries share one `traffic`. What several contexts have in common a node reads once.
    """
    if not queries:
        return []
    over = [query.sequences for query in queries]
    some = over[0][0]
    writers = [id(s) for query, own in zip(queries, over, strict=True) if query.new for s in own]
    if len(writers) > len(set(writers)):
        raise Refused("new tokens of one sequence in two queries; give them in one")
    deadline = some.writer.room.client.deadline(timeout_s)
    with _held(over, deadline):
        shape = shape_for(some.shape, value_dim)
        options = Options(layer, scale_of(scale, shape), softcap, window, sinks)
        asked = [
            ask(query, own, options, value_dim, deadline)
            for query, own in zip(queries, over, strict=True)
        ]
        return _Call(asked, options, value_dim, deadline).run(pages)


@dataclass(slots=True)
class _Call:
    asked: list[Asked]
    options: Options
    value_dim: int
    deadline: Deadline
    traffic: Traffic = field(default_factory=Traffic)

    def run(self, pages: Pages | None) -> list[Attended | Missing]:
        parts = [part for one in self.asked for part in one.parts]
        visible = {part: count(part.tokens) for part in parts}
        if pages is not None:
            choose(parts, self.options, self.value_dim, pages, self.deadline)
        attention = Attention(parts, self.options, self.traffic)
        lost: dict[Part, Runs] = {}
        for item, runs in self._gather(attention).run(attention.items(), self._meanwhile):
            lost.setdefault(parts[item.query], []).extend(runs)
        return [self._answer(one, attention, visible, lost) for one in self.asked]

    def _gather(self, attention: Attention) -> Gather:
        return Gather(attention, self.value_dim, self.traffic, self.deadline)

    def _meanwhile(self) -> None:
        """While the nodes compute: new tokens are appended, then attended here."""
        news = [new for one in self.asked for new in one.news]
        for new in news:
            self.traffic.sent_bytes += new.kv_bytes
            self.traffic.wire_bytes += new.append(self.options.layer, self.deadline)
        for new in news:
            new.partial = new.attend(self.options)
        for one in self.asked:
            given = one.query.local
            one.local = given() if callable(given) else given

    def _answer(
        self,
        one: Asked,
        attention: Attention,
        visible: Mapping[Part, int],
        lost: Mapping[Part, Runs],
    ) -> Attended | Missing:
        missing = joined(run for part in one.parts for run in lost.get(part, ()))
        if one.missing or missing:
            return Missing(one.missing or [range(*run) for run in missing])
        heads = [attention.partial(part) for part in one.parts]
        if one.news:
            news = [new.partial for new in one.news if new.partial is not None]
            heads = [combine(pair) for pair in zip(heads, news, strict=True)]
        whole = _beside(heads)
        merged = merge([whole, one.local] if one.local is not None else [whole])
        tokens: dict[str, int] = {}
        for part in one.parts:
            for node, attended in attention.gathered[part].tokens.items():
                tokens[node] = tokens.get(node, 0) + attended
        could = sum(visible[part] for part in one.parts)
        did = sum(count(part.tokens) for part in one.parts)
        share = did / could if could else 1.0
        return Attended(merged.o, merged.lse, tokens, self.traffic, did < could, share)


def _beside(heads: Sequence[Partial]) -> Partial:
    """Partials of different heads as one of all."""
    if len(heads) == 1:
        return heads[0]
    return Partial(
        np.concatenate([part.o for part in heads], axis=1),
        np.concatenate([part.lse for part in heads], axis=1),
    )


def _held(
    over: Sequence[Sequence[SequenceReads]], deadline: Deadline
) -> contextlib.AbstractContextManager[object]:
    """Every sequence, for this thread alone; in one order, so that nobody waits for ever."""
    if len(over) == len(over[0]) == 1:
        return over[0][0].using(deadline.left_s())
    sequences = {id(sequence): sequence for own in over for sequence in own}
    with contextlib.ExitStack() as stack:
        for _, sequence in sorted(sequences.items()):
            stack.enter_context(sequence.using(deadline.left_s()))
        return stack.pop_all()
