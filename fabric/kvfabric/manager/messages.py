"""ControlService's messages to and from the core's words: the border where input is checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Sized
from typing import cast

from kvfabric.directory import Inventory, Place
from kvfabric.errors import Refused, Unsupported
from kvfabric.lending.loans import LoanState
from kvfabric.manager.events import Answer, Delta, Explanation, Heartbeat, Register
from kvfabric.manager.parts import Cluster
from kvfabric.manager.planning import Planned
from kvfabric.membership import Member, NodeState
from kvfabric.moves.keyed import Keyed
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import DIGEST_BYTES, PROTOCOL_VERSION, Key, NamespaceId, NodeId, Tier

MAX_LOCATE_KEYS = 4096
MAX_REPORT_KEYS = 65_536  # of one heartbeat; larger reports go on in the next (`more`)
MAX_LOANS = 16_384  # of one node's report, as are the next
MAX_SEQUENCES = 4096
MAX_HEAT = 4096
MAX_LINKS = 4096
MAX_HEADS = 131_072
MIN_EXPLAIN_BYTES = 2
MAX_LABELS = 32
_LOAN_STATES = frozenset(int(state) for state in LoanState)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def register(request: control_pb2.RegisterRequest) -> Register:
    """Unsupported where versions do not meet, Refused where a field cannot be."""
    if not request.min_version <= PROTOCOL_VERSION <= request.max_version:
        raise Unsupported(
            f"this manager speaks protocol version {PROTOCOL_VERSION}, the node "
            f"{request.min_version} to {request.max_version}; run releases that are neighbours"
        )
    node = node_id(request.node)
    if len(request.labels) > MAX_LABELS:
        raise Refused(f"{len(request.labels)} labels are over {MAX_LABELS}; give fewer")
    stats = types_pb2.NodeStats(
        node=node, incarnation=_incarnation(request.incarnation), tiers=request.tiers
    )
    endpoints = types_pb2.Endpoints()
    endpoints.CopyFrom(request.endpoints)
    return Register(node, request.incarnation, endpoints, stats, dict(request.labels))


def heartbeat(request: control_pb2.HeartbeatRequest, stream: int) -> Heartbeat:
    """Refused where a field cannot be. `stream` is the number of the stream it came on."""
    node = node_id(request.node)
    keys_bytes = sum(len(each.keys) for each in (*request.added, *request.removed))
    if keys_bytes > MAX_REPORT_KEYS * DIGEST_BYTES:
        raise Refused(
            f"{keys_bytes // DIGEST_BYTES} keys in one heartbeat are over {MAX_REPORT_KEYS}; "
            "set `more` and send the rest in the next"
        )
    stats = None
    if request.HasField("stats"):
        stats = types_pb2.NodeStats()
        stats.CopyFrom(request.stats)
    return Heartbeat(
        node,
        _incarnation(request.incarnation),
        request.sequence,
        Inventory(request.inventory_count, request.inventory_hash),
        full=request.full,
        more=request.more,
        added=tuple(_delta(each, sized=True) for each in request.added),
        removed=tuple(_delta(each, sized=False) for each in request.removed),
        stats=stats,
        stream=stream,
        loans=_loans(request),
        sequences=_sequences(request),
        heat=_heat(request),
        steps=request.steps if request.HasField("steps") else None,
        links=_links(request),
        heads=_heads(request),
    )


def node_id(name: str) -> NodeId:
    """Refused unless `name` may name a node."""
    if not _NAME.fullmatch(name):
        raise Refused(
            f"{name[:40]!r} cannot name a node; take 1 to 128 letters, digits, dots, dashes "
            "and underscores, the first a letter or digit"
        )
    return NodeId(name)


def namespace_id(raw: bytes) -> NamespaceId:
    """Refused unless `raw` may be a namespace's id."""
    if len(raw) != DIGEST_BYTES:
        raise Refused(
            f"a namespace id is {DIGEST_BYTES} bytes, not {len(raw)}; take the one that Hello "
            "answered, or keys.namespace_id"
        )
    return NamespaceId(raw)


