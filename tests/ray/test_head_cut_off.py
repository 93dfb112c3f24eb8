"""Ray's head cut off from a memory node for longer than Ray waits: two hosts, made of namespaces.

Ray then takes the node for dead, and the raylet there ends itself with all its workers, the
rManager among them. The keeper is nobody's child, and stays.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from kvfabric.cluster import processes
from kvfabric.types import Key, Namespace, Status
from kvfabric_client import Client, connect

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

BIN = Path(sys.executable).parent
HEAD, FAR = "192.0.2.1", "192.0.2.2"  # reserved for documentation
PORT = 6390
COMMAND_S = 90
SPACE = Namespace("default", bytes(32), b"cut")
SHARD_BYTES = 64 << 10
IMPATIENT = {  # Ray waits for about a minute by itself
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace with a cable to the other one."""

    pid: int
    address: str
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, to its end."""
        program, *arguments = command
        path = BIN / program
        return subprocess.run(
            [*self._inside, str(path if path.exists() else program), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def must(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def _inside(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray of a head and a memory node called "far", and a fabric on it."""

    head: Host
    far: Host
    runtime_dir: Path
    mark: str

    def start_far(self) -> None:
        self.far.must(
            *("ray", "start", f"--address={HEAD}:{PORT}", f"--node-ip-address={FAR}"),
            *("--num-cpus=0", f"--object-store-memory={80 << 20}", "--disable-usage-stats"),
            *('--resources={"kvfabric_node": 1}', "--labels=kvfabric-node=far"),
        )

    def cable(self, state: str) -> None:
        self.head.must("ip", "link", "set", "kvf0", state)

    def node(self) -> dict[str, Any] | None:
        """What the manager knows of it, while it lives."""
        done = self.head.run("kvfabric", "status", "--json")
        nodes = json.loads(done.stdout)["nodes"] if done.returncode == 0 else []
        return next((node for node in nodes if node["name"] == "far" and node["alive"]), None)

    def alive_for_ray(self) -> int:
        """How many nodes Ray believes to be there."""
        script = (
            "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False); "
            "print('alive', sum(node['Alive'] for node in ray.nodes()))"
        )
        said = self.head.run("python", "-c", script).stdout.split()
        return int(said[-1]) if "alive" in said else 0

    def rmanager(self) -> processes.Process | None:
        for process in processes.marked(self.mark):
            try:
                title = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::NodeActor"):
                return process
        return None


def eventually(what: Callable[[], Any], why: str, timeout_s: float = 90.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (answer := what()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {why}"
        time.sleep(0.1)
    return answer


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kvf-", dir="/tmp")))
        runtime_dir = folder / "run"
        runtime_dir.mkdir(mode=0o700)
        mark = secrets.token_hex(8)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= IMPATIENT | {
            processes.MARK_VARIABLE: mark,
            "KVFABRIC_RUNTIME_DIR": str(runtime_dir),
            "SPT_NOENV": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            "RAY_memory_monitor_refresh_ms": "0",
        }
        head, far = (Host(_namespace(stack), ip, environment) for ip in (HEAD, FAR))
        _lay_cable(head, far)
        stack.callback(processes.end, mark, grace_s=5.0, kill_s=5.0)
        head.must(
            *("ray", "start", "--head", f"--node-ip-address={HEAD}", f"--port={PORT}"),
            *("--num-cpus=0", f"--object-store-memory={80 << 20}", "--disable-usage-stats"),
            *("--include-dashboard=false", f"--temp-dir={folder}/ray"),
        )
        cluster = Cluster(head, far, runtime_dir, mark)
        cluster.start_far()
        head.must("kvfabric", "up", "--address", f"{HEAD}:{PORT}", "--memory", "64MiB")
        yield cluster
        head.must("kvfabric", "down")
        assert list(runtime_dir.glob("*.keeper")) == []


def _namespace(stack: ExitStack) -> int:
    script = "ip link set lo up && echo ready && exec sleep infinity"
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.enter_context(holder)
    stack.callback(holder.kill)
    assert holder.stdout is not None
    assert holder.stderr is not None
    if holder.stdout.readline() != "ready\n":
        pytest.skip(f"no network namespace can be made here: {holder.stderr.read().strip()}")
    return holder.pid


def _lay_cable(head: Host, far: Host) -> None:
    head.must(
        *("ip", "link", "add", "kvf0", "type", "veth"),
        *("peer", "name", "kvf1", "netns", str(far.pid)),
    )
    for host, name in ((head, "kvf0"), (far, "kvf1")):
        host.must("ip", "addr", "add", f"{host.address}/24", "dev", name)
        host.must("ip", "link", "set", name, "up")


def keys_of(name: str, count: int = 32) -> list[Key]:
    return [Key(blake3(f"{name}/{index}".encode()).digest()) for index in range(count)]


def shard_of(key: Key) -> bytes:
    return np.random.default_rng(int.from_bytes(key[:8], "little")).bytes(SHARD_BYTES)


def store(client: Client, keys: list[Key]) -> None:
    assert set(client.open(SPACE).put(keys, [shard_of(key) for key in keys])) == {Status.OK}


def holds(client: Client, keys: list[Key]) -> bool:
    """Whether every key is read back; a wrong byte fails at once."""
    found = client.open(SPACE).get(keys)
    for key, shard in zip(keys, found, strict=True):
        assert shard is None or shard.tobytes() == shard_of(key)
    return all(shard is not None for shard in found)


def test_a_node_that_ray_declared_dead_serves_again_what_it_held(cluster: Cluster) -> None:
    with connect(f"unix:{cluster.runtime_dir}/far.sock", timeout_s=20.0) as client:
        before, meanwhile = keys_of("before"), keys_of("meanwhile")
        store(client, before)
        incarnation = eventually(cluster.node, "the manager knows it")["incarnation"]
        rmanager = cluster.rmanager()
        assert rmanager is not None

        cluster.cable("down")
        store(client, meanwhile)
        assert holds(client, before), "work on its own host goes on"
        eventually(lambda: not cluster.node(), "the manager misses it")
        eventually(lambda: cluster.alive_for_ray() == 1, "Ray takes the node for dead")
        assert holds(client, before + meanwhile)

        cluster.cable("up")
        eventually(lambda: not rmanager.alive, "its raylet hears of it, and takes it along")
        assert (cluster.runtime_dir / "far.keeper").exists()
        cluster.start_far()

        def again() -> bool:
            node = cluster.node()
            return node is not None and node["incarnation"] > incarnation

        eventually(again, "Ray has it again, and the fleet has started its rManager")
        assert holds(client, before + meanwhile)
        told = client.open(SPACE).explain(meanwhile[0])
        assert [event.what for event in told] == ["adopted"]
        store(client, keys_of("after"))
        replicas = 2 * len(before) + len(keys_of("after"))
        eventually(lambda: _replicas(cluster) == replicas, "the directory has all of it")


def _replicas(cluster: Cluster) -> int:
    status = json.loads(cluster.head.must("kvfabric", "status", "--json"))
    return int(status["manager"]["replicas"])
