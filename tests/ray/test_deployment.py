"""kvfabric on a real Ray: up, kill -9, a node that joins, down. In the order of the file."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from kvfabric.cluster import deploy, processes, record
from kvfabric.keys import namespace_id
from kvfabric.types import Key, Namespace, Status
from kvfabric_client import Client, connect

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

SPACE = Namespace("default", bytes(32), b"ray")
SHARD_BYTES = 64 << 10
LISTENING = "0A"  # the state's number in /proc/net/tcp


def keys_of(name: str, count: int = 8) -> list[Key]:
    return [Key(blake3(f"{name}/{index}".encode()).digest()) for index in range(count)]


def shard_of(key: Key) -> np.ndarray[Any, Any]:
    return np.random.default_rng(int.from_bytes(key[:8], "little")).integers(
        256, size=SHARD_BYTES, dtype=np.uint8
    )


def store(client: Client, keys: list[Key]) -> None:
    assert client.open(SPACE).put(keys, [shard_of(key) for key in keys]) == [Status.OK] * len(keys)


def holds(client: Client, keys: list[Key]) -> bool:
    """Whether every key is read back, byte for byte; a wrong byte fails at once."""
    found = client.open(SPACE).get(keys)
    for key, shard in zip(keys, found, strict=True):
        assert shard is None or np.array_equal(shard, shard_of(key))
    return all(shard is not None for shard in found)


def located(deployed: Any, keys: list[Key]) -> list[str]:
    done = deployed.island.run(
        "python",
        str(Path(__file__).parent / "locate.py"),
        deployed.fabric.manager,
        namespace_id(SPACE).hex(),
        text="\n".join(key.hex() for key in keys),
    )
    names: list[str] = json.loads(done.stdout) if done.returncode == 0 else []
    return names


@pytest.fixture
def client(deployed: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """At node n0, over its socket."""
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(deployed.island.runtime_dir))
    with connect(f"unix:{deployed.island.runtime_dir}/n0.sock") as connected:
        yield connected


def test_status_lists_the_nodes_that_up_started(deployed: Any) -> None:
    status = deployed.island.status()

    assert status["manager"]["alive"]
    assert status["manager"]["address"] == deployed.fabric.manager
    assert [(n["name"], n["alive"], n["hit_rate"]) for n in status["nodes"]] == [
        ("n0", True, None),
        ("n1", True, None),
    ]
    assert {n["tiers"][0]["capacity_bytes"] for n in status["nodes"]} == {128 << 20}
    table = deployed.island.kvfabric("status")
    assert "n1" in table
    assert max(len(line) for line in table.splitlines()) <= 80


def test_both_actors_export_metrics(deployed: Any) -> None:
    status = deployed.island.status()
    script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
    for actor, address in (
        ("manager", status["manager"]["metrics_address"]),
        ("node", status["nodes"][0]["metrics_address"]),
    ):
        done = deployed.island.run("python", "-c", script, f"http://{address}/metrics")
        assert f"# TYPE kvfabric_{actor}_" in done.stdout, done.stderr


def test_a_second_up_names_the_remedy(deployed: Any) -> None:
    done = deployed.island.run("kvfabric", "up", "--detach")

    assert done.returncode == 1
    assert "kvfabric down" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_listens_beyond_loopback(deployed: Any) -> None:
    listening: list[str] = []
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/{deployed.island.pid}/net/{table}").read_text().splitlines()[1:]
        fields = [line.split() for line in lines]
        listening += [field[1].split(":")[0] for field in fields if field[3] == LISTENING]

    assert listening
    assert {address for address in map(ip_of, listening) if not address.is_loopback} == set()


def test_no_other_user_reaches_the_sockets_of_ray(deployed: Any) -> None:
    assert (Path(deployed.fabric.scratch) / "ray").is_dir()
    assert Path(deployed.fabric.scratch).stat().st_mode & 0o077 == 0


def ip_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel prints addresses as 32-bit words of the machine's byte order."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def test_explain_tells_the_life_of_a_key_from_node_and_manager(
    deployed: Any, client: Client
) -> None:
    (key,) = keys_of("explain", 1)
    store(client, [key])

    told = json.loads(deployed.island.kvfabric("explain", key.hex()[:16], "--json"))

    assert told["silent"] == []
    assert "n0" in {event["node"] for event in told["events"]}
    ages = [event["age_s"] for event in told["events"]]
    assert ages == sorted(ages, reverse=True)


def test_purge_erases_on_every_node(deployed: Any, client: Client) -> None:
    keys = keys_of("purge", 4)
    store(client, keys[:2])
    with connect(f"unix:{deployed.island.runtime_dir}/n1.sock") as other:
        store(other, keys[2:])
        arguments = [part for key in keys for part in ("--key", key.hex())]
        room = f"{SPACE.fingerprint.hex()}:{SPACE.salt.hex()}"

        said = deployed.island.kvfabric("purge", "--namespace", room, *arguments, "--yes")

        assert "4 shards" in said
        assert client.open(SPACE).get(keys[:2]) == [None, None]
        assert other.open(SPACE).get(keys[2:]) == [None, None]


def test_an_rmanager_killed_serves_again_at_the_same_addresses_what_it_held(
    deployed: Any, client: Client
) -> None:
    store(client, keys_of("before"))
    client.open(SPACE).pin(keys_of("before")[:2])
    before = deployed.island.node("n0")

    deployed.kill(deployed.node_process("n0"))

    def restarted() -> dict[str, Any] | None:
        node = deployed.island.node("n0")
        return node if node and node["incarnation"] > before["incarnation"] else None

    after = deployed.island.eventually(restarted)
    addresses = ("unix_path", "tcp_address", "grpc_address", "metrics_address")
    assert [after[name] for name in addresses] == [before[name] for name in addresses]
    assert holds(client, keys_of("before"))
    assert client.stats().pins == 2
    client.open(SPACE).unpin(keys_of("before")[:2])
    store(client, keys_of("after"))
    assert holds(client, keys_of("after"))
    everything = keys_of("before") + keys_of("after")
    deployed.island.eventually(lambda: located(deployed, everything) == ["n0"] * 16)
    told = json.loads(deployed.island.kvfabric("explain", keys_of("before")[0].hex(), "--json"))
    assert "adopted" in {event["what"] for event in told["events"]}


def test_local_puts_and_gets_go_on_without_the_manager_and_it_learns_of_them(
    deployed: Any, client: Client
) -> None:
    keys = keys_of("n0, before") + keys_of("n0, meanwhile")
    store(client, keys[:8])
    with connect(f"unix:{deployed.island.runtime_dir}/n1.sock") as other:
        store(other, keys_of("n1"))
    epoch = deployed.island.status()["manager"]["epoch"]

    deployed.kill(deployed.manager_process())

    store(client, keys[8:])
    assert holds(client, keys)

    def back() -> bool:
        manager = deployed.island.status()["manager"]
        return bool(manager["alive"]) and manager["epoch"] > epoch

    deployed.island.eventually(back)
    everything = keys + keys_of("n1")
    expected = ["n0"] * len(keys) + ["n1"] * 8
    deployed.island.eventually(lambda: located(deployed, everything) == expected)
    status = deployed.island.status()
    assert status["manager"]["replicas"] == sum(n["tiers"][0]["shards"] for n in status["nodes"])


def test_a_manager_that_cannot_start_again_yet_returns_when_it_can(deployed: Any) -> None:
    database = deployed.island.runtime_dir / "manager.db"
    aside = deployed.island.runtime_dir / "manager.db.aside"
    database.rename(aside)
    database.mkdir()
    mark = deployed.fabric.mark
    deployed.kill(deployed.manager_process())
    before = set(processes.marked(mark))
    tries: set[processes.Process] = set()

    def tried_twice() -> bool:
        tries.update(process for process in processes.marked(mark) if process not in before)
        return len(tries) >= 2

    deployed.island.eventually(tried_twice)
    database.rmdir()
    aside.rename(database)

    deployed.island.eventually(lambda: deployed.island.status()["manager"]["alive"])
    deployed.island.eventually(lambda: deployed.island.node("n1"))


def test_a_ray_node_that_joins_gets_its_rmanager_by_itself(deployed: Any) -> None:
    deployed.island.cut_cable()

    joined = deployed.island.run(
        "ray",
        "start",
        f"--address={deployed.fabric.ray}",
        "--num-cpus=0",
        f"--object-store-memory={80 << 20}",
        '--resources={"kvfabric_node": 1}',
        "--labels=kvfabric-node=late",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(deployed.island.runtime_dir / deploy.TOKEN_NAME),
        RAY_USAGE_STATS_ENABLED="0",
        SPT_NOENV="1",
        # Marked as the rest is, so that `down` ends it too.
        **{processes.MARK_VARIABLE: deployed.fabric.mark},
    )
    assert joined.returncode == 0, joined.stdout + joined.stderr

    deployed.island.eventually(lambda: deployed.island.node("late"))
    with connect(f"unix:{deployed.island.runtime_dir}/late.sock") as client:
        store(client, keys_of("late"))
        assert holds(client, keys_of("late"))


def assert_nothing_is_left(runtime_dir: Path, fabric: record.Fabric) -> None:
    assert processes.marked(fabric.mark) == []
    assert not Path(fabric.scratch).exists()
    assert [path.name for path in runtime_dir.glob("*.sock")] == []
    assert [path.name for path in runtime_dir.glob("*.keeper")] == []
    assert record.read(runtime_dir) is None
    left = {path.name for path in runtime_dir.iterdir() if not path.name.startswith("manager.db")}
    assert left <= {deploy.LOCK_NAME, deploy.LOG_NAME}  # the metadata is durable, and stays
    assert [name for name in os.listdir("/dev/shm") if "plasma" in name] == []


def test_down_leaves_nothing_and_can_be_repeated(deployed: Any) -> None:
    deployed.island.kvfabric("down")

    assert_nothing_is_left(deployed.island.runtime_dir, deployed.fabric)
    assert "nothing runs here" in deployed.island.kvfabric("down")


def test_ctrl_c_ends_a_fabric_in_the_foreground(island: Any) -> None:
    with subprocess.Popen(
        island.inside("kvfabric", "up", "--memory", "128MiB"),
        env=island.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as up:
        island.eventually(lambda: island.node("n0"))
        fabric = record.read(island.runtime_dir)
        assert fabric is not None
        assert up.stdout is not None
        while "Ctrl-C" not in up.stdout.readline():
            assert up.poll() is None
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0

    assert_nothing_is_left(island.runtime_dir, fabric)


def test_down_ends_what_a_killed_launcher_left(island: Any) -> None:
    island.kvfabric("up", "--memory", "128MiB", "--detach")
    fabric = record.read(island.runtime_dir)
    assert fabric is not None
    launcher = fabric.processes[0]
    assert processes.signal_one(launcher, fabric.mark, signal.SIGKILL)
    assert processes.wait(launcher, time.monotonic() + 10)

    island.kvfabric("down")

    assert_nothing_is_left(island.runtime_dir, fabric)


def test_a_fabric_that_cannot_start_says_why_and_leaves_nothing(island: Any) -> None:
    done = island.run("kvfabric", "up", "--memory", "100KiB", "--detach")

    assert done.returncode == 1
    assert "segment" in done.stderr
    assert record.read(island.runtime_dir) is None
    assert list(island.runtime_dir.glob("*.sock")) == []
