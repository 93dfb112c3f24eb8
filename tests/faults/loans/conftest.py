"""A manager, a small home node and two that lend, each a process; and one long sequence on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from tests.faults.conftest import (
    ANSWER_TIMEOUT_S,
    STOP_TIMEOUT_S,
    ManagerProcess,
    NodeProcess,
    Process,
    until,
)

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric.types import Format, Namespace
from kvfabric_client import Client, connect
from kvfabric_client.sequence import Sequence

LAYERS, HEADS, HEAD_DIM, BLOCK_TOKENS = 2, 1, 32, 64
FORMAT = Format(
    "float32", block_tokens=BLOCK_TOKENS, layers=LAYERS, kv_heads=HEADS, head_dim=HEAD_DIM
)
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * 4
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES  # 32 KiB
SPACE = Namespace("default", bytes(32), b"lenders")

HOME_BLOCKS = 32
GROWN = 3 * HOME_BLOCKS  # blocks
PATIENCE_S = 2.0  # with a debtor that is silent, or does not give back
GROW_S = 60.0
QUIET_S = 30.0  # until all deadlines have passed, on a busy machine
QUICK = ("--heartbeat-ms", "100", "--silence-ms", "2000")

MEMORY = {"home": "1MiB", "east": "8MiB", "west": "6MiB"}  # so that east is asked first


def kv(start: int, end: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """Every number tells its place."""
    tokens = np.arange(start, end, dtype=np.float32)
    lanes = np.arange(LAYERS * 2 * HEADS * HEAD_DIM, dtype=np.float32)
    flat = tokens[:, None] + lanes[None, :] / 1024 + seed * 100_000
    shaped = flat.reshape(end - start, LAYERS, 2, HEADS, HEAD_DIM)
    return np.ascontiguousarray(shaped.transpose(1, 2, 3, 0, 4))


def ids(start: int, end: int, seed: int = 1) -> list[int]:
    return [position * 31 + seed for position in range(start, end)]


class Lenders:
    """The processes, by name. `failpoint` arms one of them; it is not started again by itself."""

    def __init__(self, folder: Path, processes: list[Process]) -> None:
        self.folder = folder
        self.nodes: dict[str, NodeProcess] = {}
        self.clients: list[Client] = []
        self.patience_s = PATIENCE_S
        self.memory = MEMORY
        # Where they run, by name ("": the manager), if not here: namespace and address.
        self.hosts: dict[str, str] = {}
        self.addresses: dict[str, str] = {}
        self._processes = processes
        self._options: tuple[str, ...] = QUICK
        self.manager: ManagerProcess

    def start(self, store: str = "", **failpoints: str) -> Lenders:
        """`store`: the manager's, a SQLite file where it is not said. `failpoints`: by the
        process's name, as KVFABRIC_FAILPOINT has them.
        """
        if store:
            self._options = (*QUICK, "--store", store)
        listen = f"{self.addresses.get('', '127.0.0.1')}:0"
        self.start_manager(listen, failpoints.get("manager", ""))
        for name in self.memory:
            self.start_node(name, failpoints.get(name, ""))
        until(lambda: len(self.alive()) == len(self.memory), "all nodes are known")
        return self

    def start_manager(self, listen: str, failpoint: str = "") -> None:
        self.manager = ManagerProcess(
            self.folder, listen, *self._options, failpoint=failpoint, host=self.hosts.get("", "")
        )
        self._processes.append(self.manager)

    def start_node(self, name: str, failpoint: str = "") -> NodeProcess:
        options: tuple[str, ...] = (
            *("--manager", self.manager.address, "--memory", self.memory[name]),
            *("--loan-s", str(self.patience_s), "--recall-s", str(self.patience_s)),
        )
        lends = () if name == "home" else ("--lend", self.memory[name])
        if address := self.addresses.get(name):
            options += tuple(
                word for each in ("--tcp", "--grpc", "--metrics") for word in (each, f"{address}:0")
            )
        host = self.hosts.get(name, "")
        node = NodeProcess(name, self.folder, *options, *lends, failpoint=failpoint, host=host)
        self._processes.append(node)
        self.nodes[name] = node
        return node.serve()

    def restart_manager(self) -> None:
        """After its death, at the same address."""
        self.manager.kill()
        self.start_manager(self.manager.address)

    def fallen(self, name: str) -> None:
        """Waits until the process has died at its failpoint."""
        process: Process = self.manager if name == "manager" else self.nodes[name]
        process.popen.wait(GROW_S)
        process.killed = True
        self.nodes.pop(name, None)

    def stopped(self, name: str) -> None:
        """Waits until the process has stopped at its failpoint."""
        process: Process = self.manager if name == "manager" else self.nodes[name]
        stat = Path(f"/proc/{process.pid}/stat")
        until(
            lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", f"{name} stops", GROW_S
        )

    def client(self, name: str = "home", timeout_s: float = 5.0) -> Client:
        """Closed with the test at the latest."""
        client = connect(self.nodes[name].unix, timeout_s=timeout_s)
        self.clients.append(client)
        return client

    @contextmanager
    def control(self) -> Iterator[control_pb2_grpc.ControlServiceStub]:
        with grpc.insecure_channel(self.manager.address) as channel:
            yield control_pb2_grpc.ControlServiceStub(channel)

    def alive(self) -> set[str]:
        with self.control() as stub:
            answer = stub.ListNodes(control_pb2.ListNodesRequest(), timeout=ANSWER_TIMEOUT_S)
            return {info.node for info in answer.nodes if info.alive}

    def ledger(self) -> control_pb2.LedgerResponse:
        with self.control() as stub:
            answer: control_pb2.LedgerResponse = stub.Ledger(
                control_pb2.LedgerRequest(), timeout=ANSWER_TIMEOUT_S
            )
            return answer

    def check_books(self) -> None:
        """Lent is borrowed, to the byte, once heartbeats have told of it."""

        def balanced() -> bool:
            ledger = self.ledger()
            return ledger.lent_bytes == ledger.borrowed_bytes

        until(balanced, f"the books balance: {self.ledger()}", QUIET_S)

    def check_quiet(self) -> None:
        """Nothing is owed, reserved or quarantined any more; every living node's books are right,
        and it goes when told."""
        until(
            lambda: not (self.ledger().lent_bytes or self.ledger().borrowed_bytes),
            f"no loan is left: {self.ledger()}",
            QUIET_S,
        )
        for node in self.nodes.values():
            until(partial(_keeps_no_promise, node), f"{node.name} keeps no promise", QUIET_S)
            node.settles = False  # the others' sessions with it live on for a while
            node.check_end()
            node.check_quiet()


def _keeps_no_promise(node: NodeProcess) -> bool:
    """No leases, no reservations, no bytes that somebody may still touch."""
    stats = node.stats()
    tier = stats.tiers[0]
    return not (stats.leases or stats.reservations or tier.reserved_bytes or tier.quarantined_bytes)


class Growth:
    """A sequence that grows in a thread, and goes on after failures, until it is `blocks` long."""

    def __init__(self, client: Client, blocks: int = GROWN, seed: int = 1) -> None:
        self.client = client
        self.seed = seed
        self.tokens = blocks * BLOCK_TOKENS
        self.sequence: Sequence = client.open(SPACE).sequence(FORMAT)
        self.failures: list[FabricError] = []
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="growth")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._grow(time.monotonic() + GROW_S)
        except BaseException as error:
            self._error = error

    def _grow(self, end_s: float) -> None:
        while self.sequence.length < self.tokens and not self._stopping.is_set():
            assert time.monotonic() < end_s, f"does not grow: {self.failures[-1:]}"
            start = self.sequence.length
            end = min(start + 2 * BLOCK_TOKENS, self.tokens)
            try:
                self.sequence.append(ids(start, end, self.seed), kv(start, end, self.seed))
            except FabricError as error:
                self.failures.append(error)
                time.sleep(0.1)

    def wait(self) -> Growth:
        self._thread.join(GROW_S + STOP_TIMEOUT_S)
        if self._error is not None:
            raise self._error
        assert not self._thread.is_alive()
        return self

    def stop(self) -> Growth:
        """It need not become as long as it was to be."""
        self._stopping.set()
        return self.wait()

    def missing(self) -> int:
        """Reads everything; how many tokens are missing. Fails for any wrong byte."""
        length = self.sequence.length
        target = np.full_like(expected := kv(0, length, self.seed), np.nan)
        lacking = self.sequence.read_into(target, 0, length, timeout_s=ANSWER_TIMEOUT_S)
        here = np.ones(length, dtype=bool)
        for tokens in lacking:
            here[tokens.start : tokens.stop] = False
        assert np.array_equal(target[:, :, :, here], expected[:, :, :, here]), "wrong bytes"
        return int((~here).sum())

    def close(self) -> None:
        self.sequence.close(drop=True)
        self.client.close()


@pytest.fixture
def lenders(folder: Path, processes: list[Process]) -> Iterator[Lenders]:
    lenders = Lenders(folder, processes)
    yield lenders
    for client in lenders.clients:
        client.close()
