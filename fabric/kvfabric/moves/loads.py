"""How much is being copied from, to and between nodes: the limits of moves, and who is at them."""

from __future__ import annotations

from collections import Counter

from kvfabric.errors import Broken
from kvfabric.moves.migration import BATCH_BYTES, Batch
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

AT_ONCE = 1024  # batches that are copied, over all nodes
PER_SOURCE = 8  # batches that are copied from a node at once
PER_DESTINATION = 8
PER_LINK = 4
BALANCE_PER_NODE = 1  # of those that only make things better
DESTINATION_BYTES = 8 * BATCH_BYTES


class Loads:
    """See the module. A batch counts from `take` to `release`."""

    def __init__(self) -> None:
        self._from: Counter[NodeId] = Counter()
        self._to: Counter[NodeId] = Counter()
        self._links: Counter[tuple[NodeId, NodeId]] = Counter()
        self._to_bytes: Counter[NodeId] = Counter()
        self._taken: dict[int, tuple[NodeId, NodeId, int]] = {}

    def gives(self, batch: Batch) -> bool:
        """Whether the batch's source may give more at this moment."""
        if len(self._taken) >= AT_ONCE:
            return False
        if batch.move.priority == control_pb2.PRIORITY_BALANCE:
            return self._from[batch.source] < BALANCE_PER_NODE
        return self._from[batch.source] < PER_SOURCE

    def fits(self, batch: Batch, destination: NodeId) -> bool:
        """Whether the destination may take the batch at this moment."""
        if batch.move.priority == control_pb2.PRIORITY_BALANCE:
            return self._to[destination] < BALANCE_PER_NODE
        return (
            self._to[destination] < PER_DESTINATION
            and self._links[batch.source, destination] < PER_LINK
            and self._to_bytes[destination] + batch.size_bytes
            <= max(DESTINATION_BYTES, batch.size_bytes)
        )

    def coming_bytes(self, node: NodeId) -> int:
        """What is on its way to the node, and not yet in what it says of itself."""
        return self._to_bytes[node]

    def take(self, batch: Batch, destination: NodeId) -> None:
        if batch.number in self._taken:
            raise Broken(f"batch {batch.number} is copied twice at once: a bug")
        self._taken[batch.number] = (batch.source, destination, batch.size_bytes)
        self._book(batch.number, 1)

    def release(self, batch: Batch) -> None:
        """May be repeated."""
        if batch.number in self._taken:
            self._book(batch.number, -1)
            del self._taken[batch.number]

    def check(self) -> None:
        """Broken unless all limits are kept."""
        for limit, counts in (
            (PER_SOURCE, self._from),
            (PER_DESTINATION, self._to),
            (PER_LINK, self._links),
        ):
            if any(not 0 <= count <= limit for count in counts.values()):
                raise Broken(f"a node's copies are not within {limit}: {counts}; report this")
        if sum(self._from.values()) != len(self._taken) or len(self._taken) > AT_ONCE:
            raise Broken("batches under way are miscounted; report this")

    def _book(self, number: int, change: int) -> None:
        source, destination, size_bytes = self._taken[number]
        self._from[source] += change
        self._to[destination] += change
        self._links[source, destination] += change
        self._to_bytes[destination] += change * size_bytes
        for counts, name in ((self._from, source), (self._to, destination)):
            if not counts[name]:
                del counts[name]
        if not self._links[source, destination]:
            del self._links[source, destination]
        if not self._to_bytes[destination]:
            del self._to_bytes[destination]
