"""A worker's side of the vLLM connector: fills blocks from the fabric and copies them to it.

Two threads, one for loads and one for saves, each with a link of its own, so that neither
waits for the other and the engine waits for none.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvfabric.keys import namespace_id
from kvfabric.types import Key, Status
from kvfabric_client import Room
from kvfabric_client.integrations._vllm_layout import BlockMemory, Bytes, Shape
from kvfabric_client.integrations._vllm_link import Door, Link, log
from kvfabric_client.integrations._vllm_messages import Blocks, Load, StepJobs

SAVE_BATCH = 16  # shards a call
SAVE_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 5.0
HAND_OFF_WAIT_S = 2.0  # the engine stands still meanwhile
IDLE_WAIT_S = 0.01


@dataclass(slots=True)
class Counters:
    """Blocks since the start."""

    loaded: int = 0
    load_failed: int = 0
    saved: int = 0
    save_dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Save:
    key: Key
    parent: Key
    shard: Bytes


class Loader:
    """Loads in the order they came. A load is reported once nothing writes for it any more."""

    def __init__(
        self, memory: BlockMemory, shape: Shape, first_head: int, door: Door, timeout_s: float
    ) -> None:
        self._memory = memory
        self._shape = shape
        self._first_head = first_head
        self._room_id = namespace_id(door.namespace)
        self._timeout_s = timeout_s
        self._link = Link(door, "a vLLM worker's loads", timeout_s)
        self._changed = threading.Condition()
        self._queue: deque[tuple[float, Load]] = deque()
        self._pending = 0
        self._finished: set[str] = set()
        self._failed: set[int] = set()
        self._closing = False
        self.counters = Counters()
        self._thread = threading.Thread(target=self._run, name="kvfabric-load", daemon=True)
        self._thread.start()

    def begin(self, load: Load) -> None:
        """From now on the load has its deadline, also while it waits for others."""
        with self._changed:
            self._queue.append((time.monotonic() + self._timeout_s, load))
            self._pending += 1
            self._changed.notify_all()

    def take(self, wait_s: float) -> tuple[set[str], set[int]]:
        """Requests whose loads ended, and the blocks among them that were not filled.

        Waits up to `wait_s` for one that is under way.
        """
        with self._changed:
            if self._pending and not self._finished:
                self._changed.wait(wait_s)
            finished, self._finished = self._finished, set()
            failed, self._failed = self._failed, set()
            return finished, failed

    def close(self) -> None:
        """Ends the thread; a load that is under way ends by its deadline."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._timeout_s)

    def _run(self) -> None:
        self._link.call(lambda room: room.id)  # the first load need not wait for it
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    break
                until_s, load = self._queue.popleft()
            failed = self._load(load, until_s)
            with self._changed:
                self.counters.loaded += len(load.blocks.block_ids) - len(failed)
                self.counters.load_failed += len(failed)
                self._failed |= failed
                self._finished.add(load.request_id)
                self._pending -= 1
                self._changed.notify_all()
        self._link.close()

    def _load(self, load: Load, until_s: float) -> set[int]:
        """Fill the blocks; returns those that were not filled."""
        open_s = max(0.0, until_s - time.monotonic())
        block_ids = load.blocks.block_ids
        statuses = self._link.call(partial(self._fill, load, until_s), open_s)
        if statuses is None:
            return set(block_ids)
        return {
            block
            for block, status in zip(block_ids, statuses, strict=True)
            if status is not Status.OK
        }

    def _fill(self, load: Load, until_s: float, room: Room) -> list[Status]:
        blocks, left_s = load.blocks, until_s - time.monotonic()
        if left_s <= 0:  # spent in the queue
            return [Status.MISS] * len(blocks.block_ids)
        return room.get_into(
            self._shape.keys(self._room_id, self._first_head, blocks.first, blocks.links),
            [self._memory.pieces(block) for block in blocks.block_ids],
            at=load.at,
            timeout_s=left_s,
        )