def keys(raw: Sequence[bytes]) -> list[Key]:
    """Refused for too many, or for one that cannot be a key."""
    if len(raw) > MAX_LOCATE_KEYS:
        raise Refused(f"{len(raw)} keys in one call are over {MAX_LOCATE_KEYS}; ask in parts")
    for index, key in enumerate(raw):
        if len(key) != DIGEST_BYTES:
            raise Refused(
                f"key {index} has {len(key)} bytes, a key has {DIGEST_BYTES}; see keys.shard_key"
            )
    return cast("list[Key]", list(raw))


def explain_subject(
    request: control_pb2.ControlServiceExplainRequest,
) -> tuple[NamespaceId | None, bytes]:
    """(namespace or None for any, key or its first bytes). Refused where neither can be."""
    if not MIN_EXPLAIN_BYTES <= len(request.key) <= DIGEST_BYTES:
        raise Refused(
            f"a key's first {MIN_EXPLAIN_BYTES} to {DIGEST_BYTES} bytes are needed to explain it, "
            f"not {len(request.key)}"
        )
    return (namespace_id(request.namespace_id) if request.namespace_id else None), request.key


def places(found: Iterable[Place]) -> list[control_pb2.Place]:
    """As in LocateResponse."""
    return [
        control_pb2.Place(
            nodes=[replica.node for replica in place],
            tiers=cast("list[types_pb2.Tier.ValueType]", [each.tier for each in place]),
        )
        for place in found
    ]


def answer(found: Answer, epoch: int) -> control_pb2.HeartbeatResponse:
    """The answer to one heartbeat."""
    return control_pb2.HeartbeatResponse(
        epoch=epoch,
        sequence=found.sequence,
        want_full=found.want_full,
        want_register=found.want_register,
        commands=found.commands,
        draining=found.draining,
    )


def node_info(
    member: Member, cluster: Cluster, now_s: float, without_stats: bool = False
) -> control_pb2.NodeInfo:
    """One node as operators see it."""
    return control_pb2.NodeInfo(
        node=member.node,
        incarnation=member.incarnation,
        endpoints=member.endpoints,
        stats=None if without_stats else member.stats,
        labels=member.labels,
        alive=member.state is not NodeState.LOST,
        silent_ms=max(0, int((now_s - member.heard_s) * 1000)),
        draining=member.node in cluster.draining,
        lent_bytes=cluster.ledger.lent_bytes(member.node),
        borrowed_bytes=cluster.ledger.borrowed_bytes(member.node),
    )


def plan(found: Planned, now_s: float) -> control_pb2.Plan:
    """One decision of the planner."""
    decision = found.decision
    return control_pb2.Plan(
        age_ms=max(0, int((now_s - found.at_s) * 1000)),
        debtor=decision.debtor,
        creditor=decision.creditor,
        sequence=decision.sequence,
        size_bytes=decision.size_bytes,
        gain=decision.gain,
        why=decision.why,
    )


def explanation(found: Explanation) -> control_pb2.ControlServiceExplainResponse:
    """Events, oldest first, and of each key its places and count."""
    events = [
        types_pb2.Event(
            age_ms=max(0, int(event.age_s * 1000)), node=event.node, what=event.what, why=event.why
        )
        for event in found.events
    ]
    return control_pb2.ControlServiceExplainResponse(
        events=events, places=places(found.places), replicas=found.replicas
    )


def shard_replicas(counts: Keyed[int]) -> control_pb2.ListReplicasResponse:
    """Counts of single shards, by namespace and count."""
    found: dict[tuple[NamespaceId, int], list[Key]] = {}
    for namespace, key, replicas in counts:
        found.setdefault((namespace, replicas), []).append(key)
    return control_pb2.ListReplicasResponse(
        counts=[
            control_pb2.ShardReplicas(
                namespace_id=namespace, replicas=replicas, keys=b"".join(sorted(keys))
            )
            for (namespace, replicas), keys in sorted(found.items())
        ]
    )


