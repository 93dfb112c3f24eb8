"""Attention over what lies on the fabric, which also goes on where KV was lost: the model computes
just these tokens again, and the answer stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from kvfabric.attention.merge import Floats, Partial
from kvfabric.errors import Conflict, Unreachable
from kvfabric.logs import guest_logger
from kvfabric_client import Attended, Missing, Query, attend_batch
from kvfabric_client.integrations.transformers import attention
from kvfabric_client.integrations.transformers.local import Scores, Tensor, causal
from kvfabric_client.integrations.transformers.newest import Run
from kvfabric_client.integrations.transformers.passing import PassingCache
from kvfabric_client.integrations.transformers.rows import Row
from kvfabric_client.sequence import Sequence as FabricSequence

MAX_MENDS = 3  # of one layer of one step
MEND_TOKENS = 256  # computed again at once

log = guest_logger(__name__)


@dataclass(frozen=True, slots=True)
class Ask:
    """Queries of one row, the first at position `start`, over its tokens before `visible`, which
    lie on the fabric. `new`: tokens from `start` on, to be appended; or `local`: attention over
    all from `visible` on. `stored`: up to where tokens go to the fabric in this step."""

    row: Row
    query: Tensor  # [query heads, rows, dim]
    start: int
    visible: int
    stored: int
    new: Run | None = None
    local: Callable[[], Partial] | None = None


@dataclass(slots=True)
class Totals:
    """What a cache's attention took, over all layers and steps."""

    tokens: dict[str, int] = field(default_factory=dict)  # attended, by the node that did
    parts: int = 0  # answers that had some of a query's tokens
    wire_bytes: int = 0
    kernel_s: float = 0.0
    network_s: float = 0.0
    recomputed: int = 0  # tokens whose KV was lost

    def add(self, answers: Sequence[Attended]) -> None:
        """Of one batch."""
        for answer in answers:
            self.parts += len(answer.tokens)
            for node, tokens in answer.tokens.items():
                self.tokens[node] = self.tokens.get(node, 0) + tokens
        traffic = answers[0].traffic
        self.wire_bytes += traffic.wire_bytes
        self.kernel_s += traffic.kernel_s
        self.network_s += traffic.network_s


class Mender:
    """See the module. `totals` counts what it does."""

    def __init__(self, model: PreTrainedModel, totals: Totals) -> None:
        self._model = model
        self._totals = totals

    def attend(self, asks: Sequence[Ask], layer: int, scores: Scores) -> list[Floats]:
        """The output of each, [rows, query heads, dim]. Missing where what was computed again is
        lost again and again."""
        lost: list[tuple[Ask, list[range]]] = []
        for _ in range(1 + MAX_MENDS):
            for ask, ranges in lost:
                self._mend(ask, ranges)
            try:
                answers = _attend(asks, layer, scores)
            except Conflict:  # a home went while its sequence was appended to
                lost = [(ask, gone) for ask in asks if (gone := _gone(ask))]
                if not lost:
                    raise
                continue
            found = [answer for answer in answers if isinstance(answer, Attended)]
            if len(found) == len(asks):
                self._totals.add(found)
                return [answer.o for answer in found]
            lost = [
                (ask, answer.ranges)
                for ask, answer in zip(asks, answers, strict=True)
                if isinstance(answer, Missing)
            ]
        raise Missing([tokens for _, ranges in lost for tokens in ranges])

    def append(self, row: Row, layer: int, run: Run) -> None:
        """Hands a layer's KV of these tokens to the fabric. Safe to repeat."""
        if run.start == run.end:
            return
        ids = row.token_ids[run.start : run.end]
        try:
            row.sequence.append(ids, (run.key, run.value), layer=layer, start=run.start)
        except Conflict:
            if row.sequence.length >= run.start:
                raise
            self._append_again(row, run.end)

    def _mend(self, ask: Ask, lost: Sequence[range]) -> None:
        sequence = ask.row.sequence
        with suppress(Unreachable):  # its home: the next attempt opens it at another node
            for tokens in _lost_blocks(sequence, lost):
                sequence.restore(tokens.start, self._computed(ask.row, tokens))
        if sequence.length < ask.visible:
            self._append_again(ask.row, ask.stored)

    def _append_again(self, row: Row, stored: int) -> None:
        """What was not sealed went with the home node, the earlier layers' part of the step under
        way included."""
        for start in range(row.sequence.length, stored, MEND_TOKENS):
            tokens = range(start, min(stored, start + MEND_TOKENS))
            ids = row.token_ids[tokens.start : tokens.stop]
            for layer, kv in enumerate(self._computed(row, tokens)):
                row.sequence.append(ids, kv, layer=layer, start=start)

    def _computed(self, row: Row, tokens: range) -> list[tuple[Tensor, Tensor]]:
        """(K, V) per layer, each [KV heads, tokens, dim], by a call of the model within its call.
        Its attention to earlier tokens comes from the fabric as well."""
        log.warning("recomputed", first_token=tokens.start, end_token=tokens.stop)
        self._totals.recomputed += len(tokens)
        again = _Again(row, tokens.start, self)
        device = self._model.device
        with attention.under_way(again), torch.no_grad():
            self._model.base_model(
                input_ids=torch.tensor([row.token_ids[tokens.start : tokens.stop]], device=device),
                position_ids=torch.tensor([list(tokens)], device=device),
                past_key_values=PassingCache(row.sequence.shape.layers, tokens.start),
                use_cache=True,
            )
        return again.kv


class _Again:
    """A call that computes KV once more, and keeps it."""

    def __init__(self, row: Row, start: int, mender: Mender) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []
        self._row = row
        self._start = start
        self._mender = mender

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """See `attention.Step`."""
        q, k, v = (one[0].detach().cpu() for one in (query, key, value))
        self.kv.append((k, v))
        ask = Ask(
            self._row,
            q,
            self._start,
            visible=self._start,
            local=lambda: causal(q, k, v, scores),
            stored=self._start,
        )
        (o,) = self._mender.attend([ask], layer, scores)
        return torch.from_numpy(o)[None].to(query)


def _attend(asks: Sequence[Ask], layer: int, scores: Scores) -> list[Attended | Missing]:
    return attend_batch(
        [_query(ask) for ask in asks],
        layer=layer,
        scale=scores.scale,
        softcap=scores.softcap,
        window=scores.window,
    )


def _gone(ask: Ask) -> list[range]:
    """What of the tokens that it needs went with the home node."""
    length = ask.row.sequence.length
    return [range(length, ask.visible)] if length < ask.visible else []


def _query(ask: Ask) -> Query:
    rows = ask.query.shape[1]
    new = ask.new
    return Query(
        ask.row.sequence,
        ask.query.transpose(0, 1),
        positions=np.arange(ask.start, ask.start + rows),
        visible=ask.visible,
        new=(ask.row.token_ids[new.start : new.end], new.key, new.value) if new else None,
        local=ask.local,
    )


def _lost_blocks(sequence: FabricSequence, lost: Sequence[range]) -> Iterator[range]:
    """The sealed blocks of these tokens in order, some of them at once."""
    some: range | None = None
    for place in sequence.blocks() if lost else ():
        if place.key is None or not any(_overlap(place.tokens, one) for one in lost):
            continue
        if some is not None:
            if some.stop == place.tokens.start and place.tokens.stop - some.start <= MEND_TOKENS:
                some = range(some.start, place.tokens.stop)
                continue
            yield some
        some = place.tokens
    if some is not None:
        yield some


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
