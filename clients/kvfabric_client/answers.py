"""What a room answers: a matched prefix, and views of shards under a lease."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Tier
from kvfabric_client import shm
from kvfabric_client.buffers import Bytes
from kvfabric_client.deadline import milliseconds
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.client import Client


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours of a matched prefix that lie in the same place."""

    count: int
    node: str
    tier: Tier


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of the asked keys that the fabric holds."""

    matched: int
    runs: tuple[Run, ...]


class Leased:
    """Bytes of a node's memory under a lease, for a `with` statement."""

    def __init__(self, link: Link, lease: int) -> None:
        """`lease` 0: there is none; what is seen are copies."""
        self._link = link
        self._lease = lease

    def alive(self) -> bool:
        """Whether the node still keeps these bytes. Once false, they may be anything."""
        return self._link.alive()

    def release(self) -> None:
        """Ends the lease. Safe to repeat."""
        lease, self._lease = self._lease, 0
        if lease:
            self._link.release(lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class View(Leased):
    """Leased bytes per key: index it, iterate over it; None is a miss."""

    def __init__(self, client: Client, link: Link, held: shm.Held) -> None:
        super().__init__(link, held.lease)
        self._client = client
        # A shard is sealed: whoever wrote into it would spoil it for all others.
        self._views = [None if place is None else place.toreadonly() for place in held.places]
        self.lease_s = held.lease_s

    def add_copy(self, index: int, copy: Bytes | None) -> None:
        """A private copy for a key that the home node does not hold."""
        self._views[index] = None if copy is None else copy.data.toreadonly()

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> memoryview | None:
        return self._views[index]

    def __iter__(self) -> Iterator[memoryview | None]:
        return iter(self._views)

    def renew(self, lease_s: float = 30.0) -> None:
        """Prolongs the lease. Refused where it has expired, Unreachable where the node died."""
        if self._lease:
            request = node_pb2.RenewRequest(lease=self._lease, lease_ms=milliseconds(lease_s))
            answer = self._link.call("renew", request, self._client.deadline(None).at_s)
            self.lease_s = answer.renew_response.lease_ms / 1000

    def release(self) -> None:
        self._views = []
        super().release()