def _loans(request: control_pb2.HeartbeatRequest) -> control_pb2.Loans | None:
    if not request.HasField("loans"):
        return None
    loans = request.loans
    columns = (
        loans.debtor,
        loans.debtor_incarnation,
        loans.creditor,
        loans.creditor_incarnation,
        loans.state,
        loans.size_bytes,
    )
    _columns("loans", len(loans.loan), columns, MAX_LOANS)
    if unknown := set(loans.state) - _LOAN_STATES:
        raise Refused(f"{sorted(unknown)} are no states of loans; see LoanState in control.proto")
    return loans


def _sequences(request: control_pb2.HeartbeatRequest) -> control_pb2.Sequences | None:
    if not request.HasField("sequences"):
        return None
    sequences = request.sequences
    columns = (
        sequences.namespace_id,
        sequences.tokens,
        sequences.local_bytes,
        sequences.remote_bytes,
        sequences.block_bytes,
    )
    _columns("sequences", len(sequences.sequence), columns, MAX_SEQUENCES)
    return sequences


def _heat(request: control_pb2.HeartbeatRequest) -> control_pb2.Heat | None:
    if not request.HasField("heat"):
        return None
    heat = request.heat
    count, rest = divmod(len(heat.keys), DIGEST_BYTES)
    if rest:
        raise Refused(f"{len(heat.keys)} bytes of keys are no multiple of {DIGEST_BYTES}; mend it")
    _columns("hot shards", count, (heat.namespace_id, heat.reads), MAX_HEAT)
    return heat


def _links(request: control_pb2.HeartbeatRequest) -> tuple[control_pb2.Link, ...]:
    if len(request.links) > MAX_LINKS:
        raise Refused(f"{len(request.links)} links in one heartbeat are over {MAX_LINKS}")
    return tuple(request.links)


def _heads(request: control_pb2.HeartbeatRequest) -> tuple[control_pb2.Heads, ...]:
    names = 0
    for heads in request.heads:
        namespace_id(heads.namespace_id)
        count, rest = divmod(len(heads.names), DIGEST_BYTES)
        names += count
        if rest or names > MAX_HEADS:
            raise Refused(
                f"{len(heads.names)} bytes of states' names: they have {DIGEST_BYTES} each, and a "
                f"heartbeat tells of at most {MAX_HEADS}"
            )
        if heads.node:
            node_id(heads.node)
    return tuple(request.heads)


def _columns(what: str, count: int, columns: Iterable[Sized], limit: int) -> None:
    if count > limit:
        raise Refused(f"{count} {what} in one heartbeat are over {limit}; report fewer")
    for column in columns:
        if len(column) != count:
            raise Refused(f"a column of {len(column)} for {count} {what}; give one value for each")


def _incarnation(number: int) -> int:
    if number == 0:
        raise Refused("incarnation 0 is none; number a node's starts from 1, ever greater")
    return number


def _delta(inventory: control_pb2.Inventory, *, sized: bool) -> Delta:
    count, rest = divmod(len(inventory.keys), DIGEST_BYTES)
    if rest:
        raise Refused(
            f"{len(inventory.keys)} bytes of keys are no multiple of {DIGEST_BYTES}; mend that"
        )
    if sized and count and len(inventory.size_bytes) not in (1, count):
        raise Refused(
            f"{len(inventory.size_bytes)} sizes for {count} keys; give one for all or one each"
        )
    try:
        tier = Tier(inventory.tier)
    except ValueError as error:
        raise Refused(f"{inventory.tier} is no tier; see Tier in types.proto") from error
    return Delta(namespace_id(inventory.namespace_id), tier, inventory.keys)
