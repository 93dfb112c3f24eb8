"""The heap of deadlines does not grow with promises that were settled before their time."""

from __future__ import annotations

from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.core import NodeCore
from kvfabric_nodes.deadlines import SWEEP_ENTRIES
from kvfabric_nodes.extents import Extents

ROOM = NamespaceId(b"n" * 32)
KEY = Key(b"k" * 32)


def test_released_leases_do_not_wait_for_their_deadline() -> None:
    core = NodeCore(Extents(1, 1 << 16))
    session = core.open_session("default", "default")
    core.open_namespaces(session, [ROOM])
    reservation, _ = core.reserve(session, ROOM, [KEY], [None], [4096], 1, 30.0, 0.0, 0.0)
    assert reservation is not None
    core.seal(reservation, 0, [1], 0.0)
    kept, _ = core.acquire(session, ROOM, [KEY], 600.0, 0.0)
    assert kept is not None

    for _ in range(10 * SWEEP_ENTRIES):
        lease, _ = core.acquire(session, ROOM, [KEY], 30.0, 0.0)
        assert lease is not None
        core.release(session, [lease.id])

    assert len(core._deadlines) <= 2 * SWEEP_ENTRIES
    core.tick(599.0)
    assert not kept.expired
    core.tick(600.0)
    assert kept.expired
    core.check()
