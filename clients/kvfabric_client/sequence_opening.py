"""Opening a sequence at a node: a new one, one that is resumed, or wherever there is a place."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfabric.errors import Conflict, FabricError, Refused, Retry, Unreachable
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import BATCH_KEYS
from kvfabric_client.blocks import BlockShape
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link
from kvfabric_client.outline import Sealed
from kvfabric_client.sequence_home import Home

if TYPE_CHECKING:
    from kvfabric_client.room import Room

NO_BLOCKS = (1 << 32) - 1  # as the first of those to tell of


@dataclass(frozen=True, slots=True)
class Opening:
    """What it takes to open a sequence somewhere: a room, and the sealed blocks it begins with."""

    room: Room
    shape: BlockShape
    blocks: Sequence[Sealed]
    idle_s: float

    def again(self, lost: Home, deadline: Deadline) -> Home:
        """At the node that still has the sequence, whose session with its writer has ended.

        Conflict where another writer has taken it over meanwhile.
        """

        def call(link: Link) -> Home:
            link.open(self.room.namespace, self.room.id, deadline.at_s)
            request = node_pb2.DescribeRequest(sequence=lost.sequence, first_block=NO_BLOCKS)
            epoch = link.call("describe", request, deadline.at_s).describe_response.epoch
            if epoch != lost.epoch:
                raise Conflict(
                    f"another writer has taken sequence {lost.sequence} over, in epoch {epoch}; "
                    f"this one is in {lost.epoch}: close it"
                )
            return self._open(link, deadline, resume=lost.sequence)[0]

        return self.room.client.at(lost.address, call, deadline)

    def at(self, address: str, deadline: Deadline, *, but: str = "") -> tuple[Home, int]:
        """At one node: its writer's side, and the tokens up to the first block that nobody has.

        Retry where this is the node of the name `but`.
        """

        def call(link: Link) -> tuple[Home, int]:
            if link.node == but:
                raise Retry(f"node {but} is to be left")
            link.open(self.room.namespace, self.room.id, deadline.at_s)
            return self._open(link, deadline)

        home, length = self.room.client.at(address, call, deadline)
        if length < (self.blocks[-1].end if self.blocks else 0):
            home.truncate(length, deadline)  # what follows a hole is to be computed again
        return home, length

    def anywhere(self, deadline: Deadline, *, but: str = "") -> tuple[Home, int]:
        """At the first node that takes it, those of this host first. `but`: not at this one."""
        failure: FabricError | None = None
        for address in self.room.client.addresses(deadline):
            try:
                return self.at(address, deadline, but=but)
            except Retry as error:
                deadline.check()
                failure = failure or error
        raise failure or Unreachable(
            "no node takes this sequence; start one with `kvfabric up`, or set KVFABRIC_HOME"
        )

    def _open(self, link: Link, deadline: Deadline, resume: int = 0) -> tuple[Home, int]:
        if resume:
            opened = self._call(link, deadline, (), resume)
        else:
            opened = self._call(link, deadline, self.blocks[:BATCH_KEYS])
            try:
                self._go_on(link, deadline, opened)
            except FabricError:
                self._close(link, deadline, opened)
                raise
        idle_s = opened.idle_ms / 1000 or self.idle_s
        home = Home(self.room, self.shape, link, opened.sequence, opened.epoch, idle_s)
        return home, opened.length

    def _go_on(self, link: Link, deadline: Deadline, opened: node_pb2.OpenSequenceResponse) -> None:
        """The blocks that the first call could not take, up to the first that nobody has."""
        for start in range(BATCH_KEYS, len(self.blocks), BATCH_KEYS):
            if opened.length < self.blocks[start].start:
                return
            some = self.blocks[start : start + BATCH_KEYS]
            try:
                opened.length = self._call(link, deadline, some, opened.sequence).length
            except Refused:  # by a node of an earlier version: they are appended again
                return

    def _close(self, link: Link, deadline: Deadline, opened: node_pb2.OpenSequenceResponse) -> None:
        """Nobody will know of it."""
        request = node_pb2.CloseSequenceRequest(sequence=opened.sequence, epoch=opened.epoch)
        with contextlib.suppress(FabricError):  # then it ends by itself
            link.call("close_sequence", request, deadline.at_s)

    def _call(
        self, link: Link, deadline: Deadline, blocks: Sequence[Sealed], resume: int = 0
    ) -> node_pb2.OpenSequenceResponse:
        shape = self.shape
        request = node_pb2.OpenSequenceRequest(
            namespace_id=self.room.id,
            size_bytes=shape.size_bytes,
            layers=shape.layers,
            block_tokens=shape.block_tokens,
            idle_ms=milliseconds(self.idle_s),
            resume=resume,
            keys=[block.key for block in blocks],
        )
        if any(block.tokens < shape.block_tokens for block in blocks):
            request.tokens.extend(block.tokens for block in blocks)
        return link.call("open_sequence", request, deadline.at_s).open_sequence_response
