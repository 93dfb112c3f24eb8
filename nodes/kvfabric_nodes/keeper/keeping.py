"""A node and its keeper: what was kept is adopted at the start, what changes is told, and a
keeper that is lost is replaced by another, which is told everything.

The node never waits for its keeper, and runs without one where none can be had.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from kvfabric import checksums
from kvfabric.clock import Clock
from kvfabric.errors import FabricError, Unreachable
from kvfabric_nodes.arena import Arena, Memory, is_sealed
from kvfabric_nodes.core import NodeCore
from kvfabric_nodes.extents import Extents
from kvfabric_nodes.handler import Handler
from kvfabric_nodes.keeper import adoption, records
from kvfabric_nodes.keeper.client import Held, KeeperLink, take_over
from kvfabric_nodes.keeper.guests import Guests, guests_of
from kvfabric_nodes.keeper.outbox import Outbox
from kvfabric_nodes.keeper.records import Guest, Record, Shape
from kvfabric_nodes.metrics import KeeperTally
from kvfabric_nodes.promises import Session
from kvfabric_nodes.settings import NodeSettings
from kvfabric_nodes.shards import Shard

log = structlog.get_logger(__name__)

LOOK_S = 0.5  # how late the end of a guest of an earlier start may be noticed
RESTART_S, MAX_RESTART_S = 1.0, 60.0  # from the loss of a keeper to the next one's start
LAST_WORDS_S = 5.0  # for an orderly stop to tell what is to be kept
VERIFIERS = 8
VERIFY_RECORDS = 64  # by one thread at a time


@dataclass(frozen=True, slots=True)
class Restored:
    """How a node begins: with what its keeper held, or with nothing."""

    core: NodeCore
    memory: dict[int, Memory]  # of an earlier start, by segment
    former: dict[int, Session]
    guests: list[Guest]
    stale: list[bytes]  # keys of the keeper's table that are no longer so


class Keeping:
    """See the module. `restored` comes first, and may take a while."""

    def __init__(self, settings: NodeSettings, clock: Clock) -> None:
        self.tally = KeeperTally()
        self._node = settings.node
        self._path = settings.keeper_path
        self._keep_s = settings.keep_s
        size_bytes = settings.segment_bytes
        self._shape = Shape(settings.memory // size_bytes, size_bytes)
        self._clock = clock
        self._link: KeeperLink | None = None
        self._outbox: Outbox | None = None
        self._restart_s = RESTART_S
        self._again = asyncio.Event()
        self._starting: asyncio.Future[None] | None = None
        self._stopping = False
        self._keep = False

    # At the start -------------------------------------------------------------------

    async def restored(self, with_keeper: bool) -> Restored:
        """What the node begins with. Conflict where another one has the keeper."""
        if not with_keeper:
            return self._nothing()
        return await asyncio.get_running_loop().run_in_executor(None, self._restore)

    def _restore(self) -> Restored:
        """Takes the keeper over and adopts what it holds."""
        try:
            self._link, held = take_over(self._node, self._path, self._keep_s)
        except Unreachable as error:
            log.warning("no_keeper", why=str(error), effect="a restart will begin with nothing")
            return self._nothing()
        try:
            if held.table or held.segments:
                return self._adopt(held)
        except Exception:
            # A node that could not start for what it held would never start again.
            log.exception("adoption_failed", effect="the node begins with nothing")
            self._give_up()
        return self._nothing()

    def _adopt(self, held: Held) -> Restored:
        started_s = time.monotonic()
        state = records.read(held.table)
        size_bytes = self._shape.segment_bytes
        memory: dict[int, Memory] = {}
        for segment, descriptor in list(held.segments.items()):
            if is_sealed(descriptor, size_bytes):
                memory[segment] = Memory(segment, size_bytes, held.segments.pop(segment))
        held.close()
        wall_s = time.time()
        plan = adoption.plan(state, memory, self._shape, wall_s)
        if state.shape != self._shape:
            log.warning("nothing_adopted", why="the keeper holds memory of another shape")
            _close(memory)
            self._give_up()
            self.tally.not_adopted = plan.dropped
            return self._nothing()
        right = _verified(plan.records, memory)
        dropped = plan.dropped
        if len(right) < len(plan.records):
            dropped["damaged"] = len(plan.records) - len(right)
        guests = [guest for guest in state.guests if guest.segment in memory]
        now_s = self._clock.now()
        adopted = adoption.rebuild(right, guests, memory, self._shape, now_s, wall_s)
        current = {records.slot_key(record.segment, record.offset) for record in right}
        current |= {records.guest_key(guest) for guest in guests}
        current.add(records.encode_shape(self._shape)[0])
        self.tally.adopted = len(right)
        self.tally.not_adopted = dropped
        log.info(
            "adopted",
            shards=len(right),
            size_bytes=sum(record.size_bytes for record in right),
            dropped=dict(dropped),
            frozen_segments=len(adopted.former),
            seconds=round(time.monotonic() - started_s, 3),
        )
        return Restored(
            adopted.core,
            memory,
            adopted.former,
            guests,
            [key for key in held.table if key not in current],
        )

    def _begin_anew(self) -> None:
        """Another keeper, that holds nothing."""
        link: KeeperLink | None = None
        try:
            while link is None:
                link, held = take_over(self._node, self._path, self._keep_s)
                if held.segments or held.table:
                    held.close()
                    link.end()
                    link = None
            self._link = link
        except FabricError as error:
            log.warning("no_keeper", why=str(error), effect="a restart will begin with nothing")

    def _give_up(self) -> None:
        """What the keeper holds is not wanted."""
        if self._link is not None:
            self._link.end()
            self._link = None
        self._begin_anew()

    def _nothing(self) -> Restored:
        extents = Extents(self._shape.segments, self._shape.segment_bytes)
        return Restored(NodeCore(extents), {}, {}, [], [])

    # While it runs ------------------------------------------------------------------

    def attach(self, restored: Restored, arena: Arena, handler: Handler) -> None:
        """From here on the keeper is told what changes."""
        self._loop = asyncio.get_running_loop()
        self._keep = self.tally.adopted > 0
        self._core, self._arena = restored.core, arena
        self._guests = Guests(restored.guests, restored.former, handler.close_session)
        self.tally.frozen = self._guests.frozen
        core = restored.core
        core.on_sealed.append(lambda shard, _: self._tell(shard))
        core.on_pinned.append(self._tell)
        core.on_dropped.append(lambda shard, *_: self._forget(shard))
        core.on_granted.append(self._push)
        arena.on_replaced = self._replaced
        handler.guests = self
        if self._link is None:
            self._again.set()
            return
        outbox = self._open(self._link)
        for key in restored.stale:
            outbox.delete(key)
        for segment in restored.memory:
            if segment not in set(arena):
                outbox.close_segment(segment)
        self._tell_segments(outbox, set(restored.memory))

    async def run(self) -> None:
        """Looks after guests of an earlier start, and after the keeper. Until cancelled."""
        while True:
            if self._guests.frozen:
                self._guests.look(self)
            self.tally.frozen = self._guests.frozen
            try:
                async with asyncio.timeout(LOOK_S if self._guests.frozen else None):
                    await self._again.wait()
            except TimeoutError:
                continue
            self._again.clear()
            await asyncio.sleep(self._restart_s)
            self._restart_s = min(2 * self._restart_s, MAX_RESTART_S)
            await self._restart()

    async def _restart(self) -> None:
        """A new keeper, which is told everything."""
        self._starting = self._loop.run_in_executor(None, self._begin_anew)
        await self._starting
        link = self._link
        if link is None or self._stopping:
            self._again.set()
            return
        outbox = self._open(link)
        self._tell_segments(outbox, set())
        for guest in self._guests.all():
            outbox.put(records.guest_key(guest), records.encode_guest(guest))
        outbox.all_of(self._core.shards)
        log.info("keeper_replaced", pid=link.pid, shards=self._core.shards.count)

    def ends(self, *, keep: bool) -> None:
        """The node begins to stop in good order. `keep`: its keeper waits for another rManager.

        The node closes its clients' sockets now, which may go on mapping what they map: as far
        as the keeper knows, they stay.
        """
        self._keep = keep
        self._stopping = True

    async def stop(self) -> None:
        """The node has ended; its keeper with it, unless another rManager is to come.

        One does after a start that failed, where there was something to adopt.
        """
        self._stopping = True
        if self._starting is not None and not self._starting.done():
            await asyncio.wait([self._starting])
        keep = self._keep and await self._told_all()
        link = self._link if self._outbox is None else self._outbox.close()
        self._outbox = self._link = None
        if link is not None and keep:
            link.close()
        elif link is not None:
            await self._loop.run_in_executor(None, link.end)

    async def _told_all(self) -> bool:
        """Whether the keeper knows everything; half of it would not be worth keeping."""
        until_s = time.monotonic() + LAST_WORDS_S
        while self._outbox is not None and not self._outbox.empty:
            if time.monotonic() > until_s:
                return False
            self._outbox.flush()
            await asyncio.sleep(0.001)
        return self._outbox is not None

    def _open(self, link: KeeperLink) -> Outbox:
        self._outbox = Outbox(self._loop, link, self._encode, self._lost)
        self._link = None
        self.tally.connected = True
        self._outbox.put(*records.encode_shape(self._shape))
        return self._outbox

    def _tell_segments(self, outbox: Outbox, known: set[int]) -> None:
        for segment in self._arena:
            if segment not in known:
                outbox.segment(segment, self._arena.descriptor(segment))

    def _lost(self, why: str) -> None:
        log.warning("keeper_lost", why=why, effect="another is started and told everything")
        self.tally.connected = False
        self.tally.losses += 1
        self._outbox = None
        self._again.set()

    # What changes -------------------------------------------------------------------

    def _tell(self, shard: Shard) -> None:
        if self._outbox is not None:
            self._outbox.sealed(shard)

    def _forget(self, shard: Shard) -> None:
        if self._outbox is not None:
            self._outbox.dropped(shard)

    def _push(self) -> None:
        if self._outbox is not None:
            self._outbox.push()

    def _replaced(self, old: int, new: int) -> None:
        if self._outbox is not None:
            self._outbox.close_segment(old)
            self._outbox.segment(new, self._arena.descriptor(new))

    def put(self, key: bytes, record: bytes) -> None:
        if self._outbox is not None:
            self._outbox.put(key, record)

    def delete(self, key: bytes) -> None:
        if self._outbox is not None:
            self._outbox.delete(key)

    # Guests: called by the wire -------------------------------------------------------

    def mapped(self, token: bytes, pid: int, segments: Sequence[int]) -> None:
        """A session's process is about to be given these; recorded when this returns."""
        self._guests.mapped(guests_of(token, pid, segments), self)
        self._push()

    def unmapped(self, token: bytes, segments: Sequence[int]) -> None:
        self._guests.unmapped(token, segments, self)

    def ended(self, token: bytes) -> None:
        if not self._stopping:
            self._guests.ended(token, self)

    def ended_before(self, tokens: Sequence[bytes]) -> None:
        self._guests.ended_before(tokens, self)
        self.tally.frozen = self._guests.frozen

    def erased(self) -> None:
        self._push()

    def _encode(self, shard: Shard) -> bytes:
        extent, expires_s = shard.extent, shard.expires_s
        return records.encode_fields(
            extent.size_bytes,
            extent.generation,
            shard.namespace,
            shard.key,
            shard.parent,
            shard.pool[0],
            shard.owner,
            shard.size_bytes,
            shard.layers,
            shard.checksums,
            None if expires_s is None else expires_s - self._clock.now() + time.time(),
            shard.pinned,
        )


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


def _close(memory: dict[int, Memory]) -> None:
    for each in memory.values():
        each.close()
