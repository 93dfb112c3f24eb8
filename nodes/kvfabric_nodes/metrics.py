"""The node's metrics: tallied where things happen, brought into Prometheus's form on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvfabric.metrics import NODE_METRICS, Histogram, Metrics
from kvfabric.rpc.v1 import types_pb2
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.core import NodeCore

TIER = "dram"
TRANSPORTS = ("shm", "unix", "tcp", "grpc")


@dataclass(slots=True)
class Flow:
    """Payload that went one way by one transport, and the time it took."""

    size_bytes: int = 0
    seconds: float = 0.0

    def add(self, size_bytes: int, seconds: float) -> None:
        self.size_bytes += size_bytes
        self.seconds += seconds


@dataclass(slots=True)
class PullTally:
    """What was copied from other nodes: bytes, seconds of reading, and keys by their end."""

    moved: Flow = field(default_factory=Flow)
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class AttentionTally:
    """What was attended: query rows, KV bytes and seconds by kernel, and what hindered it."""

    rows: int = 0
    stacked: int = 0  # queries
    gap_tokens: int = 0
    waited_s: float = 0.0
    kernels: Mapping[str, Flow] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)
    prepared: int = 0  # calls that only C had to do with
    renew: Callable[[], None] | None = None  # brings in what C has counted


@dataclass(slots=True)
class KeeperTally:
    """How it stands with the keeper, and what was taken over from it at the start."""

    connected: bool = False
    losses: int = 0
    adopted: int = 0  # shards
    not_adopted: Counter[str] = field(default_factory=Counter)  # by reason
    frozen: int = 0  # segments


class NodeMetrics:
    """Tallies of the shells, and the snapshot of all. Refreshed on the core's thread only."""

    def __init__(self, node: str, incarnation: int, core: NodeCore, arena: Arena) -> None:
        self.exported = Metrics(NODE_METRICS)
        self.read = {transport: Flow() for transport in TRANSPORTS}
        self.written = {transport: Flow() for transport in TRANSPORTS}
        self.protocol_errors = {"unix": 0, "tcp": 0}
        self.mismatches = {"commit": 0, "verify": 0, "pull": 0}
        self.refusals = {"checksum": 0, "length": 0, "deadline": 0, "state": 0}
        self.heartbeats = {"ok": 0, "full": 0, "register": 0}
        self.pulls = PullTally()
        self.attention = AttentionTally()
        self.keeper = KeeperTally()
        self.gauges: dict[str, Callable[[], float]] = {}  # of parts that are above this one
        self.commands: Counter[str] = Counter()  # of the manager, by kind
        self.lend_cap_bytes: int | None = None  # lent to other nodes at most, where that is known
        self.incarnation = incarnation
        self._node = node
        self._core = core
        self._arena = arena
        self._call_seconds: dict[str, Histogram] = {}

    def call_seconds(self, method: str) -> Histogram:
        found = self._call_seconds.get(method)
        if found is None:
            found = self.exported.histogram("kvfabric_node_call_seconds", method)
            self._call_seconds[method] = found
        return found

    def stats(self) -> types_pb2.NodeStats:
        """The node as it is now, every counter included."""
        stats = self.refresh()
        for name, value in self.exported.flatten():
            stats.counters.add(name=name, value=value)
        return stats

    def _tier(self) -> types_pb2.TierStats:
        books = self._core.books()
        return types_pb2.TierStats(
            tier=types_pb2.TIER_DRAM,
            capacity_bytes=books.capacity_bytes,
            held_bytes=books.held_bytes,
            reserved_bytes=books.reserved_bytes,
            quarantined_bytes=books.quarantined_bytes,
            free_bytes=books.free_bytes,
            wasted_bytes=books.wasted_bytes,
            ready_bytes=self._arena.ready_bytes,
            shards=books.shards,
            claimed_bytes=self._core.shards.claimed_bytes,
        )

    def refresh(self) -> types_pb2.NodeStats:
        """Brings the exported values up to date; answers the gauges among them."""
        core, tally = self._core, self._core.tally
        tier = self._tier()
        stats = types_pb2.NodeStats(
            node=self._node,
            incarnation=self.incarnation,
            tiers=[tier],
            sessions=len(core.sessions),
            leases=sum(len(s.leases) for s in core.sessions.values()),
            pins=core.pins,
            reservations=sum(len(s.reservations) for s in core.sessions.values()),
            lend_cap_bytes=self.lend_cap_bytes,
        )
        for name in ("capacity", "held", "reserved", "quarantined", "free", "wasted", "ready"):
            self._set(f"{name}_bytes", getattr(tier, f"{name}_bytes"), TIER)
        self._set("shards", tier.shards, TIER)
        for name in ("sessions", "leases", "pins", "reservations"):
            self._set(name, getattr(stats, name))
        self._set("hits_total", tally.hits)
        self._set("misses_total", tally.misses)
        self._set("commits_total", tally.commits)
        self._set("keeper", self.keeper.connected)
        self._set("keeper_losses_total", self.keeper.losses)
        self._set("adopted_shards_total", self.keeper.adopted)
        self._set("frozen_segments", self.keeper.frozen)
        for why, shards in self.keeper.not_adopted.items():
            self._set("unadopted_shards_total", shards, why)
        self._set("expired_reservations_total", tally.expired_reservations)
        self._set("expired_leases_total", tally.expired_leases)
        for what, shards in tally.dropped_shards.items():
            self._set("evicted_shards_total", shards, what)
            self._set("evicted_bytes_total", tally.dropped_bytes[what], what)
        for name, counts in (
            ("commit_refusals_total", self.refusals),
            ("checksum_mismatches_total", self.mismatches),
            ("protocol_errors_total", self.protocol_errors),
            ("heartbeats_total", self.heartbeats),
        ):
            for label, count in counts.items():
                self._set(name, count, label)
        for name, value in self.gauges.items():
            self._set(name, value())
        self._set("pulled_bytes_total", self.pulls.moved.size_bytes)
        self._set("pulled_seconds_total", self.pulls.moved.seconds)
        for outcome, count in self.pulls.outcomes.items():
            self._set("pulled_keys_total", count, outcome)
        self._refresh_attention()
        for kind, count in self.commands.items():
            self._set("commands_total", count, kind)
        for transport in TRANSPORTS:
            read, written = self.read[transport], self.written[transport]
            self._set("read_bytes_total", read.size_bytes, transport)
            self._set("read_seconds_total", read.seconds, transport)
            self._set("written_bytes_total", written.size_bytes, transport)
            self._set("written_seconds_total", written.seconds, transport)
        return stats

    def _refresh_attention(self) -> None:
        tally = self.attention
        if tally.renew is not None:
            tally.renew()
        self._set("attends_prepared_total", tally.prepared)
        self._set("attended_rows_total", tally.rows)
        self._set("attends_stacked_total", tally.stacked)
        self._set("attends_waited_seconds_total", tally.waited_s)
        self._set("attend_gap_tokens_total", tally.gap_tokens)
        for kernel, read in tally.kernels.items():
            self._set("attended_bytes_total", read.size_bytes, kernel)
            self._set("attended_seconds_total", read.seconds, kernel)
        for reason, count in tally.refusals.items():
            self._set("attend_refusals_total", count, reason)

    def _set(self, name: str, value: float, *labels: str) -> None:
        self.exported.value(f"kvfabric_node_{name}", *labels).value = value
