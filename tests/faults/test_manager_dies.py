"""The manager killed and stopped: nodes go on alone, and its directory is right again after."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import pytest
from tests.faults.conftest import (
    ANSWER_TIMEOUT_S,
    ROOM,
    SPACE,
    ManagerProcess,
    NodeProcess,
    Process,
    Starter,
    bytes_of,
    key_of,
    until,
)

from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric.types import Key, Status
from kvfabric_client import Room

pytestmark = pytest.mark.faults

SIZE = 64 << 10
HEARTBEAT_MS = 1500  # long enough to count them
SLACK_S = 5.0  # of this machine, which may be busy

StartManager = Callable[..., ManagerProcess]


@pytest.fixture
def start_manager(tmp_path: Path, processes: list[Process]) -> StartManager:
    def start(listen: str = "127.0.0.1:0") -> ManagerProcess:
        options = ("--heartbeat-ms", str(HEARTBEAT_MS), "--silence-ms", "6000")
        manager = ManagerProcess(tmp_path, listen, *options)
        processes.append(manager)
        return manager

    return start


class Control:
    """What the manager knows."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def stats(self) -> control_pb2.ControlServiceStatsResponse:
        request = control_pb2.ControlServiceStatsRequest()
        answer: control_pb2.ControlServiceStatsResponse = self._stub.Stats(
            request, timeout=ANSWER_TIMEOUT_S
        )
        return answer

    def heartbeats(self) -> int:
        name = "kvfabric_manager_heartbeats_total"
        return int(sum(c.value for c in self.stats().counters if c.name.startswith(name)))

    def places(self, keys: Sequence[Key]) -> list[set[str]]:
        """The nodes that hold each key."""
        request = control_pb2.LocateRequest(namespace_id=ROOM, keys=keys)
        answer: control_pb2.LocateResponse = self._stub.Locate(request, timeout=ANSWER_TIMEOUT_S)
        nodes = [set(place.nodes) for place in answer.places] + [set()]
        return [nodes[index] for index in answer.place]


def _put(room: Room, numbers: range) -> list[Key]:
    keys = [key_of(number) for number in numbers]
    assert set(room.put(keys, [bytes_of(key, SIZE) for key in keys])) == {Status.OK}
    return keys


def _right(room: Room, keys: Sequence[Key]) -> bool:
    return all(
        copy is not None and copy.tobytes() == bytes_of(key, SIZE)
        for key, copy in zip(keys, room.get(keys), strict=True)
    )


def test_a_manager_killed_and_restarted_knows_all_within_two_heartbeats(
    start_node: Starter, start_manager: StartManager
) -> None:
    manager = start_manager()
    node = start_node("n0", "--manager", manager.address)
    with node.client() as client:
        room = client.open(SPACE)
        before = _put(room, range(10))
        with Control(manager.address) as control:
            until(lambda: control.places(before) == [{"n0"}] * 10, "the directory knows")
            epoch = control.stats().epoch
        manager.kill()

        # Local work goes on, and what changes meanwhile is known later.
        during = _put(room, range(10, 20))
        assert _right(room, before + during)
        room.purge(before[:5])
        missing = key_of(99)
        started_s = time.monotonic()
        assert room.match([*during, missing]).matched == 10
        assert room.get([missing], timeout_s=2.0) == [None]
        assert time.monotonic() - started_s < 2.0 + SLACK_S

        manager = start_manager(manager.address)
        with Control(manager.address) as control:
            assert control.stats().epoch > epoch
            expected = [set[str]()] * 5 + [{"n0"}] * 15
            until(lambda: control.stats().keys == 15, "the directory is rebuilt")
            assert control.heartbeats() <= 2
            assert control.places(before + during) == expected
            after = _put(room, range(20, 22))
            until(lambda: control.places(after) == [{"n0"}] * 2, "and follows again")
    assert "Traceback" not in manager.log.read_text()


def test_a_manager_that_hangs_costs_a_miss_and_not_a_deadline(
    start_node: Starter, start_manager: StartManager
) -> None:
    manager = start_manager()
    node = start_node("n0", "--manager", manager.address)
    with node.client() as client, Control(manager.address) as control:
        room = client.open(SPACE)
        keys = _put(room, range(4))
        until(lambda: control.places(keys) == [{"n0"}] * 4, "the directory knows")
        manager.pause()
        started_s = time.monotonic()
        for _ in range(20):
            assert room.match([*keys, key_of(99)], timeout_s=2.0).matched == 4
        assert _right(room, keys)
        assert room.get([key_of(99)], timeout_s=2.0) == [None]
        more = _put(room, range(10, 14))
        assert time.monotonic() - started_s < 4.0 + SLACK_S, "every match waited for it"
        manager.resume()
        until(lambda: control.places(more) == [{"n0"}] * 4, "it catches up")


def test_a_killed_node_is_a_miss_for_others_and_its_shards_are_forgotten(
    start_node: Starter, start_manager: StartManager
) -> None:
    manager = start_manager()
    first = start_node("n0", "--manager", manager.address)
    second = start_node("n1", "--manager", manager.address)
    with first.client() as here, Control(manager.address) as control:
        with second.client() as there:
            keys = _put(there.open(SPACE), range(6))
        until(lambda: control.places(keys) == [{"n1"}] * 6, "the directory knows")
        room = here.open(SPACE)
        until(lambda: room.match(keys).matched == 6, "the home node may ask")
        assert _right(room, keys)
        second.kill()
        assert room.get(keys, timeout_s=2.0) == [None] * 6
        start_node("n1", "--manager", manager.address)
        until(lambda: control.stats().keys == 0, "the new incarnation holds nothing")
        assert room.get(keys, timeout_s=2.0) == [None] * 6
        assert room.match(keys).matched == 0
        _healed(room, first, keys)


def _healed(room: Room, node: NodeProcess, keys: Sequence[Key]) -> None:
    """What was lost can be written again, at home."""
    assert set(room.put(keys, [bytes_of(key, SIZE) for key in keys])) == {Status.OK}
    assert _right(room, keys)
    assert node.tier().shards == len(keys)
