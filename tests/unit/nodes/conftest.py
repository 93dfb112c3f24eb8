"""A small core with its clock in hand; its books are proven when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents
from kvfabric_nodes.store.promises import Grant, Limits, Reservation, Session

SEGMENT_BYTES = 4096
SEGMENTS = 4
SHARD_BYTES = 1024  # four to a segment, sixteen to the arena


def key(number: int) -> Key:
    return Key(number.to_bytes(32, "little"))


def namespace(tenant: str, number: int = 0) -> NamespaceId:
    return NamespaceId(f"{tenant}/{number}".encode().ljust(32, b"."))


class Desk:
    """One client's session, with the calls that the tests make."""

    def __init__(self, core: NodeCore, tenant: str = "a", principal: str = "") -> None:
        self.core = core
        self.now_s = 0.0
        self.namespace = namespace(tenant)
        self.session: Session = core.open_session(tenant, principal or tenant)
        core.open_namespaces(self.session, [self.namespace])

    def reserve(
        self,
        keys: Sequence[Key],
        size_bytes: int = SHARD_BYTES,
        *,
        parents: Sequence[Key | None] | None = None,
        deadline_s: float = 10.0,
        ttl_s: float = 0.0,
    ) -> tuple[Reservation | None, list[Grant]]:
        return self.core.reserve(
            self.session,
            self.namespace,
            keys,
            parents or [None] * len(keys),
            [size_bytes] * len(keys),
            1,
            deadline_s,
            ttl_s,
            self.now_s,
        )

    def granted(
        self, keys: Sequence[Key], size_bytes: int = SHARD_BYTES, deadline_s: float = 10.0
    ) -> Reservation:
        """A reservation of all these keys."""
        reservation, grants = self.reserve(keys, size_bytes, deadline_s=deadline_s)
        assert [grant.status for grant in grants] == [Status.OK] * len(keys)
        assert reservation is not None
        return reservation

    def put(
        self,
        keys: Sequence[Key],
        size_bytes: int = SHARD_BYTES,
        *,
        parents: Sequence[Key | None] | None = None,
        ttl_s: float = 0.0,
    ) -> list[Status]:
        """Reserves and seals; the statuses of the reserve."""
        reservation, grants = self.reserve(keys, size_bytes, parents=parents, ttl_s=ttl_s)
        for index in sorted(reservation.items) if reservation else []:
            assert reservation is not None
            sealed = self.core.seal(reservation, index, (1,), self.now_s)
            assert sealed.status is Status.OK
        return [grant.status for grant in grants]

    def chain(self, keys: Sequence[Key], size_bytes: int = SHARD_BYTES) -> None:
        """Puts keys that continue one another."""
        assert self.put(keys, size_bytes, parents=[None, *keys[:-1]]) == [Status.OK] * len(keys)

    def holds(self, keys: Sequence[Key]) -> list[bool]:
        """Which of these are held, without touching them."""
        return [self.core.shards.get(self.namespace, k) is not None for k in keys]

    def lease(self, keys: Sequence[Key], lease_s: float = 10.0) -> int:
        lease, _ = self.core.acquire(self.session, self.namespace, keys, lease_s, self.now_s)
        assert lease is not None
        return lease.id

    def wait(self, seconds: float) -> None:
        """Moves the clock."""
        self.now_s += seconds
        self.core.tick(self.now_s)


@pytest.fixture
def core() -> Iterator[NodeCore]:
    core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES), Limits(batch_keys=64, deadline_s=100.0))
    yield core
    core.check()


@pytest.fixture
def desk(core: NodeCore) -> Desk:
    return Desk(core)


@pytest.fixture
def other(core: NodeCore) -> Desk:
    """Another tenant."""
    return Desk(core, "b")


@pytest.fixture
def keys() -> Callable[..., list[Key]]:
    return lambda *numbers: [key(number) for number in numbers]
