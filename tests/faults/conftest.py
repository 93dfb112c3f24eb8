"""Real processes to break: nodes, managers and clients; and how to tell that all is well after.

Every node that a test started must end the test alive (unless the test says that it was
killed), with balanced books, with nothing on stderr that looks like a bug, and must go at
SIGTERM and leave nothing behind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from tests.redis_server import RedisServer

from kvfabric import failpoints
from kvfabric.checksums import checksums
from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import node_pb2, types_pb2, wire_pb2
from kvfabric.types import Key, Namespace, NamespaceId
from kvfabric.wire.connection import Connection
from kvfabric_client import Client, connect

HERE = Path(__file__).parent
START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.02
SIGNS_OF_BUGS = ("Traceback", "Exception in", "Exception ignored", "never retrieved", "Fatal")

SPACE = Namespace("default", bytes(32), b"faults")
ROOM = namespace_id(SPACE)


def until(what: Callable[[], bool], why: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Waits until `what` holds; fails with `why`."""
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"not in time: {why}"
        time.sleep(POLL_S)


def key_of(number: int, chain: str = "") -> Key:
    return Key(blake3(f"{chain}/{number}".encode()).digest())


def bytes_of(key: Key, size_bytes: int) -> bytes:
    """What a shard of this key holds, wherever and by whomever it is read."""
    return np.random.default_rng(int.from_bytes(key[:8], "little")).bytes(size_bytes)


