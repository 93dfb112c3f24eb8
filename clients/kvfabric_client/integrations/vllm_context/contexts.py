"""The worker's side: a sequence per request, attended and appended to layer by layer.

A request for which that fails is given up: its rows are zero from then on, and the engine is told
by the block of its last token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvfabric.errors import Broken, DeadlineExceeded, FabricError, Unreachable
from kvfabric.types import Format
from kvfabric_client.attention.answers import Attended
from kvfabric_client.attention.calls import attend_batch
from kvfabric_client.attention.queries import Query
from kvfabric_client.integrations.vllm_context.messages import Rows, StepRows
from kvfabric_client.integrations.vllm_context.rooms import Rooms
from kvfabric_client.sequence import Sequence as FabricSequence

log = logging.getLogger("vllm.kvfabric")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's rows in one layer: `q` [rows, heads, dim], `k`, `v` [KV heads, rows, dim],
    tensors in the engine's memory."""

    block: int
    q: object
    k: object
    v: object


class Contexts:
    """Called by the thread that computes."""

    def __init__(self, rooms: Rooms, form: Format) -> None:
        self._rooms = rooms
        self._form = form
        self._sequences: dict[str, FabricSequence] = {}
        self._step: dict[int, Rows] = {}
        self._failed: set[int] = set()  # blocks, of this step

    def begin(self, step: StepRows) -> None:
        """The rows of the step that is computed next; has a sequence ready for each."""
        self._step = step.by_block
        for block, rows in self._step.items():
            try:
                self._ready(rows)
            except FabricError as error:
                self._give_up(block, error)

    def _ready(self, rows: Rows) -> None:
        sequence = self._sequences.get(rows.request_id)
        if sequence is None:
            room = self._rooms.room(rows.salt)
            sequence = room.sequence(self._form, tokens=rows.before)
            self._sequences[rows.request_id] = sequence
        if sequence.length > rows.start:  # computed again after a preemption
            sequence.truncate(rows.start)
        if sequence.length < rows.start:
            raise Broken(f"the KV of tokens {sequence.length} to {rows.start - 1} is gone")

    def attend(
        self, layer: int, asked: Sequence[Asked], scale: float, softcap: float
    ) -> dict[int, Attended]:
        """What the rows of this layer come to, by block, with their own KV appended; nothing for
        requests that were given up."""
        alive = [one for one in asked if one.block not in self._failed]
        try:
            answers = attend_batch(
                [self._query(one) for one in alive], layer=layer, scale=scale, softcap=softcap
            )
        except FabricError as error:
            if len(alive) > 1 and not isinstance(error, (DeadlineExceeded, Unreachable)):
                # One that finds no room, say: what it gives back is room for the others.
                alone = (self.attend(layer, [one], scale, softcap) for one in alive)
                return {block: answer for one in alone for block, answer in one.items()}
            for one in alive:
                self._give_up(one.block, error)
            return {}
        found: dict[int, Attended] = {}
        for one, answer in zip(alive, answers, strict=True):
            if isinstance(answer, Attended):
                found[one.block] = answer
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
        log.error("kvfabric: request %s ends with an error: %s", rows.request_id, error)
        self._failed.add(block)
        self.end([rows.request_id])

    def take_failed(self) -> set[int]:
        """Blocks of the requests that were given up in this step."""
        failed, self._failed = self._failed, set()
        return failed

    def end(self, request_ids: Iterable[str]) -> None:
        """Their sealed blocks stay as cache."""
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                sequence.close()

    def close(self) -> None:
        self.end(list(self._sequences))
        self._rooms.close()
