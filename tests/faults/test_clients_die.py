"""Clients killed and stopped while they hold memory: it comes back, and never too early."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from blake3 import blake3
from tests.faults.conftest import (
    POLL_S,
    SPACE,
    NodeProcess,
    Process,
    Wire,
    bytes_of,
    key_of,
    until,
)

from kvfabric.errors import Refused
from kvfabric.types import Status

pytestmark = pytest.mark.faults

SIZE = 512 << 10  # a whole segment of the node, which has 16
CHURN_S = 10.0

StartChild = Callable[..., Process]


def test_a_writer_killed_before_its_commit_leaves_room_for_another(
    node: NodeProcess, start_child: StartChild
) -> None:
    key = key_of(1)
    writer = start_child("write", node.unix, key.hex(), SIZE, 60_000)
    writer.read()
    with node.client() as client:
        room = client.open(SPACE)
        assert room.put([key], [bytes_of(key, SIZE)]) == [Status.EXISTS]
        assert node.tier().reserved_bytes == SIZE
        writer.kill()
        until(lambda: node.tier().reserved_bytes == 0, "the extent comes back")
        assert room.get([key]) == [None]
        assert room.put([key], [bytes_of(key, SIZE)]) == [Status.OK]
        (copy,) = room.get([key])
        assert copy is not None
        assert copy.tobytes() == bytes_of(key, SIZE)


def test_a_reader_killed_with_its_leases_frees_them(
    node: NodeProcess, start_child: StartChild
) -> None:
    keys = [key_of(number) for number in range(16)]
    with node.client() as client:
        room = client.open(SPACE)
        assert set(room.put(keys, [bytes_of(key, SIZE) for key in keys])) == {Status.OK}
        reader = start_child("hold", node.unix, 60_000, *(key.hex() for key in keys))
        reader.read()
        assert room.put([key_of(99)], [bytes(SIZE)]) == [Status.RETRY]
        reader.kill()
        until(
            lambda: room.put([key_of(99)], [bytes(SIZE)]) == [Status.OK],
            "the leases end with their process",
        )


def test_a_writer_stopped_past_its_deadline_harms_nobody(
    node: NodeProcess, start_child: StartChild
) -> None:
    """Under memory pressure its extent is the only one that is not handed out again."""
    victim = key_of(0)
    writer = start_child("write", node.unix, victim.hex(), SIZE, 300)
    extent = writer.read()
    writer.pause()
    with node.client() as client:
        room = client.open(SPACE)
        until(lambda: node.tier().quarantined_bytes == SIZE, "its deadline passes")
        assert room.put([victim], [bytes_of(victim, SIZE)]) == [Status.OK]
        given = set()
        for number in range(1, 40):
            key = key_of(number)
            assert room.put([key], [bytes_of(key, SIZE)]) == [Status.OK]
            with Wire(node.unix) as wire:
                found = wire.acquire([key])
                given.add((found.segments[0], found.offsets[0]))
        assert len(given) == 15
        assert (extent["segment"], extent["offset"]) not in given
        assert node.tier().quarantined_bytes == SIZE
        held = [key_of(number) for number in range(25, 40)]

        writer.resume()
        late = writer.ask("finish")  # it writes over all of its extent
        assert late["status"] == Status.REFUSED
        assert "deadline" in late["reason"]
        for key, copy in zip(held, room.get(held), strict=True):
            assert copy is not None
            assert copy.tobytes() == bytes_of(key, SIZE)
        until(lambda: node.tier().quarantined_bytes == 0, "the refused commit gives it back")
        assert room.put([key_of(50)], [bytes_of(key_of(50), SIZE)]) == [Status.OK]
        assert room.get([key_of(25)])[0] is not None, "there was room without an eviction"


def test_a_view_holder_stopped_past_its_lease_still_sees_its_bytes(
    node: NodeProcess, start_child: StartChild
) -> None:
    kept = [key_of(1), key_of(2)]
    with node.client() as client:
        room = client.open(SPACE)
        assert set(room.put(kept, [bytes_of(key, SIZE) for key in kept])) == {Status.OK}
        expected = [blake3(bytes_of(key, SIZE)).hexdigest() for key in kept]
        holder = start_child("hold", node.unix, 200, *(key.hex() for key in kept))
        assert holder.read()["digests"] == expected
        holder.pause()
        expired = "kvfabric_node_expired_leases_total"
        until(lambda: _counter(node, expired) == 1, "its lease expires")
        room.purge([kept[1]])
        assert node.tier().quarantined_bytes == SIZE, "purged, but somebody may still read it"
        for number in range(10, 50):
            key = key_of(number)
            assert room.put([key], [bytes_of(key, SIZE)]) == [Status.OK]
        holder.resume()
        assert holder.ask("again")["digests"] == expected
        assert holder.ask("release") == {"released": True}
        until(lambda: node.tier().quarantined_bytes == 0, "it let go")
        assert node.stats().leases == 0


def test_a_lease_that_expired_cannot_be_renewed(node: NodeProcess) -> None:
    with node.client() as client:
        room = client.open(SPACE)
        room.put([key_of(1)], [bytes_of(key_of(1), SIZE)])
        with room.view([key_of(1)], lease_s=0.05) as views:
            until(lambda: _counter(node, "kvfabric_node_expired_leases_total") == 1, "it expires")
            with pytest.raises(Refused, match="acquire again and renew it sooner"):
                views.renew()


def _counter(node: NodeProcess, name: str) -> float:
    return sum(each.value for each in node.stats().counters if each.name.startswith(name))


def test_no_wrong_byte_while_clients_are_killed_at_random_under_pressure(
    node: NodeProcess, start_child: StartChild
) -> None:
    chance = random.Random(20)
    seeds = iter(range(1000))

    def begin(address: str) -> Process:
        child = start_child("churn", address, next(seeds), CHURN_S)
        child.read()
        return child

    end_s = time.monotonic() + CHURN_S
    victims = [begin(node.unix)]
    steady = [begin(node.unix), begin(node.tcp)]
    kills = 0
    while time.monotonic() < end_s:
        time.sleep(chance.uniform(POLL_S, 0.5))
        victim = victims.pop()
        if chance.random() < 0.3:
            victim.pause()
            time.sleep(0.1)
        victim.kill()
        assert b"wrong" not in _rest(victim)
        kills += 1
        victims.append(begin(chance.choice([node.unix, node.tcp])))
    victims[0].kill()
    results = [child.read(30.0) for child in steady]
    assert [each["wrong"] for each in results] == [0, 0], results
    assert all(each["hits"] > 100 and each["puts"] > 20 for each in results), results
    assert kills > 3
    for child in steady:
        assert child.popen.wait(10.0) == 0
    assert _counter(node, "kvfabric_node_evicted_shards_total") > 0, "there was no pressure"
    assert _counter(node, "kvfabric_node_checksum_mismatches_total") == 0
    node.settle()


def _rest(process: Process) -> bytes:
    assert process.popen.stdout is not None
    return process.popen.stdout.read()
