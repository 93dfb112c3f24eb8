"""Moving shards by shared memory: reserve, copy, commit; acquire, copy, release."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import TypeVar

from kvfabric.checksums import parts
from kvfabric.errors import FabricError, Unreachable
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric.wire.connection import Connection
from kvfabric_client.buffers import Pieces
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link

# Checked shards are committed in some COMMITS pieces while later ones are being copied: the
# node verifies meanwhile. Without checksums it has nothing to verify, and gets one commit.
COMMITS = 4
MIN_COMMIT_BYTES, MAX_COMMIT_BYTES = 1 << 20, 4 << 20
# The node's verifying keeps a core busy; a second copying thread needs another one: with two
# cores it made 16 x 1 MiB take 5.3 ms instead of 4.4.
SPLIT_CHECKED = len(os.sched_getaffinity(0)) > 2
# Below this a second copying thread costs more than it brings.
SPLIT_BYTES = 4 << 20


J = TypeVar("J")

Target = Callable[[int, int], Pieces | None]
"""Where the shard of a key's index and of this size is to go; None: it is not wanted."""


@dataclass(frozen=True, slots=True)
class Held:
    """Shards under a lease, by index of the request; None: a miss."""

    lease: int
    places: list[memoryview | None]
    layers: Sequence[int]  # 0 or missing: without checksums
    checksums: Sequence[int]  # of the found ones, in order
    lease_s: float

    def found(self) -> list[tuple[int, memoryview]]:
        """Indices and places of the hits."""
        return [(index, place) for index, place in enumerate(self.places) if place is not None]


