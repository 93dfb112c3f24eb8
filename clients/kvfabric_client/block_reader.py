"""Reading blocks wherever they lie: from the home node, the nodes it names, the directory.

A block that moved between the question and the read is asked about again; a move copies before
it drops, so that one of the places has it. What is nowhere is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvfabric.checksums import checksum, parts
from kvfabric.errors import Conflict, Refused, Retry, Unreachable
from kvfabric.logs import guest_logger
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import BATCH_KEYS, Key, Status
from kvfabric_client import shm, stream
from kvfabric_client.blocks import BlockShape, Bytes
from kvfabric_client.buffers import Pieces
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.room import Room
    from kvfabric_client.sequence_home import Home

log = guest_logger(__name__)

REPLICAS = 2  # of those that the directory knows, how many are asked in a round
ROUNDS = 2  # how often the places of what was not found are asked for
STREAM_BYTES = 8 << 20  # of blocks on their way over the wire before they are taken apart

Ask = Callable[[Sequence[int]], dict[str, list[int]]]
"""Where some blocks may be: their indices by a node's address."""

Deliver = Callable[[int, Bytes], None]
"""Takes what it needs of the block of a key's index. The bytes are its own until it returns."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads blocks of one sequence."""

    home: Home
    layers: range  # of which checksums are compared: those that are wanted

    @property
    def room(self) -> Room:
        return self.home.room

    @property
    def shape(self) -> BlockShape:
        return self.home.shape

    def read(
        self,
        blocks: Sequence[int],
        keys: Sequence[Key],
        deliver: Deliver,
        deadline: Deadline,
        *,
        verify: bool,
    ) -> list[int]:
        """Delivers every block, some of them twice; answers the indices of those that are nowhere.

        `blocks` are their numbers in the sequence, ascending.

        What was delivered of a block that is then answered as missing is worth nothing.
        """
        missing: Sequence[int] = range(len(keys))
        for _ in range(ROUNDS):
            tried: dict[int, set[str]] = {}  # by index, in this round
            named = partial(self._named, blocks, keys, deadline)
            directory = partial(self._elsewhere, keys, deadline, tried)
            asks: list[Ask] = [self._home, named, *[directory] * REPLICAS]
            for ask in asks:
                if not missing:
                    return []
                for address, indices in ask(missing).items():
                    for index in indices:
                        tried.setdefault(index, set()).add(address)
                    still = self._at(address, keys, indices, deliver, deadline, verify=verify)
                    missing = _without(missing, indices, still)
        return list(missing)

    def fetch(
        self, blocks: Sequence[int], keys: Sequence[Key], deadline: Deadline
    ) -> list[Bytes | None]:
        """Copies of whole blocks; None: it is nowhere."""
        copies: list[Bytes | None] = [None] * len(keys)

        def deliver(index: int, block: Bytes) -> None:
            copies[index] = block.copy()

        for index in self.read(blocks, keys, deliver, deadline, verify=True):
            copies[index] = None
        return copies

    def _home(self, missing: Sequence[int]) -> dict[str, list[int]]:
        return {self.home.address: list(missing)}

    def _named(
        self,
        blocks: Sequence[int],
        keys: Sequence[Key],
        deadline: Deadline,
        missing: Sequence[int],
    ) -> dict[str, list[int]]:
        """Addresses of the nodes that the home node names for these blocks."""
        found: dict[str, list[int]] = {}
        try:
            said = self.home.describe(deadline, range(blocks[missing[0]], blocks[missing[-1]] + 1))
        except (Retry, Refused, Conflict) as error:
            deadline.check()
            log.debug("not_described", node=self.home.node, why=str(error))
            return found
        nodes = dict(zip(said.keys, said.nodes, strict=True))
        for index in missing:
            node = nodes.get(keys[index], "")
            if node and node != self.home.node:
                address = self.room.client.address_of(node, deadline)
                if address:
                    found.setdefault(address, []).append(index)
        return found

    def _elsewhere(
        self,
        keys: Sequence[Key],
        deadline: Deadline,
        tried: Mapping[int, set[str]],
        missing: Sequence[int],
    ) -> dict[str, list[int]]:
        """Addresses of the nodes that the directory names for these blocks."""
        found: dict[str, list[int]] = {}
        for start in range(0, len(missing), BATCH_KEYS):
            some = missing[start : start + BATCH_KEYS]
            vain = [tried.get(index, set()) for index in some]
            wanted = [keys[index] for index in some]
            named = self.room.client.elsewhere(self.room.id, wanted, deadline, vain)
            for address, positions in named.items():
                found.setdefault(address, []).extend(some[p] for p in positions)
        return found

    def _at(
        self,
        address: str,
        keys: Sequence[Key],
        indices: Sequence[int],
        deliver: Deliver,
        deadline: Deadline,
        *,
        verify: bool,
    ) -> list[int]:
        """Reads from one node; answers what it does not have. One that is gone has nothing."""
        missing: list[int] = []
        for start in range(0, len(indices), BATCH_KEYS):
            some = indices[start : start + BATCH_KEYS]
            batch = [keys[i] for i in some]
            read = partial(
                self._from,
                keys=batch,
                deliver=lambda i, block, some=some: deliver(some[i], block),  # type: ignore[misc]
                deadline=deadline,
                verify=verify,
            )
            try:
                statuses = self.room.client.at(address, read, deadline)
            except Retry as error:
                deadline.check()
                log.warning("node_unreachable", address=address, why=str(error))
                return [*missing, *indices[start:]]
            found = zip(some, statuses, strict=True)
            missing += [index for index, status in found if status is not Status.OK]
        return missing

    def _from(
        self, link: Link, keys: Sequence[Key], deliver: Deliver, deadline: Deadline, *, verify: bool
    ) -> list[Status]:
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


def _without(missing: Sequence[int], tried: Sequence[int], still: Sequence[int]) -> list[int]:
    found = set(tried) - set(still)
    return [index for index in missing if index not in found]
