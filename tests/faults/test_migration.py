"""Real nodes and a real manager: shards move and nodes are emptied while clients read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from tests.faults.loans.conftest import BLOCK_TOKENS, FORMAT, Growth, ids, kv

from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, Status
from kvfabric_client.deadline import Deadline
from kvfabric_client.manager import Manager

pytestmark = pytest.mark.faults

SIZE = 64 << 10
SHARDS = 60
COMMAND_TIMEOUT_S = 60.0
FAST = ("--heartbeat-ms", "200", "--silence-ms", "3000")


@pytest.fixture
def manager(tmp_path: Path, processes: list[Process]) -> ManagerProcess:
    started = ManagerProcess(tmp_path, "127.0.0.1:0", *FAST)
    processes.append(started)
    return started


@pytest.fixture
def control(manager: ManagerProcess) -> Iterator[Manager]:
    channel = Manager(manager.address)
    yield channel
    channel.close()


@pytest.fixture
def nodes(manager: ManagerProcess, start_node: Starter, control: Manager) -> list[NodeProcess]:
    """n0, n1 and n2, in touch with the manager."""
    started = [
        start_node(f"n{number}", "--manager", manager.address, "--memory", "16MiB")
        for number in range(3)
    ]
    until(lambda: sum(each.alive for each in control.nodes(soon())) == 3, "all nodes register")
    for node in started:
        node.settles = False  # their sessions with each other stay open
    return started


def soon() -> Deadline:
    return Deadline.after(ANSWER_TIMEOUT_S)


def put(node: NodeProcess, keys: Sequence[Key]) -> None:
    with node.client() as client:
        contents = [bytes_of(key, SIZE) for key in keys]
        assert client.open(SPACE).put(keys, contents, layers=2) == [Status.OK] * len(keys)


def homes(control: Manager, keys: Sequence[Key]) -> list[str]:
    return control.locate(ROOM, keys, soon())


class Reader:
    """A client that reads all keys, again and again, from wherever they lie at the moment."""

    def __init__(self, node: NodeProcess, keys: Sequence[Key]) -> None:
        self._node = node
        self._keys = keys
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.rounds = self.misses = self.wrong = 0
        self.errors: list[str] = []

    def __enter__(self) -> Reader:
        self._thread.start()
        until(lambda: self.rounds > 1 or bool(self.errors), "the reader reads")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(ANSWER_TIMEOUT_S)

    def _run(self) -> None:
        contents = {key: bytes_of(key, SIZE) for key in self._keys}
        try:
            with self._node.client() as client:
                room = client.open(SPACE)
                while not self._stop.is_set():
                    for key, copy in zip(self._keys, room.get(self._keys), strict=True):
                        if copy is None:
                            self.misses += 1
                        elif bytes(copy.data) != contents[key]:
                            self.wrong += 1
                    self.rounds += 1
        except Exception as error:  # told by the test
            self.errors.append(repr(error))

    def check(self) -> None:
        assert (self.misses, self.wrong, self.errors) == (0, 0, [])
        assert self.rounds > 2


Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def kvfabric(manager: ManagerProcess, folder: Path) -> Run:
    """Runs a command; its exit status, lines of JSON, and standard error."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        environment = os.environ | {
            "KVFABRIC_MANAGER": manager.address,
            "KVFABRIC_RUNTIME_DIR": str(folder),
        }
        done = subprocess.run(
            [sys.executable, "-m", "kvfabric_client.cli.main", *arguments, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        whole = done.stdout.startswith(("[\n", "{\n", "[]"))
        texts = [done.stdout] if whole else done.stdout.splitlines()
        return done.returncode, [json.loads(text) for text in texts], done.stderr

    return run


def space() -> str:
    return f"{SPACE.fingerprint.hex()}:{SPACE.salt.hex()}"


def test_shards_are_migrated_while_a_client_reads_them(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    keys = [key_of(number) for number in range(SHARDS)]
    put(nodes[0], keys)
    until(lambda: homes(control, keys) == ["n0"] * SHARDS, "the manager knows")

    with Reader(nodes[2], keys) as reader:
        status, lines, err = kvfabric("migrate", "--from", "n0", "--to", "n1")
        assert (status, err) == (0, "")
        rounds = reader.rounds
        until(lambda: reader.rounds > rounds + 1, "the reader goes on")

    reader.check()
    assert (lines[-1]["state"], lines[-1]["copied"], lines[-1]["dropped"]) == (
        "done",
        SHARDS,
        SHARDS,
    )
    assert homes(control, keys) == ["n1"] * SHARDS
    assert nodes[0].tier().held_bytes == 0


def test_some_keys_are_copied_and_stay(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    keys = [key_of(number) for number in range(8)]
    put(nodes[0], keys)
    until(lambda: homes(control, keys) == ["n0"] * 8, "the manager knows")

    chosen = [key.hex() for key in keys[:3]]
    status, lines, err = kvfabric(
        "migrate", *chosen, "--namespace", space(), "--to", "n2", "--copy"
    )

    assert (status, err, lines[-1]["copied"], lines[-1]["dropped"]) == (0, "", 3, 0)
    assert [node.tier().shards for node in nodes] == [8, 0, 3]


def test_a_node_is_drained_while_clients_read_and_may_then_be_deleted(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    keys = [key_of(number) for number in range(SHARDS)]
    put(nodes[0], keys[: SHARDS // 2])
    put(nodes[1], keys[SHARDS // 2 :])
    until(lambda: "" not in homes(control, keys), "the manager knows")

    with Reader(nodes[2], keys) as reader:
        status, lines, err = kvfabric("drain", "n0", "--timeout", "50")
        assert (status, err, lines[-1]["empty"], lines[-1]["waiting"]) == (0, "", True, "")
        again = kvfabric("drain", "n0", "--timeout", "5")[0]
        assert again == 0
        assert nodes[0].tier().held_bytes == 0
        nodes[0].end()
        nodes[0].killed = True  # as far as the fixture is concerned
        rounds = reader.rounds
        until(lambda: reader.rounds > rounds + 1, "the reader goes on")

    reader.check()
    assert "n0" not in homes(control, keys)


def test_a_drain_that_cannot_end_says_why_and_goes_on(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    keys = [key_of(number) for number in range(4)]
    put(nodes[0], keys)
    until(lambda: homes(control, keys) == ["n0"] * 4, "the manager knows")

    with nodes[0].client() as client, client.open(SPACE).view(keys[:1], lease_s=60.0) as views:
        status, lines, _ = kvfabric("drain", "n0", "--timeout", "4")
        assert status == 3
        assert not lines[-1]["empty"]
        assert "1 leases" in lines[-1]["waiting"]
        assert views[0] is not None
        assert bytes(views[0]) == bytes_of(keys[0], SIZE)
    status, lines, _ = kvfabric("drain", "n0", "--timeout", "50")

    assert (status, lines[-1]["empty"]) == (0, True)


class SlowGrowth(Growth):
    """A block at a time, until it is stopped."""

    def _grow(self, end_s: float) -> None:
        while not self._stopping.wait(0.02):
            start = self.sequence.length
            end = start + BLOCK_TOKENS
            self.sequence.append(ids(start, end), kv(start, end), timeout_s=ANSWER_TIMEOUT_S)


def test_a_sequence_grows_on_while_its_home_is_drained(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    growth = SlowGrowth(nodes[0].client())
    try:
        until(lambda: growth.sequence.sealed >= 40 * BLOCK_TOKENS, "it grows")
        assert growth.sequence.node == "n0"
        status, lines, err = kvfabric("drain", "n0", "--timeout", "50")
        assert (status, err) == (0, ""), lines
        assert nodes[0].tier().held_bytes == 0
        drained_at = growth.sequence.length
        until(lambda: growth.sequence.length > drained_at + 4 * BLOCK_TOKENS, "it grows on")
        growth.stop()
        assert growth.sequence.node != "n0"
        assert growth.missing() == 0
    finally:
        growth.stop()
        growth.close()


def test_a_sequence_that_nobody_writes_to_leaves_a_drained_node_too(
    nodes: list[NodeProcess], kvfabric: Run
) -> None:
    tokens = 10 * BLOCK_TOKENS + 5
    with (
        nodes[0].client() as client,
        client.open(SPACE).sequence(FORMAT, idle_s=3.0) as sequence,
    ):
        sequence.append(ids(0, tokens), kv(0, tokens))
        assert sequence.node == "n0"

        status, lines, _ = kvfabric("drain", "n0", "--timeout", "50")

        assert (status, lines[-1]["empty"]) == (0, True)
        assert sequence.node != "n0"
        read = np.zeros_like(kv(0, tokens))
        assert sequence.read_into(read, 0, tokens) == []
        assert np.array_equal(read, kv(0, tokens))


def test_a_node_that_is_drained_takes_nothing_new_until_that_is_called_off(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    assert kvfabric("drain", "n0", "--timeout", "50")[0] == 0
    key = key_of(1)

    with nodes[0].client() as client:
        room = client.open(SPACE)
        assert room.put([key], [bytes_of(key, SIZE)]) == [Status.RETRY]
        assert kvfabric("drain", "n0", "--cancel")[0] == 0
        until(
            lambda: room.put([key], [bytes_of(key, SIZE)]) == [Status.OK], "the node serves again"
        )


def test_a_clients_pin_goes_where_its_shard_is_moved(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    keys = [key_of(number) for number in range(6)]
    put(nodes[0], keys)
    until(lambda: homes(control, keys) == ["n0"] * 6, "the manager knows")

    with nodes[0].client() as client:
        room = client.open(SPACE)
        assert room.pin(keys[:4]) == [Status.OK] * 4
        status, lines, err = kvfabric("migrate", "--from", "n0", "--to", "n1")
        assert (status, err, lines[-1]["dropped"]) == (0, "", 6)
        assert [node.stats().pins for node in nodes] == [0, 4, 0]
        assert kvfabric("drain", "n1", "--timeout", "50")[0] == 0
        assert nodes[1].tier().held_bytes == 0
        assert nodes[0].stats().pins + nodes[2].stats().pins == 4

        assert room.unpin(keys[:4]) == [Status.OK] * 4
    assert not any(node.stats().pins for node in nodes)


def test_what_a_group_keeps_is_kept_where_it_is_moved_until_the_group_ends(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    keys = [key_of(number) for number in range(8)]
    put(nodes[0], keys)
    until(lambda: homes(control, keys) == ["n0"] * 8, "the manager knows")

    with nodes[0].client() as client, client.open(SPACE).group([keys[:5]] * 2) as group:
        assert [shared.node for shared in group.shared] == ["n0"] * 5
        status, lines, _ = kvfabric("drain", "n0", "--timeout", "50")
        assert (status, lines[-1]["empty"]) == (0, True)
        assert sum(node.tier().claimed_bytes for node in nodes[1:]) == 5 * SIZE
        for node in nodes[1:]:  # of 256 shards each: all goes that may
            for part in range(0, 512, 64):
                put(node, [key_of(part + number, node.name) for number in range(64)])
        assert "" not in homes(control, keys[:5])
        group.close()
        until(lambda: not any(node.tier().claimed_bytes for node in nodes), "nothing is kept")


def test_policies_counts_and_pins_outlive_the_manager(
    tmp_path: Path,
    processes: list[Process],
    manager: ManagerProcess,
    nodes: list[NodeProcess],
    control: Manager,
    kvfabric: Run,
) -> None:
    assert kvfabric("policy", "--namespace", space(), "--replicas", "2")[0] == 0
    keys = [key_of(number) for number in range(4)]
    pinned = [key.hex() for key in keys[:2]]
    assert kvfabric("pin", *pinned, "--namespace", space())[0] == 0
    own = ("--namespace", space(), "--count")
    assert kvfabric("replicas", keys[2].hex(), *own, "1")[0] == 0
    assert kvfabric("replicas", keys[3].hex(), *own, "3")[0] == 0
    manager.kill()
    again = ManagerProcess(tmp_path, manager.address, *FAST)
    processes.append(again)

    put(nodes[0], keys)

    def counts() -> list[int]:
        return [len(nodes) for nodes in control.places(ROOM, keys, soon())]

    until(lambda: counts() == [2, 2, 1, 3], "each has its replicas", timeout_s=40.0)
    until(lambda: sum(node.stats().pins for node in nodes) == 4, "each replica is pinned")
    assert kvfabric("pin", *pinned, "--namespace", space(), "--unpin")[0] == 0
    until(lambda: not any(node.stats().pins for node in nodes), "none is pinned")


def test_a_shard_s_own_count_is_kept_up_when_a_holder_is_killed(
    nodes: list[NodeProcess], control: Manager, kvfabric: Run
) -> None:
    keys = [key_of(number) for number in range(4)]
    put(nodes[0], keys)
    until(lambda: homes(control, keys) == ["n0"] * 4, "the manager knows")

    status, lines, _ = kvfabric("replicas", keys[1].hex(), "--namespace", space(), "--count", "2")
    assert (status, lines[-1]) == (0, {"keys": 1, "held": 1, "replicas": 2})

    def holders(key: Key) -> set[str]:
        return set(control.places(ROOM, [key], soon())[0])

    until(lambda: len(holders(keys[1])) == 2, "it has a second replica", timeout_s=40.0)
    assert holders(keys[0]) == {"n0"}
    (second,) = holders(keys[1]) - {"n0"}
    next(node for node in nodes if node.name == second).kill()
    (third,) = {node.name for node in nodes} - {"n0", second}
    until(lambda: holders(keys[1]) == {"n0", third}, "the third node has it", timeout_s=40.0)
    status, (told,), _ = kvfabric("explain", keys[1].hex())
    assert (status, told["nodes"], told["replicas"]) == (0, ["n0", third], [2])
    assert "2 are wanted" in [event["why"] for event in told["events"]]


def test_a_drain_outlives_the_manager(
    tmp_path: Path,
    processes: list[Process],
    manager: ManagerProcess,
    nodes: list[NodeProcess],
    control: Manager,
    kvfabric: Run,
) -> None:
    keys = [key_of(number) for number in range(SHARDS)]
    put(nodes[0], keys)
    until(lambda: homes(control, keys) == ["n0"] * SHARDS, "the manager knows")
    assert not control.drain("n0", soon(), bytes_per_s=SIZE * 4).empty

    manager.kill()
    processes.append(ManagerProcess(tmp_path, manager.address, *FAST))
    status, lines, _ = kvfabric("drain", "n0", "--timeout", "50")

    assert (status, lines[-1]["empty"]) == (0, True)
    states = {move.state for move in control.moves(soon()) if move.kind == "drain"}
    assert states == {control_pb2.MOVE_STATE_COPYING}  # it is kept empty until it is called off
