"""Reading blocks wherever they lie: from the home node, the nodes it names, the directory.

A block that moved between the question and the read is asked about again; a move copies before
it drops, so that one of the places has it. What is nowhere is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvfabric.errors import Conflict, Refused, Retry
from kvfabric.logs import guest_logger
from kvfabric.types import BATCH_KEYS, Key, Status
from kvfabric_client.blocks import BlockShape, Bytes
from kvfabric_client.deadline import Deadline
from kvfabric_client.node_reader import Deliver, NodeReader

if TYPE_CHECKING:
    from kvfabric_client.room import Room
    from kvfabric_client.sequence_home import Home

log = guest_logger(__name__)

REPLICAS = 2  # of those that the directory knows, how many are asked in a round
ROUNDS = 2  # how often the places of what was not found are asked for

Ask = Callable[[Sequence[int]], dict[str, list[int]]]
"""Where some blocks may be: their indices by a node's address."""


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
                NodeReader(self.room, self.shape, self.layers).read,
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


def _without(missing: Sequence[int], tried: Sequence[int], still: Sequence[int]) -> list[int]:
    found = set(tried) - set(still)
    return [index for index in missing if index not in found]
