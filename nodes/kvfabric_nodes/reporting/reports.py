"""What a heartbeat says: the inventory's changes or all of it, and the node's other books.

The changes are taken from the core as they are told; what is told but never arrives is
made good by a full report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.metrics import NodeMetrics
from kvfabric_nodes.store.core import NodeCore

REPORT_SHARDS = 16_384  # per message: the manager takes one in without a long pause
HEAT_SHARDS = 64  # the most-read ones, per heartbeat

Change = tuple[NamespaceId, Key, int]  # size in bytes; 0 for removed ones


class Reports:
    """See the module. The attributes say where the other books are; None: there are none."""

    def __init__(self, core: NodeCore, metrics: NodeMetrics, node: str) -> None:
        self.loans: Callable[[], control_pb2.Loans] | None = None
        self.sequences: Callable[[], control_pb2.Sequences] | None = None
        self.steps: Callable[[], control_pb2.StepSums | None] | None = None  # since it was asked
        self.heads: Callable[..., list[control_pb2.Heads]] | None = None  # since it was asked
        self.rates: Callable[[], Mapping[str, int]] | None = None  # likewise, by peer
        self._core = core
        self._metrics = metrics
        self._node = node
        self._told_loans = b""
        self._told_sequences = b""

    def messages(self, *, full: bool, regular: bool) -> Iterable[control_pb2.HeartbeatRequest]:
        """The next heartbeat, in limited messages. One that is not `regular` tells of shards
        alone: there may be a hundred of these a second."""
        core = self._core
        full = full or core.changes_lost
        shards = core.shards if full else core.added.values()
        added = [(s.namespace, s.key, s.size_bytes) for s in shards]
        removed = [] if full else [(namespace, key, 0) for namespace, key in core.removed]
        core.added.clear()
        core.removed.clear()
        core.changes_lost = False
        last = control_pb2.HeartbeatRequest(
            inventory_count=core.shards.count, inventory_hash=core.inventory_hash
        )
        if self.heads is not None:
            last.heads.extend(self.heads(full=full))
        if full or regular:
            last.stats.CopyFrom(self._metrics.stats())
            self._put_books(last, full=full)
        pieces = [
            added[start : start + REPORT_SHARDS] for start in range(0, len(added), REPORT_SHARDS)
        ] or [[]]
        for number, piece in enumerate(pieces, start=1):
            message = last if number == len(pieces) else control_pb2.HeartbeatRequest(more=True)
            message.node = self._node
            message.incarnation = self._metrics.incarnation
            message.full = full
            message.added.extend(_inventories(piece))
            message.removed.extend(_inventories(removed))
            yield message

    def _put_books(self, message: control_pb2.HeartbeatRequest, *, full: bool) -> None:
        """What changed in the other books, or all of it; and what was measured."""
        if self.loans is not None:
            loans = self.loans()
            told = loans.SerializeToString(deterministic=True)
            if full or told != self._told_loans:
                message.loans.CopyFrom(loans)
                message.loans.SetInParent()  # none are news, too
                self._told_loans = told
        if self.sequences is not None:
            sequences = self.sequences()
            told = sequences.SerializeToString(deterministic=True)
            if full or told != self._told_sequences:
                message.sequences.CopyFrom(sequences)
                message.sequences.SetInParent()
                self._told_sequences = told
        for shard, reads in self._core.take_heat(HEAT_SHARDS):
            message.heat.namespace_id.append(shard.namespace)
            message.heat.keys += shard.key
            message.heat.reads.append(reads)
        steps = self.steps() if self.steps is not None else None
        if steps is not None:
            message.steps.CopyFrom(steps)
        for peer, bytes_per_s in self.rates().items() if self.rates is not None else ():
            message.links.add(peer=peer, bytes_per_s=bytes_per_s)


def _inventories(changes: list[Change]) -> list[control_pb2.Inventory]:
    """Columns per namespace."""
    rooms: dict[NamespaceId, list[Change]] = {}
    for change in changes:
        rooms.setdefault(change[0], []).append(change)
    return [
        control_pb2.Inventory(
            namespace_id=namespace,
            tier=types_pb2.TIER_DRAM,
            keys=b"".join(key for _, key, _ in room),
            size_bytes=[size for _, _, size in room if size],
        )
        for namespace, room in rooms.items()
    ]