def put(
    link: Link,
    request: node_pb2.ReserveRequest,
    sources: Sequence[Pieces],
    deadline: Deadline,
    copiers: Executor,
    *,
    checked: bool,
) -> tuple[list[Status], dict[int, str]]:
    """Writes shards; (status per key, reasons by index)."""
    with link.connection(deadline.at_s) as connection:
        answer = connection.call("reserve", request, deadline.at_s).reserve_response
    statuses = [Status(status) for status in answer.statuses]
    reasons = dict(answer.reasons)
    granted = [index for index, status in enumerate(statuses) if status is Status.OK]
    if not granted:
        return statuses, reasons
    segments, offsets = list(answer.segments), list(answer.offsets)
    try:
        link.map_segments({segments[index] for index in granted}, deadline.at_s)
        with link.connection(deadline.at_s) as connection:
            total_bytes = sum(sources[index].size_bytes for index in granted)
            piece_bytes = min(max(total_bytes // COMMITS, MIN_COMMIT_BYTES), MAX_COMMIT_BYTES)
            writer = _Writer(
                connection,
                answer.reservation,
                request.layers,
                deadline,
                piece_bytes if checked else None,
            )
            try:
                shards = [
                    (i, sources[i], link.place(segments[i], offsets[i], sources[i].size_bytes))
                    for i in granted
                ]
                if checked and not SPLIT_CHECKED:
                    writer.fill(shards)
                else:
                    split(shards, writer.fill, total_bytes, copiers)
                writer.finish(statuses, reasons)
            finally:
                writer.forget()
    except BaseException:  # no thread of ours writes any more: `split` has waited for them
        abort = node_pb2.AbortRequest(reservation=answer.reservation)
        until_s = deadline.extended().at_s
        with contextlib.suppress(FabricError), link.connection(until_s) as connection:
            connection.tell("abort", abort, until_s)
        raise
    return statuses, reasons


class _Writer:
    """Fills extents from one or two threads, and commits them as they become full."""

    def __init__(
        self,
        connection: Connection,
        reservation: int,
        layers: int,
        deadline: Deadline,
        commit_bytes: int | None,
    ) -> None:
        """`commit_bytes`: how much goes into a commit; None: all of a thread's, unchecked."""
        self._connection = connection
        self._reservation = reservation
        self._layers = layers or 1
        self._deadline = deadline
        self._commit_bytes = commit_bytes
        self._lock = threading.Lock()
        self._commits: list[tuple[int, list[int]]] = []  # (frame id, indices)

    def fill(self, shards: Iterable[tuple[int, Pieces, memoryview]]) -> None:
        """(index, source, place) one after the other."""
        indices: list[int] = []
        sums: list[int] = []
        size_bytes = 0
        for index, source, place in shards:
            self._deadline.check()
            sums += source.store(place, self._layers, checked=self._commit_bytes is not None)
            indices.append(index)
            size_bytes += source.size_bytes
            if self._commit_bytes is not None and size_bytes >= self._commit_bytes:
                self._commit(indices, sums)
                indices, sums, size_bytes = [], [], 0
        if indices:
            self._commit(indices, sums)

    def _commit(self, indices: list[int], sums: list[int]) -> None:
        request = node_pb2.CommitRequest(
            reservation=self._reservation, indices=indices, checksums=sums
        )
        with self._lock:
            frame_id = self._connection.begin("commit", request, self._deadline.at_s)
            self._commits.append((frame_id, indices))

    def finish(self, statuses: list[Status], reasons: dict[int, str]) -> None:
        """Takes in the answers to all commits."""
        while self._commits:
            frame_id, indices = self._commits.pop(0)
            answer = self._connection.finish(frame_id, self._deadline.at_s).commit_response
            for index, status in zip(indices, answer.statuses, strict=True):
                statuses[index] = Status(status)
            reasons.update(answer.reasons)

    def forget(self) -> None:
        """Gives up the answers that were not fetched."""
        for frame_id, _ in self._commits:
            self._connection.forget(frame_id)


def acquire(
    link: Link,
    namespace: NamespaceId,
    keys: Sequence[Key],
    lease_s: float,
    deadline: Deadline,
    *,
    checked: bool,
) -> Held:
    """A lease on what the node holds of these keys, mapped."""
    request = node_pb2.AcquireRequest(
        namespace_id=namespace,
        keys=keys,
        lease_ms=milliseconds(lease_s),
        without_checksums=not checked,
    )
    with link.connection(deadline.at_s) as connection:
        answer = connection.call("acquire", request, deadline.at_s).acquire_response
    if not answer.lease:
        return Held(0, [None] * len(keys), (), (), 0.0)
    segments = list(answer.segments)
    try:
        link.map_segments({segment for segment in segments if segment}, deadline.at_s)
    except BaseException:
        link.release(answer.lease)
        raise
    return Held(
        answer.lease,
        [
            link.place(segment, offset, size_bytes) if segment else None
            for segment, offset, size_bytes in zip(
                segments, answer.offsets, answer.size_bytes, strict=True
            )
        ],
        list(answer.layers),
        list(answer.checksums),
        answer.lease_ms / 1000,
    )


def get(
    link: Link,
    namespace: NamespaceId,
    keys: Sequence[Key],
    target: Target,
    deadline: Deadline,
    copiers: Executor,
    *,
    checked: bool,
) -> tuple[list[Status], list[int]]:
    """Copies shards into their targets: (status per key, indices whose bytes were damaged)."""
    held = acquire(link, namespace, keys, deadline.left_s(), deadline, checked=checked)
    statuses = [Status.MISS] * len(keys)
    damaged: list[int] = []
    if not held.lease:
        return statuses, damaged
    expected = sums_by_index(held)
    places: list[tuple[int, memoryview, Pieces]] = []
    for index, place in held.found():
        pieces = target(index, len(place))
        if pieces is not None:
            places.append((index, place, pieces))

    def load(some: Sequence[tuple[int, memoryview, Pieces]]) -> None:
        for index, place, pieces in some:
            deadline.check()
            layers = held.layers[index] if held.layers else 1
            if pieces.load(place, layers, expected.get(index, ())):
                statuses[index] = Status.OK
            else:
                damaged.append(index)

    try:
        split(places, load, sum(len(place) for _, place, _ in places), copiers)
        if not link.alive():
            raise Unreachable(f"node {link.node} went away while its memory was read")
    finally:
        link.release(held.lease)
    return statuses, damaged


def sums_by_index(held: Held) -> dict[int, Sequence[int]]:
    """The checksum column cut into one piece per found shard."""
    expected: dict[int, Sequence[int]] = {}
    start = 0
    for index, place in held.found():
        if not held.checksums or not held.layers[index]:
            continue
        count = len(parts(len(place), held.layers[index]))
        expected[index] = held.checksums[start : start + count]
        start += count
    return expected


def split(
    jobs: Sequence[J], work: Callable[[Sequence[J]], None], size_bytes: int, copiers: Executor
) -> None:
    """Does the jobs on two threads where they are large, and returns when both have stopped."""
    if size_bytes < SPLIT_BYTES or len(jobs) < 2:
        work(jobs)
        return
    half = len(jobs) // 2
    other = copiers.submit(work, jobs[half:])
    try:
        work(jobs[:half])
        if other.cancel():  # it has not begun: the other thread is busy with somebody else's jobs
            work(jobs[half:])
        else:
            other.result()
    finally:
        _outlast(other)


def _outlast(job: Future[None]) -> None:
    """Cancels it, or waits for its end, although interrupted: no thread may touch the buffers
    after we return."""
    interrupt: BaseException | None = None
    while not job.cancel() and not job.done():
        try:
            wait([job])
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
