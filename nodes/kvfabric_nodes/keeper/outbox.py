"""What the keeper has yet to be told: queued in order of need, sent as far as the kernel takes it.

What was dropped, and who was given which segment, goes first: it must be out before anybody is
told that a slot or a segment is his (`push`). Records of sealed shards follow a moment later, in
small pieces and only while most of the kernel's buffer is free, so that there is room for the
former. A keeper that does not keep up even so is killed, which makes it forget: better none
than one that remembers what is no longer so.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable

from kvfabric_nodes.keeper import operations, process
from kvfabric_nodes.keeper.client import KeeperLink
from kvfabric_nodes.keeper.process import Op
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.shards import Shard

TELL_S = 0.01  # from a change to its telling: batches share it, and answers come first
SWEEP_SHARDS = 1024
PIECE_BYTES = 32 << 10  # encoded at a time: a quarter of a millisecond of the loop


class Outbox:
    """To one keeper, for as long as that lives. All methods run on the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        link: KeeperLink,
        put: Callable[[Shard], bytes],
        on_lost: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._link = link
        self._put = put  # the operation that has a keeper keep a shard
        self._on_lost = on_lost
        self._queue: deque[tuple[bytes, int | None]] = deque()  # with a descriptor beside it
        self._dropped: list[Extent] = []
        self._sealed: deque[Shard] = deque()  # some may be gone, or there twice
        self._sweep_at = SWEEP_SHARDS
        self._waking = False
        self._writing = False
        self._open = True
        loop.add_reader(link.sock, self._on_readable)

    @property
    def empty(self) -> bool:
        """Whether everything has gone out."""
        return not (self._queue or self._dropped or self._sealed)

    def segment(self, segment: int, descriptor: int) -> None:
        """Memory to keep; the descriptor stays the caller's."""
        own = os.dup(descriptor)
        self._queue.append((process.packed(Op.SEGMENT, process.SEGMENT.pack(segment)), own))
        self._wake()

    def close_segment(self, segment: int) -> None:
        self._queue.append((process.packed(Op.CLOSE, process.SEGMENT.pack(segment)), None))
        self._wake()

    def put(self, key: bytes, record: bytes) -> None:
        self._queue.append((process.put(key, record), None))
        self._wake()

    def delete(self, key: bytes) -> None:
        self._queue.append((process.packed(Op.DELETE, key), None))
        self._wake()

    def sealed(self, shard: Shard) -> None:
        """It is sealed, or its record changed."""
        self._sealed.append(shard)
        if len(self._sealed) > self._sweep_at:
            self._sweep()
        self._wake()

    def dropped(self, shard: Shard) -> None:
        self._dropped.append(shard.extent)
        self._wake()

    def all_of(self, shards: Iterable[Shard]) -> None:
        """Everything that is held, to a keeper that knows nothing."""
        self._sealed.extend(shards)
        self._wake()

    def push(self) -> None:
        """All but the records of sealed shards, at once: they are out, or the keeper forgets."""
        if self._open and (self._dropped or self._queue) and not self._drain():
            self._lose("it does not keep up")

    def flush(self) -> None:
        """As much as goes out without waiting."""
        self._waking = False
        if not self._open:
            return
        if self._drain() and self._sealed and self._link.roomy():
            self._queue.append((self._piece(), None))
            self._drain()
        if not self._open:
            return
        waiting = not self.empty
        if waiting != self._writing:
            self._writing = waiting
            if waiting:
                self._loop.add_writer(self._link.sock, self.flush)
            else:
                self._loop.remove_writer(self._link.sock)

    def close(self) -> KeeperLink:
        """Gives the link back, for an end of the caller's choice."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._link.sock)
            self._loop.remove_writer(self._link.sock)
        for _, descriptor in self._queue:
            if descriptor is not None:
                os.close(descriptor)
        self._queue.clear()
        self._sealed.clear()
        self._dropped.clear()
        return self._link

    def _wake(self) -> None:
        if not self._waking and not self._writing and self._open:
            self._waking = True
            self._loop.call_later(TELL_S, self.flush)

    def _sweep(self) -> None:
        """Whatever changes while the keeper takes nothing: no more waits than what is held."""
        self._sealed = deque(dict.fromkeys(shard for shard in self._sealed if shard.present))
        self._sweep_at = 2 * len(self._sealed) + SWEEP_SHARDS

    def _drain(self) -> bool:
        """Whether all that is queued went out."""
        if self._dropped:
            deletes = [operations.delete(each.segment, each.offset) for each in self._dropped]
            self._queue.append((b"".join(deletes), None))
            self._dropped.clear()
        try:
            while self._queue:
                data, descriptor = self._queue[0]
                sent = self._link.send(data, descriptor)
                if sent and descriptor is not None:
                    os.close(descriptor)
                if sent < len(data):
                    self._queue[0] = (data[sent:], descriptor if not sent else None)
                    return False
                self._queue.popleft()
        except OSError as error:
            self._lose(str(error))
            return False
        return True

    def _piece(self) -> bytes:
        """The next records, oldest first."""
        puts: list[bytes] = []
        left = PIECE_BYTES
        while left > 0 and self._sealed:
            shard = self._sealed.popleft()
            if shard.present:
                try:
                    puts.append(self._put(shard))
                except struct.error:  # an endless owner: it is not kept
                    continue
                left -= len(puts[-1])
        return b"".join(puts)

    def _on_readable(self) -> None:
        self._lose("it ended")  # it has nothing to say

    def _lose(self, why: str) -> None:
        if self._open:
            self.close().kill(wait=False)
            self._link.close()
            self._on_lost(why)
