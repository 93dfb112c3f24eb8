"""One Ray for most tests of this folder, in a network namespace of its own.

The namespace has loopback and a cable with both ends in it: an outward address that leads
nowhere, so that it shows if something listens there. The tests themselves run outside and
send their commands in by `nsenter`; the nodes' sockets, which are files, are reached from
both sides.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvfabric.cluster import deploy, processes, record

BIN = Path(sys.executable).parent
OUTWARD = "192.0.2.1"  # reserved for documentation
SETUP = (
    "ip link set lo up",
    "ip link add kvf0 type veth peer name kvf1",
    f"ip addr add {OUTWARD}/24 dev kvf0",
    "ip link set kvf0 up",
    "ip link set kvf1 up",
    "ip route add default via 192.0.2.2",
    "echo ready",
    "exec sleep infinity",
)
COMMAND_S = 90
MEMORY = "128MiB"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Island:
    """A network namespace with loopback only, and a runtime directory for one fabric in it."""

    pid: int
    runtime_dir: Path

    def run(
        self, *command: str, text: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command of the project's environment inside, to its end."""
        return subprocess.run(
            self.inside(*command),
            env=self.environment | environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def inside(self, *command: str) -> list[str]:
        program, *arguments = command
        return [
            "nsenter",
            f"--net=/proc/{self.pid}/ns/net",
            "--",
            str(BIN / program),
            *arguments,
        ]

    def cut_cable(self) -> None:
        """Takes the outward address away: from here on `ray start` takes loopback."""
        subprocess.run(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", "addr", "flush", "dev", "kvf0"],
            check=True,
            timeout=COMMAND_S,
        )

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"KVFABRIC_RUNTIME_DIR": str(self.runtime_dir)}

    def kvfabric(self, *arguments: str) -> str:
        done = self.run("kvfabric", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr + self.log
        return done.stdout

    @property
    def log(self) -> str:
        return (self.runtime_dir / deploy.LOG_NAME).read_text()[-2000:]

    def status(self) -> dict[str, Any]:
        """`kvfabric status --json`; without a manager or nodes while nothing answers."""
        done = self.run("kvfabric", "status", "--json")
        if done.returncode:
            return {"manager": {"alive": False}, "nodes": []}
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def eventually(self, what: Callable[[], T | None], timeout_s: float = 60.0) -> T:
        """What `what` answers once that is true; fails when it is not in time."""
        deadline = time.monotonic() + timeout_s
        while not (answer := what()):
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s; {self.log}"
            time.sleep(0.1)
        return answer

    def node(self, name: str) -> dict[str, Any] | None:
        nodes = [node for node in self.status()["nodes"] if node["name"] == name and node["alive"]]
        return nodes[0] if nodes else None


@dataclass(frozen=True, slots=True)
class Deployed:
    """A fabric that `kvfabric up --detach` started on an island."""

    island: Island
    fabric: record.Fabric

    def manager_process(self) -> processes.Process:
        (found,) = [p for p in processes.marked(self.fabric.mark) if _titled(p, "ray::Manager")]
        return found

    def node_process(self, name: str) -> processes.Process:
        """The rManager that listens at the node's socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self.island.runtime_dir / f"{name}.sock"))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        found = processes.of(struct.unpack("3i", credentials)[0])
        assert found is not None
        return found

    def kill(self, process: processes.Process) -> None:
        assert processes.signal_one(process, self.fabric.mark, signal.SIGKILL)
        assert processes.wait(process, time.monotonic() + 10)


def _titled(process: processes.Process, title: str) -> bool:
    """Ray names an actor's process by its class."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(title.encode())
    except OSError:  # it has ended meanwhile
        return False


@pytest.fixture(scope="session")
def island() -> Iterator[Island]:
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", " && ".join(SETUP)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder, tempfile.TemporaryDirectory(prefix="kvf-", dir="/tmp") as folder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no network namespace can be made here: {holder.stderr.read().strip()}")
        yield Island(holder.pid, Path(folder))
        holder.kill()


@pytest.fixture(scope="session")
def deployed(island: Island) -> Iterator[Deployed]:
    """A fabric of two nodes, shared by the tests; brought down at the end."""
    island.kvfabric("up", "--nodes", "2", "--memory", MEMORY, "--detach")
    fabric = record.read(island.runtime_dir)
    assert fabric is not None
    yield Deployed(island, fabric)
    island.kvfabric("down")
    assert processes.marked(fabric.mark) == []
