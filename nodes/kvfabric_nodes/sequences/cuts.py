"""The calls that cut a sequence: fork, truncate, accept. A block that is cut is copied.

Each is an attempt that does everything or nothing. Where it lacks room, or the block that
it cuts lies elsewhere, that is seen to, and the whole attempt is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from kvfabric.errors import Refused, Retry
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key
from kvfabric_nodes.sequences.room import SequenceRoom, put_tails
from kvfabric_nodes.sequences.sequence import Cut, OpenSequence
from kvfabric_nodes.serving.handler import Call, Handler
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.promises import Lease, Session

CUT_WAIT_S = 5.0  # how long a call may look for room, or for the block that it cuts
ATTEMPTS = 64  # of one call


@dataclass(frozen=True, slots=True)
class Lack:
    """What a call would need first: room for a block, or a block that lies elsewhere."""

    reason: str
    session: Session
    sequence: OpenSequence
    key: Key | None = None


class CutCalls:
    """See the module."""

    def __init__(self, handler: Handler, room: SequenceRoom) -> None:
        self._handler = handler
        self._core = handler.core
        self._room = room
        self._sequences = room.sequences

    def calls(self) -> Mapping[str, Call]:
        return {"fork": self.fork, "accept": self.accept, "truncate": self.truncate}

    def fork(
        self, session: Session, request: node_pb2.ForkRequest, response: node_pb2.ForkResponse
    ) -> Coroutine[Any, Any, None] | None:
        return self._now_or_later(lambda: self._fork(session, request, response))

    def _fork(
        self, session: Session, request: node_pb2.ForkRequest, response: node_pb2.ForkResponse
    ) -> Lack | None:
        parent = self._sequences.find(session, request.sequence, self._now())
        cut = parent.cut(request.tokens)
        source = self._source(session, parent, cut)
        if isinstance(source, Lack):
            return source
        idle_s = request.idle_ms / 1000 or parent.idle_s
        fork = self._sequences.fork(
            session, parent, cut.blocks, idle_s, self._now(), tentative=request.tentative
        )
        if source is not None:
            lacking, reason = self._room.open_blocks(fork, 1)
            if not fork.tails:
                self._sequences.end(fork, self._now(), let_go=True)
                if not lacking:
                    raise Refused(f"{reason}; accept one of them first")
                return Lack(reason, session, parent)
            self._room.copy(source, fork.tails[0].extent, fork.shape)
            fork.append(cut.start, cut.rest, 0, fork.shape.layers)
        response.sequence = fork.id
        response.epoch = fork.epoch
        put_tails(response.tails, fork)
        return None

    def accept(
        self, session: Session, request: node_pb2.AcceptRequest, response: node_pb2.AcceptResponse
    ) -> Coroutine[Any, Any, None] | None:
        return self._now_or_later(lambda: self._accept(session, request, response))

    def _accept(
        self, session: Session, request: node_pb2.AcceptRequest, response: node_pb2.AcceptResponse
    ) -> Lack | None:
        parent = self._writer(session, request)
        taken = parent.forks.get(request.fork, parent)
        if taken is not parent or not request.fork:
            lack = self._cut_off(session, taken, request.tokens)
            if lack is not None:
                return lack
        self._sequences.accept(parent, request.fork, request.tokens, self._now())
        response.length = parent.length
        put_tails(response.tails, parent)
        return None

    def truncate(
        self,
        session: Session,
        request: node_pb2.TruncateRequest,
        response: node_pb2.TruncateResponse,
    ) -> Coroutine[Any, Any, None] | None:
        return self._now_or_later(lambda: self._truncate(session, request, response))

    def _truncate(
        self,
        session: Session,
        request: node_pb2.TruncateRequest,
        response: node_pb2.TruncateResponse,
    ) -> Lack | None:
        sequence = self._writer(session, request)
        lack = self._cut_off(session, sequence, request.tokens)
        if lack is None:
            response.length = sequence.length
            put_tails(response.tails, sequence)
        return lack

    def _cut_off(self, session: Session, sequence: OpenSequence, tokens: int) -> Lack | None:
        """Truncates; what is left of a sealed block lies in an open one then."""
        cut = sequence.cut(tokens)
        if cut.block is not None:
            source = self._source(session, sequence, cut)
            if isinstance(source, Lack):
                return source
            assert source is not None
            lacking, reason = self._room.open_blocks(sequence, 1)
            if not sequence.tails:
                if not lacking:
                    raise Refused(f"{reason}; accept one of them first")
                return Lack(reason, session, sequence)
            sequence.show_cut()  # an open block that was seen is written over
            self._room.copy(source, sequence.tails[0].extent, sequence.shape)
        self._sequences.truncate(sequence, tokens, self._now())
        return None

    def _source(self, session: Session, sequence: OpenSequence, cut: Cut) -> Extent | Lack | None:
        """The extent of the block that is cut; None: none is."""
        if not cut.rest:
            return None
        if cut.block is None:
            if cut.rest > sequence.shape.block_tokens:
                raise Refused(
                    f"{cut.rest} tokens lie in open blocks, of which a fork copies at most one; "
                    "seal the full ones first"
                )
            return sequence.tails[0].extent
        shard = self._core.shards.get(sequence.namespace, cut.block.key)
        if shard is not None:
            if shard.size_bytes != sequence.shape.size_bytes:  # it came from elsewhere
                raise Refused(
                    f"shard {shard.key.hex()[:16]} has {shard.size_bytes} bytes, the sequence's "
                    f"blocks have {sequence.shape.size_bytes}"
                )
            return shard.extent
        where = self._room.place(sequence.namespace, cut.block)
        tokens = f"tokens {cut.start} to {cut.start + cut.block.tokens - 1}"
        if not where:
            raise Refused(f"the block of {tokens} is lost; cut at its begin, or store it again")
        reason = f"the block of {tokens} lies on node {where} and has to come home to be cut"
        return Lack(reason, session, sequence, cut.block.key)

    def _now_or_later(self, attempt: Callable[[], Lack | None]) -> Coroutine[Any, Any, None] | None:
        lack = attempt()
        return None if lack is None else self._later(attempt, lack)

    async def _later(self, attempt: Callable[[], Lack | None], lack: Lack) -> None:
        """Sees to what is lacking, and tries again."""
        deadline_s = self._now() + CUT_WAIT_S
        held: list[Lease] = []
        try:
            for _ in range(ATTEMPTS):
                left_s = deadline_s - self._now()
                if left_s <= 0 or not await self._see_to(lack, left_s, held):
                    break
                again = attempt()
                if again is None:
                    return
                lack = again
        finally:
            self._core.release(lack.session, [lease.id for lease in held])
        raise Retry(f"{lack.reason}; cut between blocks, or try again")

    async def _see_to(self, lack: Lack, within_s: float, held: list[Lease]) -> bool:
        """Whether it is worth another attempt. What came home is `held`, or it would be the
        first to be lent out again for the room that its copy needs."""
        if lack.key is None:
            return await self._room.seek(lack.sequence, lack.session.tenant, 1, within_s)
        home = await self._room.bring_home(lack.sequence, lack.key, within_s)
        if not home and await self._room.seek(lack.sequence, lack.session.tenant, 1, within_s):
            home = await self._room.bring_home(lack.sequence, lack.key, within_s)
        if not home or lack.session.id not in self._core.sessions:
            return False
        lease, _ = self._core.acquire(
            lack.session,
            lack.sequence.namespace,
            [lack.key],
            CUT_WAIT_S,
            self._now(),
            streamed=True,
        )
        held += [lease] if lease else []
        return True

    def _now(self) -> float:
        return self._handler.clock.now()

    def _writer(self, session: Session, request: Any) -> OpenSequence:
        return self._sequences.writer(session, request.sequence, request.epoch, self._now())
