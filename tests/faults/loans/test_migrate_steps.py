"""Shards move between nodes, and somebody dies at every step: no reader of a replica sees a hole.

Some of these run with every `make test`, all of them with `make test-faults`.
"""

from __future__ import annotations

import pytest
from tests.faults.conftest import ANSWER_TIMEOUT_S, ROOM, bytes_of, key_of, until
from tests.faults.conftest import SPACE as FAULTS
from tests.faults.loans.conftest import QUIET_S, Lenders

from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Status

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

exhaustive = pytest.mark.exhaustive

SIZE = 64 << 10
KEYS = [key_of(number, "migrate") for number in range(48)]


def put_at_east(lenders: Lenders) -> None:
    statuses = lenders.client("east").open(FAULTS).put(KEYS, [bytes_of(k, SIZE) for k in KEYS])
    assert statuses == [Status.OK] * len(KEYS)
    until(lambda: places(lenders) == [{"east"}] * len(KEYS), "the directory knows")


def places(lenders: Lenders) -> list[set[str]]:
    """The nodes that hold each key, as the manager sees it."""
    request = control_pb2.LocateRequest(namespace_id=ROOM, keys=KEYS)
    with lenders.control() as stub:
        answer = stub.Locate(request, timeout=ANSWER_TIMEOUT_S)
    nodes = [set(place.nodes) for place in answer.places] + [set()]
    return [nodes[index] for index in answer.place]


def migrate(lenders: Lenders) -> None:
    request = control_pb2.MigrateRequest(
        namespace_id=ROOM, keys=KEYS, source="east", destination="west"
    )
    with lenders.control() as stub:
        stub.Migrate(request, timeout=ANSWER_TIMEOUT_S)


def read(lenders: Lenders) -> int:
    """How many keys a reader at the third node misses; fails for a wrong byte."""
    found = lenders.client("home").open(FAULTS).get(KEYS)
    for key, copy in zip(KEYS, found, strict=True):
        assert copy is None or bytes(copy) == bytes_of(key, SIZE)
    return sum(copy is None for copy in found)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("pull.started", marks=exhaustive),
        "pull.reserved",
        pytest.param("pull.sealed", marks=exhaustive),
    ],
)
def test_the_destination_dies(lenders: Lenders, point: str) -> None:
    lenders.start(west=f"{point}=kill")
    put_at_east(lenders)

    migrate(lenders)
    lenders.fallen("west")

    assert read(lenders) == 0
    until(lambda: lenders.alive() == {"home", "east"}, "west is known to be lost", QUIET_S)
    assert read(lenders) == 0
    lenders.check_quiet()


def test_the_destination_dies_after_its_copies_were_seen(lenders: Lenders) -> None:
    """The source has its order already, and nobody has noticed yet."""
    lenders.start(east="drop.told=stop")
    put_at_east(lenders)

    migrate(lenders)
    lenders.stopped("east")
    assert places(lenders) == [{"east", "west"}] * len(KEYS)
    lenders.nodes["west"].kill()
    lenders.fallen("west")
    lenders.nodes["east"].resume()

    assert read(lenders) == 0
    until(lambda: lenders.alive() == {"home", "east"}, "west is known to be lost", QUIET_S)
    assert read(lenders) == 0
    assert places(lenders) == [{"east"}] * len(KEYS)
    lenders.check_quiet()


@pytest.mark.parametrize("point", ["pull.reading", "drop.told"])
def test_the_source_dies(lenders: Lenders, point: str) -> None:
    lenders.start(east=f"{point}=kill")
    put_at_east(lenders)

    migrate(lenders)
    lenders.fallen("east")
    until(lambda: lenders.alive() == {"home", "west"}, "east is known to be lost", QUIET_S)

    # What had been copied is there: before any drop was told that is some of it.
    copied = sum(place == {"west"} for place in places(lenders))
    assert read(lenders) == len(KEYS) - copied
    assert copied or point == "pull.reading"
    lenders.check_quiet()


@pytest.mark.parametrize(
    ("name", "point"),
    [
        pytest.param("west", "pull.started", marks=exhaustive),
        ("west", "pull.sealed"),
        ("east", "drop.told"),
    ],
)
def test_the_manager_dies_meanwhile(lenders: Lenders, name: str, point: str) -> None:
    lenders.patience_s = 20.0
    lenders.start(**{name: f"{point}=stop"})
    put_at_east(lenders)
    migrate(lenders)
    lenders.stopped(name)

    lenders.restart_manager()
    lenders.nodes[name].resume()
    until(lambda: len(lenders.alive()) == 3, "all nodes are back", QUIET_S)
    until(lambda: all(places(lenders)), "the directory knows all again", QUIET_S)

    assert read(lenders) == 0
    lenders.check_quiet()


def test_two_moves_of_the_same_shards_end_with_one_replica_each(lenders: Lenders) -> None:
    lenders.start()
    put_at_east(lenders)

    migrate(lenders)
    migrate(lenders)
    until(lambda: places(lenders) == [{"west"}] * len(KEYS), "all are at west alone", QUIET_S)

    assert read(lenders) == 0
    lenders.check_quiet()


@exhaustive
def test_the_source_dies_when_its_pins_have_gone_along(lenders: Lenders) -> None:
    lenders.start(east="keep.handed=kill")
    put_at_east(lenders)
    pinned = KEYS[:3]
    assert lenders.client("east").open(FAULTS).pin(pinned) == [Status.OK] * 3

    migrate(lenders)
    lenders.fallen("east")

    assert read(lenders) == 0
    assert lenders.nodes["west"].stats().pins == 3
    lenders.check_quiet()
