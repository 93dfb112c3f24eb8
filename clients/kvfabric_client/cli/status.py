"""`kvfabric status`: the nodes, their tiers and how often they have what they are asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kvfabric_client.cli.common import (
    Json,
    RuntimeDir,
    chosen_runtime_dir,
    console,
    print_json,
    table,
)
from kvfabric_client.texts import size

if TYPE_CHECKING:
    from pathlib import Path

    from kvfabric.rpc.v1 import control_pb2, types_pb2

HITS = "kvfabric_node_hits_total"
MISSES = "kvfabric_node_misses_total"
CALL_DEADLINE_S = 3.0


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier of one node, in bytes."""

    tier: str
    capacity_bytes: int
    held_bytes: int
    reserved_bytes: int
    quarantined_bytes: int
    free_bytes: int
    wasted_bytes: int
    ready_bytes: int
    shards: int

    @property
    def fill(self) -> float:
        return 1 - self.free_bytes / self.capacity_bytes if self.capacity_bytes else 0.0


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as it reported itself last."""

    name: str
    alive: bool
    incarnation: int
    silent_s: float
    unix_path: str
    tcp_address: str
    grpc_address: str
    metrics_address: str
    tiers: tuple[TierView, ...]
    hit_rate: float | None  # None: nothing was asked for yet
    hits: int
    misses: int
    sessions: int
    leases: int
    pins: int
    reservations: int
    draining: bool
    lent_bytes: int
    borrowed_bytes: int
    counters: dict[str, float]


def view(info: control_pb2.NodeInfo) -> NodeView:
    stats = info.stats
    counters = {counter.name: counter.value for counter in stats.counters}
    hits, misses = int(counters.get(HITS, 0)), int(counters.get(MISSES, 0))
    return NodeView(
        name=info.node,
        alive=info.alive,
        incarnation=info.incarnation,
        silent_s=info.silent_ms / 1000,
        unix_path=info.endpoints.unix_path,
        tcp_address=info.endpoints.tcp_address,
        grpc_address=info.endpoints.grpc_address,
        metrics_address=info.endpoints.metrics_address,
        tiers=tuple(_tier(tier) for tier in stats.tiers),
        hit_rate=hits / (hits + misses) if hits + misses else None,
        hits=hits,
        misses=misses,
        sessions=stats.sessions,
        leases=stats.leases,
        pins=stats.pins,
        reservations=stats.reservations,
        draining=info.draining,
        lent_bytes=info.lent_bytes,
        borrowed_bytes=info.borrowed_bytes,
        counters=counters,
    )


def _tier(stats: types_pb2.TierStats) -> TierView:
    from kvfabric.types import Tier

    return TierView(
        tier=Tier(stats.tier).name.lower(),
        capacity_bytes=stats.capacity_bytes,
        held_bytes=stats.held_bytes,
        reserved_bytes=stats.reserved_bytes,
        quarantined_bytes=stats.quarantined_bytes,
        free_bytes=stats.free_bytes,
        wasted_bytes=stats.wasted_bytes,
        ready_bytes=stats.ready_bytes,
        shards=stats.shards,
    )


def status(runtime_dir: RuntimeDir = None, as_json: Json = False) -> None:
    """Show the nodes, their tiers, fill and hit rates.

    While the gManager is away, the nodes of this machine tell about themselves.
    """
    from kvfabric import errors
    from kvfabric_client import discovery

    folder = chosen_runtime_dir(runtime_dir)
    address = discovery.manager_address()
    manager: dict[str, object] = {"address": address, "alive": False}
    nodes: list[NodeView] = []
    trouble = ""
    if address:
        try:
            nodes, totals = _asked(address)
            manager |= {"alive": True} | totals
        except errors.Retry as error:
            trouble = str(error)
    if not manager["alive"]:
        nodes = local_nodes(folder)
        if not nodes:
            raise errors.Unreachable(
                f"{trouble}; and no node answers here: wait for Ray to restart them, else "
                "`kvfabric down` and `kvfabric up`"
                if trouble
                else f"no fabric runs here ({folder}): `kvfabric up` starts one"
            )
    if as_json:
        print_json({"manager": manager, "nodes": [asdict(node) for node in nodes]})
    else:
        _show(manager, nodes, trouble)


def _asked(address: str) -> tuple[list[NodeView], dict[str, object]]:
    """The nodes that the gManager knows, and its own totals."""
    from kvfabric_client.deadline import Deadline
    from kvfabric_client.manager import Manager

    control = Manager(address)
    try:
        deadline = Deadline.after(CALL_DEADLINE_S)
        nodes = [view(info) for info in control.nodes(deadline)]
        stats = control.stats(deadline)
    finally:
        control.close()
    return nodes, {
        "epoch": stats.epoch,
        "keys": stats.keys,
        "replicas": stats.replicas,
        "metrics_address": stats.metrics_address,
    }


def local_nodes(folder: Path) -> list[NodeView]:
    """What the nodes with a socket in the runtime directory say of themselves."""
    from kvfabric import errors
    from kvfabric.rpc.v1 import control_pb2
    from kvfabric_client import connect

    found = []
    for path in sorted(folder.glob("*.sock")):
        try:
            with connect(f"unix:{path}", timeout_s=CALL_DEADLINE_S) as fabric:
                stats = fabric.stats()
        except errors.Retry:
            continue  # a socket that somebody left
        info = control_pb2.NodeInfo(
            node=stats.node, incarnation=stats.incarnation, stats=stats, alive=True
        )
        info.endpoints.unix_path = str(path)
        # The client falls back to another node where this one is gone: say each only once.
        if path.name == f"{stats.node}.sock":
            found.append(view(info))
    return found


def _show(manager: dict[str, object], nodes: list[NodeView], trouble: str) -> None:
    out = console()
    if manager["alive"]:
        out.print(
            f"manager {manager['address']}  epoch {manager['epoch']}  "
            f"{manager['keys']} keys  {manager['replicas']} replicas"
        )
    elif trouble:
        out.print(f"[yellow]{trouble}[/yellow]")
    right = ("held", "of", "fill", "shards", "hits")
    rows = table("node", "state", "tier", *right, right=right)
    for node in nodes:
        for index, tier in enumerate(node.tiers):
            rows.add_row(  # what is the node's, beside its first tier only
                "" if index else node.name,
                "" if index else _state(node),
                tier.tier,
                size(tier.held_bytes),
                size(tier.capacity_bytes),
                f"{tier.fill:.0%}",
                f"{tier.shards:,}",
                "" if index else _percent(node.hit_rate),
            )
    out.print(rows)
    parties = [node for node in nodes if node.lent_bytes or node.borrowed_bytes]
    if parties:
        loans = table("node", "lent", "borrowed", right=("lent", "borrowed"))
        for node in parties:
            loans.add_row(node.name, size(node.lent_bytes), size(node.borrowed_bytes))
        out.print(loans)


def _state(node: NodeView) -> str:
    """A node serves while its memory is still being pre-faulted; that is said."""
    if not node.alive:
        return f"[red]silent {node.silent_s:.0f}s[/red]"
    capacity_bytes = sum(tier.capacity_bytes for tier in node.tiers)
    ready_bytes = sum(tier.ready_bytes for tier in node.tiers)
    if ready_bytes < capacity_bytes:
        return f"[yellow]warm {ready_bytes / capacity_bytes:.0%}[/yellow]"
    if node.draining:
        return "[yellow]draining[/yellow]"
    return "[green]alive[/green]"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"
