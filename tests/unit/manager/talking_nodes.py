"""Nodes that say things to a manager's core, for tests of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvfabric.directory import Inventory
from kvfabric.lending.loans import Loan, LoanState, to_columns
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.events import Answer, Heartbeat, Register
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import NodeId

GIB = 1024**3
MIB = 1024**2
BLOCK_BYTES = 16 * MIB


def held(debtor: str, creditor: str, size_bytes: int, number: int = 1) -> Loan:
    """A loan between first incarnations."""
    return Loan(number, debtor, 1, creditor, 1, LoanState.HELD, size_bytes)


@dataclass
class Talker:
    """One node; `core` hears it. Its incarnation is 1."""

    core: ManagerCore
    name: str
    host: str = ""
    zone: str = ""
    capacity_bytes: int = 64 * GIB
    sequence: int = field(default=0, init=False)

    @property
    def node(self) -> NodeId:
        return NodeId(self.name)

    def tier(self, free_bytes: int, claimed_bytes: int) -> types_pb2.TierStats:
        return types_pb2.TierStats(
            tier=types_pb2.TIER_DRAM,
            capacity_bytes=self.capacity_bytes,
            held_bytes=self.capacity_bytes - free_bytes,
            free_bytes=free_bytes,
            claimed_bytes=claimed_bytes,
        )

    def register(self, now_s: float, free_bytes: int = 32 * GIB, incarnation: int = 1) -> None:
        self.sequence = 0
        stats = types_pb2.NodeStats(
            node=self.name, tiers=[self.tier(free_bytes, self.capacity_bytes - free_bytes)]
        )
        endpoints = types_pb2.Endpoints(host=self.host or f"host of {self.name}")
        labels = {"zone": self.zone} if self.zone else {}
        self.core.register(Register(self.node, incarnation, endpoints, stats, labels), now_s)

    def beat(
        self,
        now_s: float,
        *,
        free_bytes: int | None = None,
        claimed_bytes: int | None = None,
        leases: int = 0,
        lend_cap_bytes: int | None = None,
        loans: Sequence[Loan] | None = None,
        waiting: int | None = None,
        batch: int = 8,
        sequences: Sequence[tuple[int, int, int]] | None = None,
        links: Sequence[control_pb2.Link] = (),
    ) -> Answer:
        """A heartbeat. `sequences`: (number, blocks here, blocks lent), 128 tokens a block."""
        self.sequence += 1
        stats = None
        if free_bytes is not None:
            claimed = self.capacity_bytes - free_bytes if claimed_bytes is None else claimed_bytes
            tiers = [self.tier(free_bytes, claimed)]
            stats = types_pb2.NodeStats(
                node=self.name, tiers=tiers, leases=leases, lend_cap_bytes=lend_cap_bytes
            )
        steps = None
        if waiting is not None:
            steps = control_pb2.StepSums(waiting=waiting, last_batch=batch)
        columns = None
        if sequences is not None:
            columns = control_pb2.Sequences(
                sequence=[number for number, _, _ in sequences],
                namespace_id=[b"r" * 32 for _ in sequences],
                tokens=[128 * (here + lent) for _, here, lent in sequences],
                local_bytes=[here * BLOCK_BYTES for _, here, _ in sequences],
                remote_bytes=[lent * BLOCK_BYTES for _, _, lent in sequences],
                block_bytes=[BLOCK_BYTES for _ in sequences],
            )
        event = Heartbeat(
            self.node,
            1,
            self.sequence,
            Inventory(),
            stats=stats,
            stream=1,
            loans=None if loans is None else to_columns(loans),
            sequences=columns,
            steps=steps,
            links=tuple(links),
        )
        return self.core.heartbeat(event, now_s)
