"""Reading blocks at one node: out of its memory where that is shared, else over the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfabric.checksums import checksum, parts
from kvfabric.errors import Unreachable
from kvfabric.logs import guest_logger
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, Status
from kvfabric_client import shm, stream
from kvfabric_client.blocks import BlockShape, Bytes
from kvfabric_client.buffers import Pieces
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.room import Room

log = guest_logger(__name__)

STREAM_BYTES = 8 << 20  # of blocks on their way over the wire before they are taken apart

Deliver = Callable[[int, Bytes], None]
"""Takes what it needs of the block of a key's index. The bytes are its own until it returns."""


@dataclass(frozen=True, slots=True)
class NodeReader:
    """Reads blocks of one shape."""

    room: Room
    shape: BlockShape
    layers: range  # of which checksums are compared: those that are wanted

    def read(
        self, link: Link, keys: Sequence[Key], deliver: Deliver, deadline: Deadline, *, verify: bool
    ) -> list[Status]:
        """At most as many keys as a call takes. What was delivered of a block that is then not
        OK is worth nothing."""
        link.open(self.room.namespace, self.room.id, deadline.at_s)
        verify = verify and self.room.client.checksums
        if not link.shares_memory:
            return self._stream(link, keys, deliver, deadline, verify=verify)
        held = shm.acquire(link, self.room.id, keys, deadline.left_s(), deadline, checked=verify)
        statuses = [Status.MISS] * len(keys)
        if not held.lease:
            return statuses
        damaged: list[int] = []
        expected = shm.sums_by_index(held)
        size_bytes = self.shape.size_bytes
        found = [job for job in held.found() if len(job[1]) == size_bytes]

        def take(some: Sequence[tuple[int, memoryview]]) -> None:
            for index, place in some:
                deadline.check()
                deliver(index, np.frombuffer(place, dtype=np.uint8))
                if index in expected and not self._intact(place, expected[index]):
                    damaged.append(index)
                else:
                    statuses[index] = Status.OK

        try:
            shm.split(found, take, len(found) * size_bytes, self.room.client.copiers)
            if not link.alive():
                raise Unreachable(f"node {link.node} went away while its memory was read")
        finally:
            link.release(held.lease)
        self._report(link, [keys[index] for index in damaged], deadline)
        return statuses

    def _intact(self, place: memoryview, expected: Sequence[int]) -> bool:
        """Of the source, right after it was copied: what was taken out of it lies scattered."""
        layer_bytes = self.shape.size_bytes // self.shape.layers
        first, last = self.layers.start * layer_bytes, self.layers.stop * layer_bytes
        return all(
            checksum(place[start:end]) == sum_
            for (start, end), sum_ in zip(
                parts(len(place), self.shape.layers), expected, strict=True
            )
            if start < last and end > first
        )

    def _stream(
        self, link: Link, keys: Sequence[Key], deliver: Deliver, deadline: Deadline, *, verify: bool
    ) -> list[Status]:
        size_bytes = self.shape.size_bytes
        count = max(1, STREAM_BYTES // size_bytes)
        scratch = [np.empty(size_bytes, dtype=np.uint8) for _ in range(min(count, len(keys)))]
        targets = [Pieces(block) for block in scratch]

        def target(index: int, size: int) -> Pieces | None:
            return targets[index] if size == size_bytes else None

        statuses: list[Status] = []
        for start in range(0, len(keys), count):
            some = keys[start : start + count]
            found, damaged = stream.get(link, self.room.id, some, target, deadline, checked=verify)
            self._report(link, [some[index] for index in damaged], deadline)
            for index, status in enumerate(found):
                if status is Status.OK:
                    deliver(start + index, scratch[index])
            statuses += found
        return statuses

    def _report(self, link: Link, damaged: list[Key], deadline: Deadline) -> None:
        """The node looks for itself, and drops what it finds damaged."""
        if damaged:
            names = [key.hex()[:16] for key in damaged]
            log.error("damaged", node=link.node, keys=names, effect="missed, and reported")
            request = node_pb2.VerifyRequest(namespace_id=self.room.id, keys=damaged)
            link.call("verify", request, deadline.at_s)
