"""The worker's side: a sequence per request, attended and appended to layer by layer.

A request for which that fails is given up. The engine is told by a block that it takes for
computed, and drops what the step comes to. Of a request's first step it takes none for computed:
these rows need nothing but each other, and are attended here, so that they are right; the next step
fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvfabric.attention.masks import sight
from kvfabric.attention.merge import Floats
from kvfabric.errors import DeadlineExceeded, FabricError, Retry, Unreachable
from kvfabric.types import Format
from kvfabric_client.attention.answers import Attended
from kvfabric_client.attention.calls import attend_batch
from kvfabric_client.attention.local import attend_new
from kvfabric_client.attention.queries import Query
from kvfabric_client.integrations.vllm_context.messages import NO_BLOCK, Losses, Rows, StepRows
from kvfabric_client.integrations.vllm_context.rooms import Rooms
from kvfabric_client.sequence import Sequence as FabricSequence
from kvfabric_client.sequence_reads import Missing

log = logging.getLogger("vllm.kvfabric")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's rows in one layer: `q` [rows, heads, dim], `k`, `v` [KV heads, rows, dim],
    tensors in the engine's memory."""

    block: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Contexts:
    """Called by the thread that computes."""

    def __init__(self, rooms: Rooms, form: Format) -> None:
        self._rooms = rooms
        self._form = form
        self._sequences: dict[str, FabricSequence] = {}
        self._step: dict[int, Rows] = {}
        self._failed: set[int] = set()  # blocks, of this step
        self._unsaid: dict[str, FabricError] = {}  # of requests given up in their first step
        self._losses = Losses()

    def begin(self, step: StepRows) -> None:
        """The rows of the step that is computed next; has a sequence ready for each."""
        self._step = step.by_block
        for block, rows in self._step.items():
            try:
                self._ready(rows)
            except FabricError as error:
                self._give_up(block, error)

    def _ready(self, rows: Rows) -> None:
        if rows.before is not None:
            self.end([rows.request_id])
            room = self._rooms.room(rows.salt)
            self._sequences[rows.request_id] = room.sequence(self._form, tokens=rows.before)
        if rows.request_id in self._unsaid:
            raise self._unsaid[rows.request_id]
        length = self._sequences[rows.request_id].length
        if length < rows.start:
            raise Missing([range(length, rows.start)])

    def attend(
        self, layer: int, asked: Sequence[Asked], scale: float, softcap: float
    ) -> dict[int, Floats]:
        """What the rows of this layer come to, by block, with their own KV appended; nothing for
        requests that were given up, where it would matter."""
        alive = [one for one in asked if one.block not in self._failed]
        found = self._attend(layer, alive, scale, softcap) if alive else {}
        for one in asked:
            if one.block in self._failed and not self._step[one.block].start:
                found[one.block] = _attend_alone(one, scale, softcap)
        return found

    def _attend(
        self, layer: int, alive: Sequence[Asked], scale: float, softcap: float
    ) -> dict[int, Floats]:
        try:
            answers = attend_batch(
                [self._query(one) for one in alive], layer=layer, scale=scale, softcap=softcap
            )
        except FabricError as error:
            if len(alive) > 1 and not isinstance(error, (DeadlineExceeded, Unreachable)):
                # One that finds no room, say: what it gives back is room for the others.
                alone = (self._attend(layer, [one], scale, softcap) for one in alive)
                return {block: answer for one in alone for block, answer in one.items()}
            for one in alive:
                self._give_up(one.block, error)
            return {}
        found: dict[int, Floats] = {}
        for one, answer in zip(alive, answers, strict=True):
            if isinstance(answer, Attended):
                found[one.block] = answer.o
            else:
                self._give_up(one.block, answer)
        return found

    def _query(self, asked: Asked) -> Query:
        rows = self._step[asked.block]
        positions = range(rows.start, rows.start + len(rows.token_ids))
        new = (rows.token_ids, asked.k, asked.v)
        return Query(self._sequences[rows.request_id], asked.q, positions=positions, new=new)

    def _give_up(self, block: int, error: FabricError) -> None:
        rows = self._step[block]
        log.error("kvfabric: request %s cannot use its KV: %s", rows.request_id, error)
        self._failed.add(block)
        first = self._first_lost(rows, error)
        self.end([rows.request_id])
        if not rows.start:
            self._unsaid[rows.request_id] = error
            return
        self._losses.first[rows.request_id] = first
        if isinstance(error, Retry):
            self._losses.crowded.add(rows.request_id)

    def _first_lost(self, rows: Rows, error: FabricError) -> int | None:
        if isinstance(error, Missing):
            return error.ranges[0].start
        sequence = self._sequences.get(rows.request_id)
        if sequence is not None and sequence.length < rows.start:  # it was opened elsewhere
            return sequence.length
        return None

    def take_failed(self) -> set[int]:
        """Of each request that was given up in this step the block that says so."""
        failed, self._failed = self._failed, set()
        return {self._step[block].held for block in failed} - {NO_BLOCK}

    def take_losses(self) -> Losses | None:
        losses, self._losses = self._losses, Losses()
        return losses if losses.first else None

    def end(self, request_ids: Iterable[str]) -> None:
        """Their sealed blocks stay as cache."""
        for request_id in request_ids:
            self._unsaid.pop(request_id, None)
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                sequence.close()

    def close(self) -> None:
        self.end(list(self._sequences))
        self._rooms.close()


def _attend_alone(asked: Asked, scale: float, softcap: float) -> Floats:
    """The rows of a context that has no others."""
    q, k, v = (np.asarray(each.float()) for each in (asked.q, asked.k, asked.v))
    at = np.arange(len(q))
    return attend_new(q, k, v, at, sight(len(q), at, len(q)), scale, softcap).o
