"""What placement has to know of a node, taken from what the node reported of itself."""

from __future__ import annotations

from kvfabric.membership import Member
from kvfabric.rpc.v1 import types_pb2


def memory(member: Member) -> types_pb2.TierStats:
    """The tier that loans and moves take memory from; empty where the node has none."""
    for tier in member.stats.tiers:
        if tier.tier == types_pb2.TIER_DRAM:
            return tier
    return types_pb2.TierStats()


def evictable_bytes(tier: types_pb2.TierStats) -> int:
    """Cache that nobody needs: what eviction may free at once, leases and pins aside."""
    return max(0, tier.held_bytes - tier.claimed_bytes)


def load(member: Member) -> float:
    """How busy a node is: what it has promised to clients at this moment."""
    return float(member.stats.leases + member.stats.reservations)


def lend_cap_bytes(member: Member) -> int | None:
    """What a node lends at most; None where it does not say."""
    stats = member.stats
    return stats.lend_cap_bytes if stats.HasField("lend_cap_bytes") else None
