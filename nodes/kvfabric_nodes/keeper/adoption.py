"""A core rebuilt from what the keeper held: what may be adopted, and how it comes into the books.

Nothing is believed unseen: only shards whose bytes were found right are adopted. A segment
that processes of an earlier start may still map is frozen: what is sealed there is served, and
nothing of it is granted anew before the last of these guests has gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from kvfabric import checksums
from kvfabric.errors import Refused
from kvfabric_nodes.keeper.records import Guest, Record, Shape, State
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extent, Extents, Pool, slot_bytes
from kvfabric_nodes.store.promises import Session
from kvfabric_nodes.store.shards import Shard

ADOPTED = "adopted"
WHY = "after a restart of the node; its bytes were verified"


@dataclass(frozen=True, slots=True)
class Plan:
    """What may be adopted once its bytes are verified, and why the rest may not."""

    records: list[Record]
    dropped: Counter[str]  # by reason


@dataclass(frozen=True, slots=True)
class Adopted:
    """A core as it goes on."""

    core: NodeCore
    former: dict[int, Session]  # frozen segments, and what stands for their guests


def plan(state: State, segments: Collection[int], shape: Shape, wall_s: float) -> Plan:
    """`segments`: those whose memory is there. `wall_s`: the time of day."""
    dropped: Counter[str] = Counter()
    if state.unreadable:
        dropped["unreadable"] = state.unreadable
    if state.shape != shape or len(segments) > shape.segments:
        dropped["other shape"] += len(state.shards)
        return Plan([], dropped)
    chosen: list[Record] = []
    seen: set[tuple[bytes, bytes]] = set()
    pools: dict[int, Pool] = {}
    for record in state.shards:
        pool = pools.setdefault(record.segment, _pool(record))
        name = (record.namespace, record.key)
        if record.segment not in segments:
            why = "no memory"
        elif pool != _pool(record) or not _fits(record, shape):
            why = "misplaced"
        elif name in seen:
            why = "twice"
        elif not record.layers:
            why = "no checksums"
        elif record.expires_at_s is not None and record.expires_at_s <= wall_s:
            why = "expired"
        else:
            seen.add(name)
            chosen.append(record)
            continue
        dropped[why] += 1
    return Plan(chosen, dropped)


def rebuild(
    records: Sequence[Record],
    guests: Iterable[Guest],
    segments: Collection[int],
    shape: Shape,
    now_s: float,
    wall_s: float,
) -> Adopted:
    """The core that holds these shards, whose bytes are right.

    `segments`: all that the keeper had. Those that hold nothing are given up, at once or, where
    a guest may still map them, after the last has gone.
    """
    first = max(segments, default=0) + 1
    slabs: dict[int, dict[int, Record]] = {}
    for record in records:
        slabs.setdefault(record.segment, {})[record.offset] = record
    generation = max((r.generation for slab in slabs.values() for r in slab.values()), default=0)
    extents = Extents(shape.segments, shape.segment_bytes, first, generation + 1)
    core = NodeCore(extents)
    mapped = {guest.segment for guest in guests} & set(segments)
    places: dict[tuple[int, int], Extent] = {}
    for segment, slab in slabs.items():
        pool = _pool(next(iter(slab.values())))
        used = {offset: record.generation for offset, record in slab.items()}
        if segment in mapped:
            slots = range(shape.segment_bytes // pool[1])
            used |= {i * pool[1]: 0 for i in slots if i * pool[1] not in slab}
        for extent in extents.restore(segment, pool, used):
            places[segment, extent.offset] = extent
    held: dict[int, list[Shard]] = {}
    for record in records:
        shard = _shard(record, places.pop((record.segment, record.offset)), now_s - wall_s)
        core.learn(shard.namespace, record.tenant)
        core.hold(shard, ADOPTED, WHY, now_s)
        held.setdefault(record.segment, []).append(shard)
    former: dict[int, Session] = {}
    for segment in sorted(mapped):
        if segment not in slabs:
            extents.restore_retired(segment)
        tenant = held[segment][0].pool[0] if segment in held else ""
        empty = [extent for (number, _), extent in places.items() if number == segment]
        former[segment] = core.freeze(tenant, segment, held.get(segment, []), empty, now_s)
    return Adopted(core, former)


def _shard(record: Record, extent: Extent, clock_s: float) -> Shard:
    """`clock_s`: the core's clock less the time of day."""
    expires_at_s = record.expires_at_s
    return Shard(
        namespace=record.namespace,
        key=record.key,
        parent=record.parent,
        pool=_pool(record),
        extent=extent,
        size_bytes=record.size_bytes,
        layers=record.layers,
        checksums=record.checksums,
        owner=record.owner,
        expires_s=None if expires_at_s is None else expires_at_s + clock_s,
        pinned=record.pinned,
    )


def _pool(record: Record) -> Pool:
    return (record.tenant, record.slot_bytes)


def _fits(record: Record, shape: Shape) -> bool:
    """Whether it says what a node of this shape would."""
    try:
        parts = len(checksums.parts(record.size_bytes, record.layers))
    except Refused:
        return False
    return (
        record.slot_bytes == slot_bytes(record.size_bytes)
        and record.offset % record.slot_bytes == 0
        and record.offset + record.slot_bytes <= shape.segment_bytes
        and (not record.layers or len(record.checksums) == parts)
    )