class Process:
    """A process that answers in lines of JSON on its stdout; its stderr goes to a file."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        files: int = 0,
        failpoint: str = "",
        host: str = "",
    ) -> None:
        """`files`: its limit of open ones. `failpoint`: where it falls, see kvfabric.failpoints.
        `host`: the network namespace it runs in, and whose name its host has.
        """
        self.log = log
        self.killed = False
        network = ["ip", "netns", "exec", host] if host else []
        shell = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"] if files else []
        with log.open("ab") as err:
            self.popen = subprocess.Popen(
                [*network, *shell, sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                bufsize=0,
                env={**os.environ, failpoints.ENVIRONMENT: failpoint, "KVFABRIC_HOST_ID": host},
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def read(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Its next line."""
        out = self.popen.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], timeout_s)
        line = out.readline() if ready else b""
        assert line, f"no answer; its stderr: {self.log.read_text()[-4000:]}"
        return json.loads(line)

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line.encode() + b"\n")

    def ask(self, line: str, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        self.tell(line)
        return self.read(timeout_s)

    def pause(self) -> None:
        """Stops it, and returns once it has stopped."""
        self.popen.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it stops")

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.killed = True
        self.popen.kill()
        self.popen.wait(STOP_TIMEOUT_S)

    def end(self) -> int:
        """SIGTERM; its exit status."""
        self.popen.terminate()
        return self.popen.wait(STOP_TIMEOUT_S)

    def running(self) -> bool:
        return self.popen.poll() is None

    def close(self) -> None:
        """Ends it at once. May be repeated."""
        if self.running():
            self.kill()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()


class Wire:
    """A client without manners: one connection on which any request can be sent."""

    def __init__(
        self,
        address: str,
        *features: str,
        space: Namespace | None = SPACE,
        tenant: str = "default",
        session: bytes = b"",
        token: bytes = b"",
    ) -> None:
        self.connection = Connection(address, time.monotonic() + ANSWER_TIMEOUT_S)
        spaces = [] if space is None else [space]
        request = node_pb2.HelloRequest(
            min_version=1,
            max_version=1,
            client="test",
            principal=tenant,
            features=features,
            session=session,
            token=token,
            namespaces=[
                types_pb2.Namespace(tenant=s.tenant, fingerprint=s.fingerprint, salt=s.salt)
                for s in spaces
            ],
        )
        try:
            self.hello: node_pb2.HelloResponse = self.call("hello", request)
        except BaseException:
            self.close()
            raise

    def call(self, name: str, request: Any) -> Any:
        """The response, or a raised error."""
        frame = self.connection.call(name, request, time.monotonic() + ANSWER_TIMEOUT_S)
        return getattr(frame, f"{name}_response")

    def reserve(
        self, keys: Sequence[Key], size_bytes: int, *, room: NamespaceId = ROOM, **rest: Any
    ) -> node_pb2.ReserveResponse:
        request = node_pb2.ReserveRequest(
            namespace_id=room, keys=keys, size_bytes=[size_bytes], **rest
        )
        answer: node_pb2.ReserveResponse = self.call("reserve", request)
        return answer

    def commit(self, reservation: int, **rest: Any) -> node_pb2.CommitResponse:
        request = node_pb2.CommitRequest(reservation=reservation, **rest)
        answer: node_pb2.CommitResponse = self.call("commit", request)
        return answer

    def acquire(self, keys: Sequence[Key], room: NamespaceId = ROOM) -> node_pb2.AcquireResponse:
        request = node_pb2.AcquireRequest(namespace_id=room, keys=keys)
        answer: node_pb2.AcquireResponse = self.call("acquire", request)
        return answer

    def stats(self) -> types_pb2.NodeStats:
        stats: types_pb2.NodeStats = self.call("stats", node_pb2.StatsRequest()).stats
        return stats

    def fill(self, granted: node_pb2.ReserveResponse, data: bytes, index: int = 0) -> None:
        """Writes into what was granted; the segment stays mapped in the node's eyes."""
        request = wire_pb2.MapRequest(segments=[granted.segments[index]])
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        _, descriptors = self.connection.call_for_descriptors("map", request, deadline_s)
        assert os.pwrite(descriptors[0], data, granted.offsets[index]) == len(data)
        os.close(descriptors[0])

    def store(self, key: Key, data: bytes) -> node_pb2.ReserveResponse:
        """Reserves, fills and commits one key."""
        granted = self.reserve([key], len(data))
        self.fill(granted, data)
        answer = self.commit(granted.reservation, checksums=checksums(memoryview(data)))
        assert list(answer.statuses) == [types_pb2.STATUS_OK]
        return granted

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NodeProcess(Process):
    """`python -m kvfabric_nodes`."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *options: str,
        files: int = 0,
        failpoint: str = "",
        host: str = "",
    ) -> None:
        self.name = name
        self.folder = folder
        command = ["-m", "kvfabric_nodes", "--node", name, "--runtime-dir", str(folder)]
        log = folder / f"{name}.log"
        # A killed node's keeper would stay, and its shards come back: only where that is tested.
        keeper = () if "--keeper" in options else ("--keeper", "false")
        command = [*command, *options, *keeper]
        super().__init__(command, log, files=files, failpoint=failpoint, host=host)
        self.line: dict[str, Any] = {}
        self.guests = 0  # sessions over gRPC: these end by silence alone...
        self.settles = True  # ... and with them what they hold

    def serve(self) -> NodeProcess:
        """Waits until it serves."""
        self.line = self.read(START_TIMEOUT_S)
        return self

    @property
    def unix(self) -> str:
        return f"unix:{self.folder / self.name}.sock"

    @property
    def tcp(self) -> str:
        return f"tcp:{self.line['tcp_address']}"

    def client(self, address: str = "", **rest: Any) -> Client:
        return connect(address or self.unix, **{"timeout_s": ANSWER_TIMEOUT_S, **rest})

    def stats(self) -> types_pb2.NodeStats:
        with Wire(self.unix, space=None) as wire:
            return wire.stats()

    def tier(self) -> types_pb2.TierStats:
        return self.stats().tiers[0]

    def settle(self) -> types_pb2.TierStats:
        """Waits until nobody but the asking holds anything; the books then."""
        seen: list[types_pb2.NodeStats] = []

        def settled() -> bool:
            seen[:] = [self.stats()]
            tier = seen[0].tiers[0]
            sums = (tier.held_bytes, tier.reserved_bytes, tier.quarantined_bytes, tier.free_bytes)
            assert tier.capacity_bytes == sum(sums)
            promises = (seen[0].leases, seen[0].reservations, *sums[1:3])
            return seen[0].sessions == 1 + self.guests and not any(promises)

        try:
            until(settled, "the books settle")
        except AssertionError:
            raise AssertionError(f"the books do not settle: {str(seen)[:800]}") from None
        return seen[0].tiers[0]

    def check_quiet(self) -> None:
        text = self.log.read_text()
        for sign in SIGNS_OF_BUGS:
            assert sign not in text, text[max(0, text.index(sign) - 500) :][:4000]

    def check_end(self) -> None:
        """It is alive and clean, goes when told, and leaves no socket."""
        assert self.running(), self.log.read_text()[-4000:]
        if self.settles:
            self.settle()
        assert self.end() == 0
        assert not Path(self.unix.removeprefix("unix:")).exists()


class ManagerProcess(Process):
    """`python -m kvfabric.manager`, on a store that outlives it."""

    def __init__(
        self, folder: Path, listen: str, *options: str, failpoint: str = "", host: str = ""
    ) -> None:
        store = f"sqlite:{folder / 'manager.db'}"
        command = ["-m", "kvfabric.manager", "--listen", listen, "--store", store, *options]
        super().__init__(command, folder / "manager.log", failpoint=failpoint, host=host)
        self.address: str = self.read(START_TIMEOUT_S)["manager"]


Starter = Callable[..., NodeProcess]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A runtime directory."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may kill."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Those that end with the test, however it ends."""
    started: list[Process] = []
    yield started
    for process in started:
        process.close()


@pytest.fixture
def start_node(folder: Path, processes: list[Process]) -> Iterator[Starter]:
    """Starts nodes, by default of 8 MiB in segments of 512 KiB; checks them at the end."""
    nodes: list[NodeProcess] = []

    def start(name: str = "n0", *options: str, files: int = 0, failpoint: str = "") -> NodeProcess:
        defaults = () if "--memory" in options else ("--memory", "8MiB")
        node = NodeProcess(name, folder, *options, *defaults, files=files, failpoint=failpoint)
        processes.append(node)
        nodes.append(node)
        return node.serve()

    yield start
    for process in processes:
        if not isinstance(process, NodeProcess | ManagerProcess):
            process.close()
    for node in nodes:
        if not node.killed:
            node.check_end()
        node.check_quiet()


@pytest.fixture
def node(start_node: Starter) -> NodeProcess:
    return start_node()


@pytest.fixture
def start_child(tmp_path: Path, processes: list[Process]) -> Callable[..., Process]:
    """Starts a client process: `child.py ROLE ...`."""

    def start(*arguments: object) -> Process:
        log = tmp_path / f"child{len(processes)}.log"
        child = Process([str(HERE / "child.py"), *map(str, arguments)], log)
        processes.append(child)
        return child

    return start


@pytest.fixture(scope="module")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One node for all tests of a module, each of which leaves nothing of its own there."""
    path = tmp_path_factory.mktemp("run")
    path.chmod(0o700)
    node = NodeProcess("n0", path, "--memory", "8MiB")
    try:
        yield node.serve()
        node.check_end()
        node.check_quiet()
    finally:
        node.close()
