"""What a node begins with: what its keeper holds, as far as it is right, or nothing.

Runs before there is anything to serve, and may take a while: every byte that is adopted is
read once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from kvfabric import checksums
from kvfabric.clock import Clock
from kvfabric.errors import FabricError, Unreachable
from kvfabric_nodes.keeper import adoption, records
from kvfabric_nodes.keeper.client import Held, KeeperLink, take_over
from kvfabric_nodes.keeper.records import Guest, Record, Shape
from kvfabric_nodes.metrics import KeeperTally
from kvfabric_nodes.settings import NodeSettings
from kvfabric_nodes.store.arena import Memory, is_sealed
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents
from kvfabric_nodes.store.promises import Session

log = structlog.get_logger(__name__)

VERIFIERS = 8
VERIFY_RECORDS = 64  # by one thread at a time


@dataclass(frozen=True, slots=True)
class Restored:
    """How a node begins."""

    core: NodeCore
    memory: dict[int, Memory] = field(default_factory=dict)  # of an earlier start, by segment
    former: dict[int, Session] = field(default_factory=dict)  # by frozen segment
    guests: list[Guest] = field(default_factory=list)
    stale: list[bytes] = field(default_factory=list)  # keys of the keeper's table to be deleted


def shape_of(settings: NodeSettings) -> Shape:
    return Shape(settings.memory // settings.segment_bytes, settings.segment_bytes)


def nothing(settings: NodeSettings) -> Restored:
    shape = shape_of(settings)
    return Restored(NodeCore(Extents(shape.segments, shape.segment_bytes)))


def restore(
    settings: NodeSettings, clock: Clock, tally: KeeperTally
) -> tuple[KeeperLink | None, Restored]:
    """The node's keeper (None: there can be none) and what was adopted from it.

    Raises Conflict where another rManager has it.
    """
    try:
        link, held = take_over(settings.node, settings.keeper_path, settings.keep_s)
    except Unreachable as error:
        _log_none(error)
        return None, nothing(settings)
    if not held.table and not held.segments:
        return link, nothing(settings)
    try:
        restored = _adopt(held, shape_of(settings), clock, tally)
    except Exception:
        # A node that could not start for what it held would never start again.
        log.exception("adoption_failed", effect="the node begins with nothing")
        restored = None
    if restored is not None:
        return link, restored
    link.end()
    return begin_anew(settings), nothing(settings)


def begin_anew(settings: NodeSettings) -> KeeperLink | None:
    """A keeper that holds nothing; None where there can be none."""
    try:
        while True:
            link, held = take_over(settings.node, settings.keeper_path, settings.keep_s)
            if not held.segments and not held.table:
                return link
            held.close()
            link.end()
    except FabricError as error:
        _log_none(error)
        return None


def _adopt(held: Held, shape: Shape, clock: Clock, tally: KeeperTally) -> Restored | None:
    """None where the keeper has another node's shape."""
    started_s, wall_s = time.monotonic(), time.time()
    state = records.read(held.table)
    memory: dict[int, Memory] = {}
    for segment, descriptor in list(held.segments.items()):
        if is_sealed(descriptor, shape.segment_bytes):
            memory[segment] = Memory(segment, shape.segment_bytes, held.segments.pop(segment))
    held.close()
    plan = adoption.plan(state, memory, shape, wall_s)
    tally.not_adopted = plan.dropped
    if state.shape != shape:
        log.warning("nothing_adopted", why="the keeper holds memory of another shape")
        for each in memory.values():
            each.close()
        return None
    right = _verified(plan.records, memory)
    if len(right) < len(plan.records):
        plan.dropped["damaged"] = len(plan.records) - len(right)
    guests = [guest for guest in state.guests if guest.segment in memory]
    adopted = adoption.rebuild(right, guests, memory, shape, clock.now(), wall_s)
    tally.adopted = len(right)
    log.info(
        "adopted",
        shards=len(right),
        size_bytes=sum(record.size_bytes for record in right),
        dropped=dict(plan.dropped),
        frozen_segments=len(adopted.former),
        seconds=round(time.monotonic() - started_s, 3),
    )
    current = {records.slot_key(record.segment, record.offset) for record in right}
    current |= {records.guest_key(guest) for guest in guests}
    current.add(records.encode_shape(shape)[0])
    stale = [key for key in held.table if key not in current]
    return Restored(adopted.core, memory, adopted.former, guests, stale)


def _verified(plan: Sequence[Record], memory: Mapping[int, Memory]) -> list[Record]:
    """Those whose bytes have their checksums; hashing releases the GIL."""

    def right(some: Sequence[Record]) -> list[Record]:
        return [record for record in some if _is_right(record, memory[record.segment].view)]

    batches = [plan[i : i + VERIFY_RECORDS] for i in range(0, len(plan), VERIFY_RECORDS)]
    threads = min(VERIFIERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "kvfabric-adopt") as pool:
        return [record for batch in pool.map(right, batches) for record in batch]


def _is_right(record: Record, segment: memoryview) -> bool:
    view = segment[record.offset : record.offset + record.size_bytes]
    return checksums.matches(view, record.layers, record.checksums)


def _log_none(error: FabricError) -> None:
    log.warning("no_keeper", why=str(error), effect="a restart will begin with nothing")
