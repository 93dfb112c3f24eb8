"""The directory by example."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from kvfabric.directory import BUCKETS, Directory, Inventory, Replica
from kvfabric.errors import Broken
from kvfabric.types import Key, NamespaceId, NodeId, Tier

ROOM, OTHER = NamespaceId(b"r" * 32), NamespaceId(b"o" * 32)
A, B = NodeId("a"), NodeId("b")


def key(number: int) -> Key:
    return Key(number.to_bytes(8, "little") + bytes(24))


def keys(*numbers: int) -> bytes:
    return b"".join(key(number) for number in numbers)


def sweep_all(directory: Directory) -> None:
    while directory.sweep(limit_keys=1):
        pass


@pytest.fixture
def directory() -> Iterator[Directory]:
    directory = Directory()
    yield directory
    directory.check()
    sweep_all(directory)
    directory.check()


def test_a_key_lies_where_nodes_say_fastest_tier_first(directory: Directory) -> None:
    directory.add(B, ROOM, Tier.DRAM, keys(1))
    directory.add(A, ROOM, Tier.FILE, keys(1, 2))
    directory.add(A, ROOM, Tier.DRAM, keys(1))

    located = directory.locate(ROOM, [key(1), key(2), key(3), key(1)], prefix=False)

    assert located.indices == [0, 1, 2, 0]
    assert located.places == [
        (Replica(A, Tier.DRAM), Replica(B, Tier.DRAM), Replica(A, Tier.FILE)),
        (Replica(A, Tier.FILE),),
    ]


def test_a_prefix_ends_before_the_first_key_that_nobody_holds(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(1, 2, 4))

    located = directory.locate(ROOM, [key(1), key(2), key(3), key(4)], prefix=True)

    assert located.indices == [0, 0]
    assert located.places == [(Replica(A, Tier.DRAM),)]


def test_namespaces_never_meet(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(1))

    assert directory.locate(OTHER, [key(1)], prefix=False) == ([0], [])
    assert directory.locate(OTHER, [key(1)], prefix=True) == ([], [])


def test_repeated_adds_and_removes_count_once(directory: Directory) -> None:
    assert directory.add(A, ROOM, Tier.DRAM, keys(1, 2, 2)) == 2
    assert directory.add(A, ROOM, Tier.DRAM, keys(2, 3)) == 1
    assert directory.remove(A, ROOM, Tier.DRAM, keys(1, 1, 9)) == 1
    assert directory.remove(B, ROOM, Tier.DRAM, keys(2)) == 0

    assert directory.inventory(A) == Inventory(count=2, hash=2 + 3)
    assert (directory.keys, directory.replicas) == (2, 2)


def test_an_inventory_hash_is_the_sum_of_key_heads_modulo_2_to_the_64() -> None:
    largest = b"\xff" * 32

    inventory = Inventory().plus(keys(7) + largest).plus(keys(3))

    assert inventory == Inventory(count=3, hash=9)
    assert inventory.minus(largest) == Inventory(count=2, hash=10)


def test_a_draft_is_unseen_until_it_replaces_everything(directory: Directory) -> None:
    # Given a node that holds 1 and 2, and another that holds 2
    directory.add(A, ROOM, Tier.DRAM, keys(1, 2))
    directory.add(B, ROOM, Tier.DRAM, keys(2))

    # When its draft says 2 and 3
    directory.add(A, ROOM, Tier.DRAM, keys(2, 3, 4), draft=True)
    directory.remove(A, ROOM, Tier.DRAM, keys(4), draft=True)

    # Then nothing changes before it is published
    places = directory.locate(ROOM, [key(1), key(2), key(3)], prefix=False)
    assert places == (
        [0, 1, 2],
        [(Replica(A, Tier.DRAM),), (Replica(A, Tier.DRAM), Replica(B, Tier.DRAM))],
    )
    assert directory.inventory(A, draft=True) == Inventory(count=2, hash=5)

    # And afterwards only the draft counts
    directory.publish(A)
    places = directory.locate(ROOM, [key(1), key(2), key(3)], prefix=False)
    assert places == (
        [2, 0, 1],
        [(Replica(A, Tier.DRAM), Replica(B, Tier.DRAM)), (Replica(A, Tier.DRAM),)],
    )
    assert directory.inventory(A) == Inventory(count=2, hash=5)


def test_a_discarded_draft_leaves_no_trace(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(1))
    directory.add(A, ROOM, Tier.DRAM, keys(2), draft=True)

    directory.discard_draft(A)
    directory.discard_draft(A)

    assert directory.locate(ROOM, [key(1), key(2)], prefix=False).indices == [0, 1]
    assert directory.inventory(A, draft=True) == Inventory()


def test_a_dropped_node_holds_nothing_and_may_come_back(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(1, 2))
    directory.add(B, ROOM, Tier.DRAM, keys(2))

    assert directory.drop(A) == 2
    assert directory.drop(A) == 0

    assert directory.locate(ROOM, [key(1), key(2)], prefix=False) == (
        [1, 0],
        [(Replica(B, Tier.DRAM),)],
    )
    assert (directory.keys, directory.replicas) == (1, 1)
    assert directory.add(A, ROOM, Tier.DRAM, keys(1)) == 1
    assert directory.locate(ROOM, [key(1)], prefix=True).places == [(Replica(A, Tier.DRAM),)]


def test_the_sweep_forgets_keys_that_nobody_holds(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(*range(1000)))
    directory.add(B, ROOM, Tier.DRAM, keys(5))
    directory.drop(A)

    slices = 1
    while directory.sweep(limit_keys=1):
        slices += 1

    assert slices > BUCKETS / 2  # one bucket a slice
    assert sum(len(bucket) for bucket in directory._rooms[ROOM]) == 1
    directory.drop(B)
    sweep_all(directory)
    assert directory._rooms == {}


def test_keys_move_between_places_that_were_forgotten_meanwhile(directory: Directory) -> None:
    # Given the places {a}, {b} and {a, b}, of which only the last is in use
    c = NodeId("c")
    for node in (A, B):
        directory.add(A, ROOM, Tier.DRAM, keys(1))
        directory.add(B, ROOM, Tier.DRAM, keys(1))
        directory.remove(node, ROOM, Tier.DRAM, keys(1))
    directory.add(A, ROOM, Tier.DRAM, keys(1))
    directory.add(B, ROOM, Tier.DRAM, keys(1))

    # When the loss of another node makes the directory forget the others
    directory.add(c, ROOM, Tier.DRAM, keys(2))
    directory.drop(c)
    directory.check()

    # Then they come into being again
    directory.remove(A, ROOM, Tier.DRAM, keys(1))
    directory.add(A, ROOM, Tier.DRAM, keys(3))
    assert directory.locate(ROOM, [key(1), key(3)], prefix=True).places == [
        (Replica(B, Tier.DRAM),),
        (Replica(A, Tier.DRAM),),
    ]


def test_an_emptied_namespace_is_forgotten(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(1))
    directory.remove(A, ROOM, Tier.DRAM, keys(1))

    assert directory._rooms == {}


def test_keys_are_found_by_their_first_bytes(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(0x0101, 0x0201))
    directory.add(B, OTHER, Tier.FILE, keys(0x0101))

    here = (ROOM, key(0x0101), (Replica(A, Tier.DRAM),))
    there = (OTHER, key(0x0101), (Replica(B, Tier.FILE),))
    assert directory.find(b"\x01\x01", ROOM, limit=9) == [here]
    assert directory.find(b"\x01\x01", None, limit=9) == [there, here]
    assert directory.find(b"\x01\x01", None, limit=1) == [there]
    assert directory.find(b"\x09", None, limit=9) == []


def test_check_finds_a_book_that_is_wrong() -> None:
    directory = Directory()
    directory.add(A, ROOM, Tier.DRAM, keys(1, 2))
    directory.check()

    bucket = next(each for each in directory._rooms[ROOM] if key(1) in each)
    del bucket[key(1)]

    with pytest.raises(Broken, match="miscounted"):
        directory.check()


def test_a_keys_entry_is_nothing_that_the_garbage_collector_follows() -> None:
    directory = Directory()
    directory.add(A, ROOM, Tier.DRAM, keys(*range(1000)))

    assert not any(gc.is_tracked(bucket) for bucket in directory._rooms[ROOM])


def test_a_sweep_moves_a_limited_number_of_keys_at_once(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfabric.directory._TIDY_KEYS", 10)
    alike = b"".join(bytes(8) + number.to_bytes(24, "little") for number in range(95))
    directory.add(A, ROOM, Tier.DRAM, alike)  # all in one bucket
    directory.drop(A)

    left = [95]
    while directory.sweep():
        left.append(sum(map(len, directory._rooms[ROOM])))

    assert set(left) == {95, *range(5, 95, 10)}
    assert directory._rooms == {}


def test_losing_a_node_leaves_the_places_of_others_alone(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(1, 2))
    directory.add(B, ROOM, Tier.DRAM, keys(2, 3))
    before = directory.locate(ROOM, [key(3)], prefix=False).places[0]
    directory.drop(A)

    assert directory.locate(ROOM, [key(3)], prefix=False).places[0] is before
    assert directory.keys == 2
    assert directory.count(lambda place: place[0].node == B) == 2


def test_keys_that_only_a_draft_has_are_not_counted(directory: Directory) -> None:
    directory.add(A, ROOM, Tier.DRAM, keys(1, 2), draft=True)
    directory.add(B, ROOM, Tier.DRAM, keys(2, 3))

    assert directory.keys == 2
    directory.publish(A)
    assert directory.keys == 3
    directory.drop(A)
    assert directory.keys == 2
    sweep_all(directory)
    assert directory.keys == 2
