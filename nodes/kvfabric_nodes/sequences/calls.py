"""The calls on sequences: checks what the messages say, asks the core, moves the bytes.

It runs on the core's thread. A call that has to wait (for room on other nodes, for a block
to come home, for checksums) looks at everything anew afterwards: meanwhile its sequence may
have ended or found another writer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any

from kvfabric import checksums
from kvfabric.errors import Conflict, Denied, Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.sequences.core import Sequences
from kvfabric_nodes.sequences.cuts import CutCalls
from kvfabric_nodes.sequences.room import SequenceRoom, put_tails
from kvfabric_nodes.sequences.sequence import Block, OpenSequence, Shape
from kvfabric_nodes.serving.handler import (
    INLINE_VERIFY_BYTES,
    MAX_LAYERS,
    Call,
    Handler,
    checked_keys,
    seconds,
)
from kvfabric_nodes.store.filling import Fill
from kvfabric_nodes.store.promises import Session

MAX_APPEND_BYTES = 512 << 10  # of an append's payload
MAX_APPEND_PIECES = 8192
DESCRIBED_BLOCKS = 8192  # in one answer
ATTEMPTS = 64  # of one extend, each after it was told that there is room now


class SequenceCalls:
    """See the module. `room` is where lending takes part, where it is on."""

    def __init__(self, handler: Handler, sequences: Sequences, verifier: Executor) -> None:
        self.sequences = sequences
        self.room = SequenceRoom(handler, sequences)
        self._cuts = CutCalls(handler, self.room)
        self._handler = handler
        self._core = handler.core
        self._verifier = verifier

    def calls(self) -> Mapping[str, Call]:
        """All of them, by their names in lower case."""
        return {
            "open_sequence": self.open_sequence,
            "extend": self.extend,
            "append": self.append,
            "seal": self.seal,
            **self._cuts.calls(),
            "close_sequence": self.close_sequence,
            "describe": self.describe,
        }

    # Begin and end ------------------------------------------------------------------

    def open_sequence(
        self,
        session: Session,
        request: node_pb2.OpenSequenceRequest,
        response: node_pb2.OpenSequenceResponse,
    ) -> Coroutine[Any, Any, None] | None:
        if session.between_nodes:
            raise Denied("sequences are for clients; this session is another node's")
        if request.resume and not request.keys:
            idle_s = request.idle_ms / 1000
            found = self.sequences.resume(session, request.resume, idle_s, self._now())
            self.room.keep(found)
            self._put_opened(found, response)
            return None
        namespace, keys = NamespaceId(request.namespace_id), checked_keys(request.keys)
        if request.resume:
            namespace = self.sequences.find(session, request.resume, self._now()).namespace
        self._core.admit(session, namespace, len(keys))
        room = self._core.shards.room(namespace)
        absent = [key for key in keys if key not in room]
        if absent and self._handler.locate is not None:
            return self._open_later(session, request, response, namespace, keys, absent)
        self._open(session, request, response, namespace, keys, {})
        return None

    async def _open_later(
        self,
        session: Session,
        request: node_pb2.OpenSequenceRequest,
        response: node_pb2.OpenSequenceResponse,
        namespace: NamespaceId,
        keys: list[Key],
        absent: list[Key],
    ) -> None:
        """Asks in one batch where the others lie; what is here stays meanwhile."""
        assert self._handler.locate is not None
        for key in keys:
            self._core.shards.claim(namespace, key)
        try:
            runs = await self._handler.locate(namespace, absent)
            names = [run.node for run in runs for _ in range(run.count)]
            own = self._handler.identity.node
            elsewhere = {key: node for key, node in zip(absent, names, strict=False) if node != own}
            if session.id not in self._core.sessions:
                raise Refused("the session ended while its sequence was being opened")
            self._open(session, request, response, namespace, keys, elsewhere)
        finally:
            for key in keys:
                self._core.end_of_claim(namespace, key, self._now())

    def _open(
        self,
        session: Session,
        request: node_pb2.OpenSequenceRequest,
        response: node_pb2.OpenSequenceResponse,
        namespace: NamespaceId,
        keys: list[Key],
        elsewhere: Mapping[Key, str],
    ) -> None:
        if request.resume:
            shape = self.sequences.find(session, request.resume, self._now()).shape
        else:
            shape = _shape(request, self._core.extents.segment_bytes)
        counts = list(request.tokens) or [shape.block_tokens] * len(keys)
        if len(counts) != len(keys):
            raise Refused(f"{len(counts)} token counts for {len(keys)} keys; give none or one each")
        room = self._core.shards.room(namespace)
        held = [key in room or key in elsewhere for key in keys]
        first_miss = held.index(False) if False in held else len(keys)
        blocks = [
            Block(key, tokens, "" if key in room else elsewhere[key])
            for key, tokens in zip(keys[:first_miss], counts, strict=False)
        ]
        if request.resume:
            sequence = self.sequences.go_on(session, request.resume, blocks, self._now())
        else:
            idle_s = seconds(request.idle_ms)
            sequence = self.sequences.open(session, namespace, shape, blocks, idle_s, self._now())
        self.room.keep(sequence)
        response.statuses.extend([Status.OK if is_held else Status.MISS for is_held in held])
        self._put_opened(sequence, response)

    def _put_opened(self, sequence: OpenSequence, response: node_pb2.OpenSequenceResponse) -> None:
        response.sequence = sequence.id
        response.epoch = sequence.epoch
        response.length = sequence.length
        response.idle_ms = int(sequence.idle_s * 1000)

    def close_sequence(
        self,
        session: Session,
        request: node_pb2.CloseSequenceRequest,
        response: node_pb2.CloseSequenceResponse,
    ) -> None:
        """Safe to repeat. One that lost the sequence lets go of what it had open."""
        self.sequences.let_go(session, request.sequence)
        sequence = self.sequences.all.get(request.sequence)
        if sequence is None or request.epoch < sequence.epoch:
            return
        self._writer(session, request)
        if request.drop:  # where they were lent to, too
            self.room.discard(sequence.namespace, [block.key for block in sequence.blocks])
        self.sequences.end(sequence, self._now(), let_go=True, drop=request.drop)

    # Writing ------------------------------------------------------------------------

    def extend(
        self,
        session: Session,
        request: node_pb2.ExtendRequest,
        response: node_pb2.ExtendResponse,
    ) -> Coroutine[Any, Any, None] | None:
        sequence = self._writer(session, request)
        lacking, reason = self.room.open_blocks(sequence, request.blocks)
        if lacking and self.room.make_room is not None:
            return self._extend_later(session, request, response)
        response.reason = reason
        put_tails(response.tails, sequence)
        return None

    async def _extend_later(
        self,
        session: Session,
        request: node_pb2.ExtendRequest,
        response: node_pb2.ExtendResponse,
    ) -> None:
        """Seeks room until the deadline; answers what there is then."""
        deadline_s = self._now() + self._core.bounded(seconds(request.deadline_ms))
        seeking = True
        for _ in range(ATTEMPTS):
            sequence = self._writer(session, request)
            lacking, reason = self.room.open_blocks(sequence, request.blocks)
            left_s = deadline_s - self._now()
            if not (seeking and lacking and left_s > 0):
                break
            seeking = await self.room.seek(sequence, session.tenant, lacking, left_s)
        response.reason = reason
        put_tails(response.tails, sequence)

    def append(
        self,
        session: Session,
        request: node_pb2.AppendRequest,
        response: node_pb2.AppendResponse,
    ) -> None:
        sequence = self._writer(session, request)
        layers = request.layers or sequence.shape.layers
        told = (request.start, request.tokens, request.first_layer, layers)
        pieces = self._pieces(sequence, request)
        late = sequence.repeats(*told)
        sequence.append(*told)
        if not late:
            data = memoryview(request.payload)
            for view in pieces:
                view[:], data = data[: len(view)], data[len(view) :]
        sequence.show(request.first_layer, layers)
        response.length = sequence.length
        response.draining = self._core.draining

    def _pieces(self, sequence: OpenSequence, request: node_pb2.AppendRequest) -> list[memoryview]:
        """Where the payload goes. Refused where it does not fit into the open blocks."""
        count, size_bytes = len(request.blocks), sequence.shape.size_bytes
        if not count == len(request.offsets) == len(request.size_bytes):
            raise Refused(
                f"{count} blocks, {len(request.offsets)} offsets and {len(request.size_bytes)} "
                "sizes; give one of each per piece"
            )
        if count > MAX_APPEND_PIECES or len(request.payload) > MAX_APPEND_BYTES:
            raise Refused(
                f"{count} pieces of {len(request.payload)} bytes; an append has at most "
                f"{MAX_APPEND_PIECES} of {MAX_APPEND_BYTES} in all"
            )
        if sum(request.size_bytes) != len(request.payload):
            raise Refused(
                f"pieces of {sum(request.size_bytes)} bytes, but {len(request.payload)} of payload"
            )
        views: list[memoryview] = []
        for block, start, length in zip(
            request.blocks, request.offsets, request.size_bytes, strict=True
        ):
            if block >= len(sequence.tails) or start + length > size_bytes:
                raise Refused(
                    f"bytes {start} to {start + length} of open block {block}: there are "
                    f"{len(sequence.tails)}, of {size_bytes} bytes; extend first"
                )
            tail = sequence.tails[block]
            views.append(self.room.view(tail.extent, sequence.shape)[start : start + length])
        return views

    def seal(
        self, session: Session, request: node_pb2.SealRequest, response: node_pb2.SealResponse
    ) -> Coroutine[Any, Any, None] | None:
        sequence = self._writer(session, request)
        fills = self._fills(session, sequence, request)
        if not session.checked or sum(len(f.view) for f in fills) <= INLINE_VERIFY_BYTES:
            wrong = {} if not session.checked else {f.index: f.wrong() for f in fills}
            self._seal(sequence, request, fills, wrong, response)
            return None
        return self._verify_and_seal(session, sequence, request, fills, response)

    async def _verify_and_seal(
        self,
        session: Session,
        sequence: OpenSequence,
        request: node_pb2.SealRequest,
        fills: list[Fill],
        response: node_pb2.SealResponse,
    ) -> None:
        tails = sequence.tails[: len(fills)]
        sequence.calls += 1
        try:
            wrong = await asyncio.get_running_loop().run_in_executor(
                self._verifier, lambda: {fill.index: fill.wrong() for fill in fills}
            )
        finally:
            sequence.calls -= 1
        self._writer(session, request)
        if sequence.tails[: len(fills)] != tails:
            raise Conflict(
                f"sequence {sequence.id} was changed by another call while its blocks were "
                "verified; look again"
            )
        self._seal(sequence, request, fills, wrong, response)

    def _fills(
        self, session: Session, sequence: OpenSequence, request: node_pb2.SealRequest
    ) -> list[Fill]:
        """What the writer says of the first open blocks."""
        keys, shape = checked_keys(request.keys), sequence.shape
        self._core.admit(session, sequence.namespace, len(keys))
        self.sequences.sealable(sequence, keys, request.tokens)
        parts = len(checksums.parts(shape.size_bytes, shape.layers)) if session.checked else 0
        if session.checked and len(request.checksums) != parts * len(keys):
            self._handler.metrics.refusals["length"] += 1
            raise Refused(
                f"{len(request.checksums)} checksums for {len(keys)} blocks of {parts} layer "
                "parts each"
            )
        sums = list(request.checksums)
        return [
            Fill(
                index,
                self.room.view(tail.extent, shape),
                shape.layers,
                sums[index * parts : (index + 1) * parts],
            )
            for index, tail in enumerate(sequence.tails[: len(keys)])
        ]

    def _seal(
        self,
        sequence: OpenSequence,
        request: node_pb2.SealRequest,
        fills: list[Fill],
        wrong: Mapping[int, str],
        response: node_pb2.SealResponse,
    ) -> None:
        """Block by block, up to the first that is wrong: that one and the others stay open."""
        keys = checked_keys(request.keys)
        counts = self.sequences.sealable(sequence, keys, request.tokens)
        for fill, key, tokens in zip(fills, keys, counts, strict=True):
            reason = wrong.get(fill.index, "")
            if reason:
                self._handler.metrics.mismatches["commit"] += 1
                self._handler.metrics.refusals["checksum"] += 1
                response.reasons[fill.index] = reason
                break
            grant = self.sequences.seal(sequence, key, tokens, fill.expected, self._now())
            response.statuses.append(grant.status)
        response.statuses.extend([Status.REFUSED] * (len(keys) - len(response.statuses)))
        put_tails(response.tails, sequence)

    # Telling ------------------------------------------------------------------------

    def describe(
        self,
        session: Session,
        request: node_pb2.DescribeRequest,
        response: node_pb2.DescribeResponse,
    ) -> None:
        sequence = self.sequences.find(session, request.sequence, self._now())
        if request.settle:
            response.settled = self.sequences.settle(session, sequence, request.settle)
        response.length = sequence.length
        response.epoch = sequence.epoch
        response.block_tokens = sequence.shape.block_tokens
        response.blocks = len(sequence.blocks)
        first = request.first_block
        told = sequence.blocks[first : first + DESCRIBED_BLOCKS]
        names = [self.room.place(sequence.namespace, block) for block in told]
        nodes = {name: index for index, name in enumerate(dict.fromkeys(filter(None, names)))}
        response.keys.extend([block.key for block in told])
        response.tokens.extend([block.tokens for block in told])
        response.place.extend([nodes.get(name, len(nodes)) for name in names])
        response.nodes.extend(nodes)
        if sequence.ahead:
            response.visible.extend(map(sequence.visible, range(sequence.shape.layers)))
        put_tails(response.tails, sequence)

    # Inside -------------------------------------------------------------------------

    def _now(self) -> float:
        return self._handler.clock.now()

    def _writer(self, session: Session, request: Any) -> OpenSequence:
        return self.sequences.writer(session, request.sequence, request.epoch, self._now())


def _shape(request: node_pb2.OpenSequenceRequest, segment_bytes: int) -> Shape:
    layers = request.layers or 1
    if layers > MAX_LAYERS:
        raise Refused(f"{layers} layers in a block; the limit is {MAX_LAYERS}")
    if not request.block_tokens:
        raise Refused("a sequence's blocks have at least one token; give block_tokens")
    if request.size_bytes <= segment_bytes:  # else the core refuses it
        checksums.parts(request.size_bytes, layers)  # refuses what cannot be cut
    return Shape(request.size_bytes, layers, request.block_tokens)
