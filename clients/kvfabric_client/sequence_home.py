"""A sequence at its home node: the calls of its one writer.

A session that has ended took the open blocks along; the sealed ones stay. What to do then
`sequence` decides.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kvfabric.checksums import checksums
from kvfabric.errors import Broken, Conflict, Unreachable
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, Status
from kvfabric.wire.connection import Connection
from kvfabric_client.blocks import BlockShape
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link
from kvfabric_client.outline import Piece, Sealed
from kvfabric_client.tails import Payload, Tails

if TYPE_CHECKING:
    from kvfabric_client.room import Room

T = TypeVar("T")

MAX_UNDER_WAY = 8  # appends of bytes whose answers are awaited
EXTEND_WAIT_S = 2.0  # how long a node may look for room on other nodes, within the deadline


@dataclass(frozen=True, slots=True)
class Description:
    """A sequence as its node sees it."""

    length: int
    epoch: int
    keys: list[Key]  # of sealed blocks
    tokens: list[int]  # of each
    nodes: list[str]  # that has each; empty: none
    visible: list[int]  # tokens, per layer
    tails: node_pb2.Tails


class Home:
    """One epoch of one sequence at one node. All of it ends with the session."""

    def __init__(
        self,
        room: Room,
        shape: BlockShape,
        link: Link,
        sequence: int,
        epoch: int,
        idle_s: float,
    ) -> None:
        self.room = room
        self.shape = shape
        self.link = link
        self.sequence = sequence
        self.epoch = epoch
        self.idle_s = idle_s
        self.tails = Tails(link, shape)
        self.draining = False  # the node is being emptied, as it said last
        self.moved_bytes = 0  # by its calls, over sockets

    @property
    def address(self) -> str:
        return self.link.address

    @property
    def node(self) -> str:
        return self.link.node

    def call(self, name: str, request: Any, deadline: Deadline) -> Any:
        """One call within the session that opened the sequence; Unreachable once that ended."""

        def call(link: Link) -> Any:
            self._check(link)
            with link.connection(deadline.at_s) as connection, self._counting(connection):
                answer = connection.call(name, request, deadline.at_s)
            return getattr(answer, f"{name}_response")

        return self.room.client.at(self.address, call, deadline)

    def within(self, act: Callable[[], T], deadline: Deadline) -> T:
        """What `act` returns, which touches shared open blocks: these are the writer's only while
        its session lives, and the client does not end that meanwhile. Unreachable where the
        session has ended, also where that was while it ran."""

        def run(link: Link) -> T:
            self._check(link)
            done = act()
            if not link.alive():
                raise Unreachable(f"node {self.node} went away while its memory was used")
            return done

        return self.room.client.at(self.address, run, deadline)

    def extend(self, blocks: int, deadline: Deadline) -> str:
        """Wants so many blocks open in all; answers why there are fewer, if there are."""
        wait_s = min(EXTEND_WAIT_S, deadline.left_s())
        request = node_pb2.ExtendRequest(
            sequence=self.sequence,
            epoch=self.epoch,
            blocks=blocks,
            deadline_ms=milliseconds(wait_s),
        )
        answer: node_pb2.ExtendResponse = self.call("extend", request, deadline)
        self.tails.update(answer.tails, deadline)
        return answer.reason

    def append(
        self, start: int, tokens: int, layers: range, pieces: list[Piece], deadline: Deadline
    ) -> int:
        """Makes what was written into the pieces visible; answers the length. Repeatable."""
        request = self._append_request(start, layers)
        if not self.tails.shared:
            payloads = self.tails.payloads(pieces, layers)
            requests = (self._append_request(start, layers, one) for one in payloads)
            request = self._send_ahead(requests, deadline) or request
        request.tokens = tokens  # visible only now that all bytes are there
        answer: node_pb2.AppendResponse = self.call("append", request, deadline)
        self.draining = answer.draining
        return answer.length

    def _append_request(
        self, start: int, layers: range, payload: Payload | None = None
    ) -> node_pb2.AppendRequest:
        request = node_pb2.AppendRequest(
            sequence=self.sequence, epoch=self.epoch, start=start, first_layer=layers.start
        )
        request.layers = 0 if len(layers) == self.shape.layers else len(layers)
        if payload is not None:
            request.blocks.extend(payload.blocks)
            request.offsets.extend(payload.offsets)
            request.size_bytes.extend(payload.size_bytes)
            request.payload = payload.data
        return request

    def _send_ahead(
        self, requests: Iterator[node_pb2.AppendRequest], deadline: Deadline
    ) -> node_pb2.AppendRequest | None:
        """Brings bytes into open blocks, some requests on their way at once; all have been
        answered when it returns. Answers the last one, which it has not sent."""

        def send(connection: Connection) -> node_pb2.AppendRequest | None:
            under_way: deque[int] = deque()
            last: node_pb2.AppendRequest | None = None
            try:
                for request in requests:
                    if len(under_way) == MAX_UNDER_WAY:
                        connection.finish(under_way.popleft(), deadline.at_s)
                    if last is not None:
                        under_way.append(connection.begin("append", last, deadline.at_s))
                    last = request
                while under_way:
                    connection.finish(under_way.popleft(), deadline.at_s)
            finally:
                for frame_id in under_way:
                    connection.forget(frame_id)
            return last

        def call(link: Link) -> node_pb2.AppendRequest | None:
            self._check(link)
            with link.connection(deadline.at_s) as connection, self._counting(connection):
                return send(connection)

        return self.room.client.at(self.address, call, deadline)

    @contextlib.contextmanager
    def _counting(self, connection: Connection) -> Iterator[None]:
        before = connection.moved_bytes
        try:
            yield
        finally:
            self.moved_bytes += connection.moved_bytes - before

    def _check(self, link: Link) -> None:
        if link is not self.link:
            raise Unreachable(f"the session with node {self.node} has ended")

    def blank(self, index: int, tokens: int, length: int, deadline: Deadline) -> None:
        """Clears what follows the first `tokens` of an open block, as a short block has it."""
        if not self.shape.plain:
            return  # only whole blocks are there
        rest_of = self.shape.look(self.tails.blocks[index])[..., tokens:, :]
        self.within(lambda: rest_of.fill(0), deadline)
        if not self.tails.shared:
            rest = Piece(index, tokens, self.shape.block_tokens, length)
            self.append(length, 0, range(self.shape.layers), [rest], deadline)

    def renew(self, length: int, deadline: Deadline) -> None:
        """Puts off the idle deadline: appends nothing."""
        request = node_pb2.AppendRequest(sequence=self.sequence, epoch=self.epoch, start=length)
        answer: node_pb2.AppendResponse = self.call("append", request, deadline)
        self.draining = answer.draining

    def seal(
        self, blocks: Sequence[Sealed], sums: Mapping[int, list[int]], deadline: Deadline
    ) -> None:
        """The first open blocks become shards. Broken where one is refused.

        `sums`: checksums that were taken already, by the open block's number.
        """
        request = node_pb2.SealRequest(sequence=self.sequence, epoch=self.epoch)
        request.keys.extend(block.key for block in blocks)
        if any(block.tokens < self.shape.block_tokens for block in blocks):
            request.tokens.extend(block.tokens for block in blocks)
        if self.room.client.checksums:
            for index, tail in enumerate(self.tails.blocks[: len(blocks)]):
                known = sums.get(index)
                request.checksums.extend(known or checksums(tail.data, self.shape.layers))
        answer: node_pb2.SealResponse = self.call("seal", request, deadline)
        self.tails.update(answer.tails, deadline)
        statuses = [Status(status) for status in answer.statuses]
        good = (Status.OK, Status.EXISTS)
        sealed = next((i for i, s in enumerate(statuses) if s not in good), len(statuses))
        if sealed < len(statuses):
            raise Broken(
                f"node {self.node} did not seal block {sealed} of {len(statuses)}: "
                f"{answer.reasons[sealed] or statuses[sealed].name}; close the sequence"
            )

    def describe(
        self, deadline: Deadline, blocks: range | None = None, *, settle: bool = False
    ) -> Description:
        """How it stands, with these of its sealed blocks (None: all), page by page.

        `settle`: what is still under way of earlier calls does nothing any more.
        """
        first, end = (blocks.start, blocks.stop) if blocks is not None else (0, None)
        request = node_pb2.DescribeRequest(
            sequence=self.sequence, first_block=first, settle=self.epoch if settle else 0
        )
        said: node_pb2.DescribeResponse = self.call("describe", request, deadline)
        request.settle = 0
        if said.settled:
            self.epoch = said.epoch
        keys, tokens, places = list(said.keys), list(said.tokens), _places(said)
        while first + len(keys) < min(said.blocks, said.blocks if end is None else end):
            request.first_block = first + len(keys)
            page: node_pb2.DescribeResponse = self.call("describe", request, deadline)
            if page.epoch != said.epoch or not page.keys:
                raise Conflict(f"sequence {self.sequence} changed while it was described")
            keys += page.keys
            tokens += page.tokens
            places += _places(page)
        visible = list(said.visible) or [said.length] * self.shape.layers
        return Description(
            said.length, said.epoch, [Key(key) for key in keys], tokens, places, visible, said.tails
        )

    def fork(
        self, tokens: int, idle_s: float, deadline: Deadline, *, tentative: bool
    ) -> tuple[Home, node_pb2.Tails]:
        request = node_pb2.ForkRequest(
            sequence=self.sequence,
            tokens=tokens,
            tentative=tentative,
            idle_ms=milliseconds(idle_s),
        )
        answer: node_pb2.ForkResponse = self.call("fork", request, deadline)
        fork = Home(self.room, self.shape, self.link, answer.sequence, answer.epoch, idle_s)
        return fork, answer.tails

    def accept(self, fork: int, tokens: int, deadline: Deadline) -> node_pb2.AcceptResponse:
        request = node_pb2.AcceptRequest(
            sequence=self.sequence, epoch=self.epoch, fork=fork, tokens=tokens
        )
        answer: node_pb2.AcceptResponse = self.call("accept", request, deadline)
        return answer

    def truncate(self, tokens: int, deadline: Deadline) -> node_pb2.TruncateResponse:
        request = node_pb2.TruncateRequest(sequence=self.sequence, epoch=self.epoch, tokens=tokens)
        answer: node_pb2.TruncateResponse = self.call("truncate", request, deadline)
        return answer

    def close(self, deadline: Deadline, *, drop: bool) -> None:
        request = node_pb2.CloseSequenceRequest(sequence=self.sequence, epoch=self.epoch, drop=drop)
        self.call("close_sequence", request, deadline)


def _places(said: node_pb2.DescribeResponse) -> list[str]:
    return [said.nodes[place] if place < len(said.nodes) else "" for place in said.place]