class Saver:
    """Copies full blocks aside at once, so that vLLM may reuse them, and stores the copies.

    Holds at most `queue_bytes` of copies; what comes beyond is dropped and counted.
    """

    def __init__(
        self, memory: BlockMemory, shape: Shape, first_head: int, door: Door, queue_bytes: int
    ) -> None:
        self._memory = memory
        self._shape = shape
        self._first_head = first_head
        self._room_id = namespace_id(door.namespace)
        self._link = Link(door, "a vLLM worker's saves", SAVE_TIMEOUT_S)
        self._unused = queue_bytes // memory.shard_bytes  # shards that may still be made
        self._free: list[Bytes] = []  # last in, first out: warm memory first
        self._changed = threading.Condition()
        self._queue: deque[_Save] = deque()
        self._pending = 0  # queued or being stored
        self._closing = False
        self._flush_until_s = float("inf")
        self.counters = Counters()
        self._thread = threading.Thread(target=self._run, name="kvfabric-save", daemon=True)
        self._thread.start()

    def save(self, blocks: Blocks) -> None:
        """Copy blocks aside and queue them. They must be full and stay so during the call."""
        if self._link.is_down:
            self.counters.save_dropped += len(blocks.block_ids)
            return
        keys, parents = self._shape.keys_with_parents(self._room_id, self._first_head, blocks)
        for done, (key, parent, block) in enumerate(
            zip(keys, parents, blocks.block_ids, strict=True)
        ):
            shard = self._unused_shard()
            if shard is None:  # what continues a dropped block could not be found again
                self.counters.save_dropped += len(keys) - done
                return
            self._memory.copy_out(block, shard)
            with self._changed:
                self._queue.append(_Save(key, parent, shard))
                self._pending += 1
                self._changed.notify_all()

    def flush(self) -> None:
        """Waits until everything queued is stored or dropped, for at most `HAND_OFF_WAIT_S`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, HAND_OFF_WAIT_S)

    def close(self) -> None:
        """Stores what is queued, for at most `FLUSH_TIMEOUT_S`; the rest counts as dropped."""
        with self._changed:
            self._closing = True
            self._flush_until_s = time.monotonic() + FLUSH_TIMEOUT_S
            self._changed.notify_all()
        self._thread.join(FLUSH_TIMEOUT_S)
        with self._changed:
            self.counters.save_dropped += self._pending

    def _unused_shard(self) -> Bytes | None:
        with self._changed:
            if self._free:
                return self._free.pop()
            if not self._unused:
                return None
            self._unused -= 1
        return np.empty(self._memory.shard_bytes, np.uint8)

    def _run(self) -> None:
        self._link.call(lambda room: room.id)
        for batch in self._batches():
            stored = self._link.call(partial(self._put, batch))
            with self._changed:
                self.counters.saved += stored or 0
                self.counters.save_dropped += len(batch) - (stored or 0)
                self._pending -= len(batch)
                self._free += [save.shard for save in batch]
                self._changed.notify_all()
        self._link.close()

    def _batches(self) -> Iterator[list[_Save]]:
        """Queued saves until the end of the flush."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue or time.monotonic() > self._flush_until_s:
                    return
                batch = [self._queue.popleft() for _ in range(min(SAVE_BATCH, len(self._queue)))]
            yield batch

    def _put(self, batch: list[_Save], room: Room) -> int:
        """Store a batch; returns how many of it the fabric now holds."""
        statuses = room.put(
            [save.key for save in batch],
            [save.shard for save in batch],
            parents=[save.parent for save in batch],
            layers=self._memory.layers,
            timeout_s=SAVE_TIMEOUT_S,
        )
        return sum(status in (Status.OK, Status.EXISTS) for status in statuses)


class WorkerSide:
    """One rank's loads and saves, called by the thread that computes."""

    def __init__(
        self,
        memory: BlockMemory,
        shape: Shape,
        first_head: int,
        door: Door,
        *,
        load_timeout_s: float,
        save_queue_bytes: int,
    ) -> None:
        self._loader = Loader(memory, shape, first_head, door, load_timeout_s)
        self._saver = Saver(memory, shape, first_head, door, save_queue_bytes)
        self._failed: set[int] = set()
        self._idle = False

    def begin(self, jobs: StepJobs) -> None:
        """Start the step's loads."""
        self._idle = jobs.idle
        for load in jobs.loads:
            self._loader.begin(load)

    def save(self, jobs: StepJobs) -> None:
        """The step has been computed: its full blocks are copied out when this returns, and
        stored too where a request is about to be handed off."""
        for blocks in jobs.saves:
            self._saver.save(blocks)
        if jobs.flush:
            self._saver.flush()

    def finished(self) -> set[str]:
        """Requests whose loads ended. An engine with nothing to compute waits a little."""
        finished, failed = self._loader.take(IDLE_WAIT_S if self._idle else 0.0)
        self._failed |= failed
        return finished

    def failed_blocks(self) -> set[int]:
        """Blocks that were not filled, of the requests that `finished` gave last."""
        failed, self._failed = self._failed, set()
        return failed

    def close(self) -> None:
        self._saver.close()
        self._loader.close()
        loads, saves = self._loader.counters, self._saver.counters
        log.info(
            "kvfabric: %d blocks loaded (%d failed), %d saved (%d dropped)",
            loads.loaded,
            loads.load_failed,
            saves.saved,
            saves.save_dropped,
        )
