"""What a client can do in a room, over shared memory and over TCP, on a real node."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import Refused
from kvfabric.types import Key, Namespace, Status
from kvfabric_client import Client, Room
from kvfabric_nodes.node import Node

from .conftest import SEGMENT_BYTES, core_of, counter, key, payload

if TYPE_CHECKING:
    from collections.abc import Sequence


def _keys(*numbers: int) -> list[Key]:
    return [key(number) for number in numbers]


def _equal(copies: Sequence[np.ndarray | None], expected: Sequence[np.ndarray]) -> bool:
    return all(
        a is not None and np.array_equal(a, b) for a, b in zip(copies, expected, strict=True)
    )


@pytest.mark.parametrize("size_bytes", [1, 63, 64, 1000, 262_144, 262_145, 3_000_000])
@pytest.mark.parametrize("layers", [1, 5])
def test_what_was_put_is_read_back(room: Room, size_bytes: int, layers: int) -> None:
    size_bytes *= layers if size_bytes < 100_000 else 1
    size_bytes -= size_bytes % layers
    keys, shards = _keys(1, 2, 3), [payload(n, size_bytes) for n in range(3)]
    assert room.put(keys, shards, layers=layers) == [Status.OK] * 3

    assert _equal(room.get(keys), shards)
    targets = [np.zeros(size_bytes, np.uint8) for _ in keys]
    assert room.get_into(keys, targets) == [Status.OK] * 3
    assert _equal(targets, shards)
    with room.view(keys) as views:
        assert [bytes(view or b"") for view in views] == [bytes(shard) for shard in shards]
        assert all(view is not None and view.readonly for view in views)
        views.renew(60)


def test_a_batch_of_many_megabytes_is_read_back(room: Room) -> None:
    """Large enough that the client copies on two threads and commits on the way."""
    keys, shards = _keys(*range(8)), [payload(n, 1 << 20) for n in range(8)]
    assert room.put(keys, shards, layers=4) == [Status.OK] * 8
    assert _equal(room.get(keys), shards)


def test_sizes_may_differ_within_a_batch(room: Room) -> None:
    shards = [payload(n, 1000 * (n + 1)) for n in range(10)]
    assert room.put(_keys(*range(10)), shards) == [Status.OK] * 10
    assert _equal(room.get(_keys(*range(10))), shards)


def test_a_miss_is_an_answer_per_key(room: Room) -> None:
    shard = payload(0, 500)
    room.put(_keys(1), [shard])
    target = np.zeros(500, np.uint8)
    untouched = np.full(500, 7, np.uint8)
    assert room.get_into(_keys(1, 2), [target, untouched]) == [Status.OK, Status.MISS]
    assert np.array_equal(target, shard)
    assert (untouched == 7).all()
    assert room.get(_keys(3)) == [None]
    with room.view(_keys(3, 1)) as views:
        assert views[0] is None
        assert views[1] is not None


def test_a_shard_of_another_size_than_its_buffer_is_a_miss(room: Room) -> None:
    room.put(_keys(1, 2), [payload(0, 500), payload(1, 600)])
    short, right = np.full(499, 7, np.uint8), np.zeros(600, np.uint8)
    assert room.get_into(_keys(1, 2), [short, right]) == [Status.MISS, Status.OK]
    assert (short == 7).all()
    assert np.array_equal(right, payload(1, 600))


def test_the_second_put_of_a_key_leaves_the_first(room: Room) -> None:
    room.put(_keys(1), [payload(0, 500)])
    assert room.put(_keys(1, 2), [payload(5, 500), payload(6, 500)]) == [
        Status.EXISTS,
        Status.OK,
    ]
    assert _equal(room.get(_keys(1, 2)), [payload(0, 500), payload(6, 500)])


def test_a_key_may_stand_twice_in_a_batch(room: Room) -> None:
    shard = payload(0, 5000)
    assert room.put(_keys(1, 1), [shard, shard]) == [Status.OK, Status.EXISTS]
    assert _equal(room.get(_keys(1, 1)), [shard, shard])
    targets = [np.zeros(5000, np.uint8), np.zeros(5000, np.uint8)]
    assert room.get_into(_keys(1, 1), targets) == [Status.OK, Status.OK]
    assert _equal(targets, [shard, shard])


def test_an_empty_batch_is_answered_empty(room: Room) -> None:
    assert room.put([], []) == []
    assert room.get([]) == []
    assert room.get_into([], []) == []
    assert room.match([]).matched == 0


def test_match_counts_the_longest_prefix(room: Room) -> None:
    room.put(_keys(1, 2, 4), [payload(n, 100) for n in range(3)])
    match = room.match(_keys(1, 2, 3, 4))
    assert match.matched == 2
    assert [(run.count, run.node) for run in match.runs] == [(2, "n0")]


def test_pins_and_purges(room: Room, client: Client) -> None:
    room.put(_keys(1, 2), [payload(n, 100) for n in range(2)], parents=[None, *_keys(1)])
    assert room.pin(_keys(1, 9)) == [Status.OK, Status.MISS]
    assert client.stats().pins == 1
    assert room.unpin(_keys(1)) == [Status.OK]
    assert room.purge(_keys(1)) == (2, 200)
    assert room.get(_keys(1, 2)) == [None, None]
    assert room.purge() == (0, 0)


def test_explain_tells_a_key_s_life(room: Room) -> None:
    room.put(_keys(1), [payload(0, 100)])
    room.purge()
    assert [event.what for event in room.explain(key(1))] == ["committed", "purged"]


def test_a_time_to_live_ends_a_shard(room: Room) -> None:
    room.put(_keys(1), [payload(0, 100)], ttl_s=0.0001)
    until_s = time.monotonic() + 10
    while room.match(_keys(1)).matched and time.monotonic() < until_s:
        time.sleep(0.01)
    assert room.get(_keys(1)) == [None]


def test_a_shard_larger_than_a_segment_is_refused_for_itself_only(room: Room) -> None:
    large = np.zeros(SEGMENT_BYTES + 1, np.uint8)
    assert room.put(_keys(1, 2), [large, payload(0, 10)]) == [Status.REFUSED, Status.OK]


def test_a_batch_over_the_node_s_limit_is_refused_with_the_limit(room: Room) -> None:
    keys = _keys(*range(4097))
    with pytest.raises(Refused, match="4097 keys in one batch; the limit is 4096"):
        room.pin(keys)
    assert room.put(_keys(1), [b"x"]) == [Status.OK], "the session has survived"


def test_a_whole_batch_of_small_shards_fits_a_frame(room: Room, node: Node) -> None:
    keys = _keys(*range(4096))
    assert set(room.put(keys, [bytes([n % 256]) * 64 for n in range(4096)])) == {Status.OK}
    copies = room.get(keys)
    assert all(copy is not None and copy[0] == n % 256 for n, copy in enumerate(copies))
    assert not any(s.leases for s in core_of(node).sessions.values()) or room.match(keys).matched


def test_a_full_node_answers_per_key_and_evicts_the_coldest(room: Room) -> None:
    for number in range(40):
        assert room.put(_keys(number), [payload(number, 2 << 20)]) == [Status.OK]
    assert room.get(_keys(0)) == [None]
    assert _equal(room.get(_keys(39)), [payload(39, 2 << 20)])


def test_more_than_fits_at_once_is_partly_stored(room: Room) -> None:
    shards = [payload(n, 2 << 20) for n in range(40)]
    statuses = room.put(_keys(*range(40)), shards)
    stored = [n for n, status in enumerate(statuses) if status is Status.OK]
    assert len(stored) == 32
    assert {statuses[n] for n in range(40) if n not in stored} == {Status.RETRY}
    assert _equal(room.get(_keys(*stored[:4])), [shards[n] for n in stored[:4]])


def test_two_rooms_of_one_client_do_not_meet(client: Client) -> None:
    first = client.open(Namespace("default", b"1" * 32))
    second = client.open(Namespace("default", b"1" * 32, salt=b"lora"))
    first.put(_keys(1), [payload(1, 100)])
    assert second.match(_keys(1)).matched == 0
    assert second.get(_keys(1)) == [None]
    second.put(_keys(1), [payload(2, 100)])
    assert _equal(first.get(_keys(1)), [payload(1, 100)])
    assert second.purge() == (1, 100)
    assert first.match(_keys(1)).matched == 1


def test_a_client_without_checksums_reads_and_writes(home: str, room: Room) -> None:
    with kvfabric_client.connect(home, checksums=False, timeout_s=20) as plain:
        theirs = plain.open(room.namespace)
        shards = [payload(n, 300_000) for n in range(2)]
        assert theirs.put(_keys(1, 2), shards, layers=3) == [Status.OK] * 2
        assert _equal(theirs.get(_keys(1, 2)), shards)
        assert _equal(room.get(_keys(1, 2)), shards), "written without, read with"
        room.put(_keys(3), [shards[0]])
        assert _equal(theirs.get(_keys(3)), [shards[0]]), "written with, read without"


def test_a_get_may_leave_out_the_verification(room: Room) -> None:
    room.put(_keys(1), [payload(0, 300_000)], layers=3)
    assert _equal(room.get(_keys(1), verify=False), [payload(0, 300_000)])


def test_what_moved_is_counted(room: Room, client: Client) -> None:
    room.put(_keys(1), [payload(0, 100_000)])
    room.get(_keys(1))
    assert counter(client, "kvfabric_node_written_bytes_total") == 100_000
    until_s = time.monotonic() + 10  # what was read is counted when the node has let go of it
    while not counter(client, "kvfabric_node_read_bytes_total"):
        assert time.monotonic() < until_s
    assert counter(client, "kvfabric_node_read_bytes_total") == 100_000
    assert counter(client, "kvfabric_node_hits_total") == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda room: room.put([b"short"], [b"x"]),
        lambda room: room.get([b"short"]),
        lambda room: room.match([b"s" * 33]),
        lambda room: room.put(_keys(1), []),
        lambda room: room.put(_keys(1), [b"xyz"], layers=2),
        lambda room: room.put(_keys(1), [b"xyz"], layers=5000),
        lambda room: room.put(_keys(1), [b""]),
        lambda room: room.put(_keys(1), [[]]),
        lambda room: room.put(_keys(1), [b"x"], ttl_s=-1),
        lambda room: room.put(_keys(1), [b"x"], timeout_s=-1),
        lambda room: room.put(_keys(1), [b"x"], timeout_s=float("nan")),
        lambda room: room.put(_keys(1), [b"x"], parents=[b"short"]),
        lambda room: room.put(_keys(1, 2), [b"x", b"y"], parents=[None]),
    ],
)
def test_a_wrong_request_is_refused_and_the_session_goes_on(room: Room, call: object) -> None:
    assert callable(call)
    with pytest.raises(Refused):
        call(room)
    assert room.put(_keys(50), [b"still here"]) == [Status.OK]


@pytest.mark.parametrize("timeout_s", [1e9, float("inf")])
def test_a_timeout_may_be_as_long_as_one_likes(room: Room, timeout_s: float) -> None:
    assert room.put(_keys(1), [b"x"], ttl_s=timeout_s, timeout_s=timeout_s) == [Status.OK]
    assert room.get(_keys(1), timeout_s=timeout_s) != [None]
    with room.view(_keys(1), lease_s=timeout_s) as views:
        assert views[0] is not None
        assert views.lease_s <= 600
