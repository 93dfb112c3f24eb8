"""Lanes: the ways to one node, and what is timed on each of them.

Every method that moves bytes takes a batch of buffers, gives the seconds that the one
call took, and raises Broken where the fabric did not do what was asked: a figure of
something else would be worse than none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Final

import kvfabric_client
from kvfabric.errors import Broken
from kvfabric.types import DEFAULT_TENANT, DIGEST_BYTES, Key, Namespace, NamespaceId, Status

STORED: Final = Namespace(DEFAULT_TENANT, bytes(DIGEST_BYTES), b"bench: shards to read")
FRESH: Final = Namespace(DEFAULT_TENANT, bytes(DIGEST_BYTES), b"bench: shards just written")


class Lane:
    """A client of the node at `home`, with checksums or without.

    `room_bytes` is what its puts may fill before they are purged.
    """

    def __init__(self, home: str, *, checksums: bool, room_bytes: int) -> None:
        self._client = kvfabric_client.connect(home, checksums=checksums)
        self._stored = self._client.open(STORED)
        self._fresh = self._client.open(FRESH)
        self._room_bytes = room_bytes
        self._written_bytes = 0

    def close(self) -> None:
        self._client.close()

    def ready(self) -> bool:
        """Whether the node has faulted all its memory in."""
        tiers = self._client.stats().tiers
        return all(tier.ready_bytes == tier.capacity_bytes for tier in tiers)

    def store(self, keys: Sequence[Key], buffers: Sequence[memoryview]) -> None:
        """Puts shards to read later."""
        _expect_all_ok("put", self._stored.put(keys, buffers))

    def erase(self) -> None:
        """Purges all that the bench has put."""
        self._stored.purge()
        self._fresh.purge()
        self._written_bytes = 0

    def reserved_bytes(self) -> int:
        """What the node is filling at this moment."""
        return sum(tier.reserved_bytes for tier in self._client.stats().tiers)

    def pulls(self) -> float:
        """How many orders to copy shards from other nodes it has."""
        counters = self._client.stats().counters
        return sum(each.value for each in counters if each.name == "kvfabric_node_pulls")

    @property
    def stored(self) -> NamespaceId:
        """Where `store` puts."""
        return self._stored.id

    def forget(self, keys: Sequence[Key]) -> None:
        """Purges some of what was stored, as far as it is here."""
        self._stored.purge(keys)

    def put(self, buffers: Sequence[memoryview]) -> float:
        """Under keys that nobody has put yet."""
        self._make_room(sum(len(buffer) for buffer in buffers))
        keys = new_keys(len(buffers))
        start = time.perf_counter()
        statuses = self._fresh.put(keys, buffers)
        taken_s = time.perf_counter() - start
        _expect_all_ok("put", statuses)
        return taken_s

    def get(self, keys: Sequence[Key], buffers: Sequence[memoryview]) -> float:
        start = time.perf_counter()
        statuses = self._stored.get_into(keys, buffers)
        taken_s = time.perf_counter() - start
        _expect_all_ok("get", statuses)
        return taken_s

    def view(self, keys: Sequence[Key]) -> float:
        """From the call until the lease is given back, without reading the bytes."""
        start = time.perf_counter()
        with self._stored.view(keys) as views:
            missed = any(view is None for view in views)
        taken_s = time.perf_counter() - start
        if missed:
            raise Broken("a view missed a shard that was stored before")
        return taken_s

    def match(self, keys: Sequence[Key]) -> float:
        start = time.perf_counter()
        match = self._stored.match(keys)
        taken_s = time.perf_counter() - start
        if match.matched != len(keys):
            raise Broken(f"{match.matched} of {len(keys)} stored keys matched")
        return taken_s

    def _make_room(self, coming_bytes: int) -> None:
        if self._written_bytes + coming_bytes > self._room_bytes:
            self._fresh.purge()
            self._written_bytes = 0
        self._written_bytes += coming_bytes


def new_keys(count: int) -> list[Key]:
    """Keys that nobody has seen."""
    return [Key(os.urandom(DIGEST_BYTES)) for _ in range(count)]


def _expect_all_ok(what: str, statuses: Iterable[Status]) -> None:
    others = {status.name for status in statuses if status != Status.OK}
    if others:
        raise Broken(f"a {what} of the bench was answered with {', '.join(sorted(others))}")
