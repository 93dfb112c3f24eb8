"""The metadata store on a real Redis: killed, restarted, emptied; and two managers on one store."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults.conftest import (
    SPACE,
    STOP_TIMEOUT_S,
    ManagerProcess,
    NodeProcess,
    Process,
    Starter,
    bytes_of,
    key_of,
    until,
)
from tests.redis_server import RedisServer

from kvfabric.manager.__main__ import FENCED
from kvfabric.types import Key, Status
from kvfabric_client import Client

pytestmark = pytest.mark.faults

SIZE = 64 << 10
QUICK = ("--heartbeat-ms", "100", "--silence-ms", "3000")


def manager(
    server: RedisServer, folder: Path, processes: list[Process], listen: str = "127.0.0.1:0"
) -> ManagerProcess:
    started = ManagerProcess(folder, listen, "--store", server.address, *QUICK)
    processes.append(started)
    return started


def stored(node: NodeProcess, numbers: range) -> list[Key]:
    keys = [key_of(number) for number in numbers]
    with node.client() as client:
        statuses = client.open(SPACE).put(keys, [bytes_of(key, SIZE) for key in keys])
    assert statuses == [Status.OK] * len(keys)
    return keys


def epoch(client: Client) -> int:
    return client.manager().stats(client.deadline(None)).epoch


def replicas(client: Client) -> int:
    return client.manager().stats(client.deadline(None)).replicas


def test_while_redis_is_away_local_work_and_the_directory_go_on(
    redis_server: RedisServer, tmp_path: Path, processes: list[Process], start_node: Starter
) -> None:
    control = manager(redis_server, tmp_path, processes)
    node = start_node("n0", "--manager", control.address)
    before = stored(node, range(4))

    redis_server.kill()
    after = stored(node, range(4, 8))

    with node.client() as client:
        until(lambda: replicas(client) == 8, "the directory follows without Redis")
        keys = [*before, *after]
        found = client.open(SPACE).get(keys)
        assert [bytes(each) for each in found if each is not None] == [
            bytes_of(key, SIZE) for key in keys
        ]
    assert control.running()
    redis_server.start()
    with node.client() as client:
        until(lambda: epoch(client) == 1, "the manager stays the one it was")
    control.close()


def test_a_second_manager_on_the_store_ends_the_first(
    redis_server: RedisServer, tmp_path: Path, processes: list[Process]
) -> None:
    old = manager(redis_server, tmp_path, processes)

    new = manager(redis_server, tmp_path, processes)

    assert old.popen.wait(STOP_TIMEOUT_S) == FENCED
    assert "epoch 2 was started" in old.log.read_text()
    assert new.running()
    new.close()


def test_a_manager_that_was_stopped_meanwhile_is_fenced_when_it_wakes(
    redis_server: RedisServer, tmp_path: Path, processes: list[Process]
) -> None:
    old = manager(redis_server, tmp_path, processes)
    old.pause()

    new = manager(redis_server, tmp_path, processes)
    old.resume()

    assert old.popen.wait(STOP_TIMEOUT_S) == FENCED
    new.close()


def test_a_redis_that_forgot_everything_does_not_turn_the_epoch_back(
    redis_server: RedisServer, tmp_path: Path, processes: list[Process], start_node: Starter
) -> None:
    for _ in range(2):
        manager(redis_server, tmp_path, processes).close()
    first = manager(redis_server, tmp_path, processes)  # epoch 3
    node = start_node("n0", "--manager", first.address)
    keys = stored(node, range(4))
    with node.client() as client:
        until(lambda: replicas(client) == len(keys), "the node is known")
    first.kill()
    redis_server.clear()

    again = manager(redis_server, tmp_path, processes, first.address)

    with node.client() as client:
        until(lambda: replicas(client) == len(keys), "the node reports to the new manager")
        assert epoch(client) == 4
    again.close()
