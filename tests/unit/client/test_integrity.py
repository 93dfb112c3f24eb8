"""A bit that flips is a miss, a counter and a dropped replica; never a wrong byte."""

from __future__ import annotations

import numpy as np
import pytest

from kvfabric.types import Status
from kvfabric_client import Client, Room
from kvfabric_nodes.node import Node

from .conftest import core_of, counter, flip, key, payload


@pytest.mark.parametrize("at", [0, 299_999])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_flipped_bit_is_a_miss_and_costs_the_replica(
    room: Room, client: Client, vandal: Room, at: int, layers: int
) -> None:
    shards = [payload(n, 300_000) for n in range(3)]
    room.put([key(n) for n in range(3)], shards, layers=layers)
    flip(vandal, key(1), at)

    targets = [np.zeros(300_000, np.uint8) for _ in shards]
    assert room.get_into([key(n) for n in range(3)], targets) == [
        Status.OK,
        Status.MISS,
        Status.OK,
    ]
    assert np.array_equal(targets[0], shards[0])
    assert np.array_equal(targets[2], shards[2])
    assert room.match([key(1)]).matched == 0, "the damaged replica is still there"
    assert [event.what for event in room.explain(key(1))] == ["committed", "dropped"]
    assert counter(client, "kvfabric_node_checksum_mismatches_total") == 1
    assert room.put([key(1)], [shards[1]], layers=layers) == [Status.OK]
    [copy] = room.get([key(1)])
    assert copy is not None


def test_damage_in_a_large_batch_is_found_by_either_thread(room: Room, vandal: Room) -> None:
    keys = [key(n) for n in range(8)]
    room.put(keys, [payload(n, 1 << 20) for n in range(8)])
    flip(vandal, key(0), 5)
    flip(vandal, key(7), 1 << 19)
    assert [copy is None for copy in room.get(keys)] == [n in (0, 7) for n in range(8)]


def test_what_is_damaged_while_others_read_it_stays_theirs_until_they_let_go(
    vandal: Room, node: Node
) -> None:
    vandal.put([key(1)], [payload(0, 1000)])
    with vandal.view([key(1)]) as views:
        assert views[0] is not None
        flip(vandal, key(1), 5)
        assert vandal.get([key(1)]) == [None]
        assert core_of(node).books().quarantined_bytes == 1024


def test_who_does_not_verify_reads_what_is_there(room: Room, vandal: Room) -> None:
    room.put([key(1)], [payload(0, 1000)])
    flip(vandal, key(1), 5)
    [copy] = room.get([key(1)], verify=False)
    assert copy is not None
    assert not np.array_equal(copy, payload(0, 1000))
