"""A running node and its keeper: what changes is told, guests of an earlier start are looked
after, and a keeper that is lost is replaced by another, which is told everything.

The node never waits for its keeper, and runs without one where none can be had.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from kvfabric.clock import Clock
from kvfabric_nodes.keeper import operations, records, restoring
from kvfabric_nodes.keeper.client import KeeperLink
from kvfabric_nodes.keeper.guests import Guests, guests_of
from kvfabric_nodes.keeper.outbox import Outbox
from kvfabric_nodes.keeper.restoring import Restored
from kvfabric_nodes.metrics import KeeperTally
from kvfabric_nodes.serving.handler import Handler
from kvfabric_nodes.settings import NodeSettings
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.shards import Shard

log = structlog.get_logger(__name__)

LOOK_S = 0.5  # how late the end of a guest of an earlier start may be noticed
RESTART_S, MAX_RESTART_S = 1.0, 60.0  # from the loss of a keeper to the next one's start
LAST_WORDS_S = 5.0  # for an orderly stop to tell what is to be kept


class Keeping:
    """See the module. `restored` comes first, and may take a while."""

    def __init__(self, settings: NodeSettings, clock: Clock) -> None:
        self.tally = KeeperTally()
        self._settings = settings
        self._clock = clock
        self._link: KeeperLink | None = None
        self._outbox: Outbox | None = None
        self._opened_s = 0.0
        self._restart_s = RESTART_S
        self._again = asyncio.Event()
        self._starting: asyncio.Future[KeeperLink | None] | None = None
        self._stopping = False
        self._keep = False

    async def restored(self, with_keeper: bool) -> Restored:
        """What the node begins with. Conflict where another one has the keeper."""
        if not with_keeper:
            return restoring.nothing(self._settings)
        loop = asyncio.get_running_loop()
        self._link, restored = await loop.run_in_executor(
            None, restoring.restore, self._settings, self._clock, self.tally
        )
        return restored

    def attach(self, restored: Restored, arena: Arena, handler: Handler) -> None:
        """From here on the keeper is told what changes."""
        self._loop = asyncio.get_running_loop()
        self._keep = self.tally.adopted > 0
        self._core, self._arena = restored.core, arena
        self._guests = Guests(restored.guests, restored.former, handler.close_session)
        core = restored.core
        core.on_sealed.append(self._tell)
        core.on_pinned.append(self._tell)
        core.on_dropped.append(self._forget)
        core.on_granted.append(self._push)
        arena.on_replaced = self._replaced
        handler.guests = self
        if self._link is None:
            self._again.set()
            return
        outbox = self._open(self._link)
        for key in restored.stale:
            outbox.delete(key)
        for segment in restored.memory.keys() - set(arena):
            outbox.close_segment(segment)
        self._tell_segments(outbox, set(restored.memory))

    async def run(self) -> None:
        """Looks after guests of an earlier start, and after the keeper. Until cancelled."""
        await asyncio.gather(self._look_after_guests(), self._look_after_keeper())

    async def _look_after_guests(self) -> None:
        """Until the last of them has gone."""
        while self._guests.frozen:
            self._guests.look(self)
            self.tally.frozen = self._guests.frozen
            await asyncio.sleep(LOOK_S)
        self.tally.frozen = 0

    async def _look_after_keeper(self) -> None:
        while True:
            await self._again.wait()
            self._again.clear()
            await asyncio.sleep(self._restart_s)
            self._restart_s = min(2 * self._restart_s, MAX_RESTART_S)
            await self._restart()

    async def _restart(self) -> None:
        """A new keeper, which is told everything."""
        self._starting = self._loop.run_in_executor(None, restoring.begin_anew, self._settings)
        link = await asyncio.shield(self._starting)
        if self._stopping:
            return
        if link is None:
            self._again.set()
            return
        outbox = self._open(link)
        self._tell_segments(outbox, set())
        for guest in self._guests.all():
            outbox.put(records.guest_key(guest), records.encode_guest(guest))
        outbox.all_of(self._core.shards)
        log.info("keeper_replaced", pid=link.pid, shards=self._core.shards.count)

    def leave(self) -> None:
        """Of a start that failed before the keeper was told anything: it is the next one's."""
        if self._link is not None:
            self._link.close()
            self._link = None

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
        if self._starting is not None and self._outbox is None:
            self._link = await self._starting  # it is about to be there
        keep = self._keep and await self._told_all()
        link = self._link if self._outbox is None else self._outbox.close()
        self._outbox = self._link = self._starting = None
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
        self._outbox = Outbox(self._loop, link, self._record, self._lost)
        self._link = self._starting = None
        self._opened_s = self._clock.now()
        self.tally.connected = True
        self._outbox.put(*records.encode_shape(restoring.shape_of(self._settings)))
        return self._outbox

    def _tell_segments(self, outbox: Outbox, known: set[int]) -> None:
        for segment in self._arena:
            if segment not in known:
                outbox.segment(segment, self._arena.descriptor(segment))

    def _lost(self, why: str) -> None:
        log.warning("keeper_lost", why=why, effect="another is started and told everything")
        if self._clock.now() - self._opened_s > MAX_RESTART_S:
            self._restart_s = RESTART_S
        self.tally.connected = False
        self.tally.losses += 1
        self._outbox = None
        self._again.set()

    # What changes -------------------------------------------------------------------

    def _tell(self, shard: Shard, *_: object) -> None:
        if self._outbox is not None:
            self._outbox.sealed(shard)

    def _forget(self, shard: Shard, *_: object) -> None:
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

    def _record(self, shard: Shard) -> bytes:
        """The operation that has the keeper keep it."""
        extent, expires_s = shard.extent, shard.expires_s
        return operations.put(
            extent.segment,
            extent.offset,
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
