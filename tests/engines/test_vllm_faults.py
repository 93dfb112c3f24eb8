"""vLLM engines whose fabric is gone, comes back, or stops at the worst time: they go on."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.engines.conftest import Engine, MemoryNode

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.timeout(300)]

Prompt = Callable[[int, int], list[int]]
CHUNK_BYTES = 64 << 10


class Narrows:
    """A TCP proxy before a node: at a given count of bytes to the client the flow stops."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._left_bytes: int | None = None
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self.stopped = threading.Event()
        self.home = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def stop_after(self, size_bytes: int) -> None:
        with self._lock:
            self._left_bytes = size_bytes
        self.stopped.clear()

    def flow(self) -> None:
        """What was held back goes on to whoever still listens."""
        self._open.set()

    def close(self) -> None:
        self.flow()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in self._ends:
            end.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        host, port = self._target.rsplit(":", 1)
        with suppress(OSError):  # the listener was shut down
            while True:
                client, _ = self._listener.accept()
                self._ends.append(client)
                node = socket.socket()
                self._ends.append(node)
                # What lies in buffers is no longer the node's: keep it little.
                node.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)
                node.connect((host, int(port)))
                self._start(self._pump, client, node, False)
                self._start(self._pump, node, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        with suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if down:
                    self._count(len(chunk))
                    self._open.wait()
                sink.sendall(chunk)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, size_bytes: int) -> None:
        with self._lock:
            if self._left_bytes is None:
                return
            self._left_bytes -= size_bytes
            if self._left_bytes < 0:
                self._left_bytes = None
                self._open.clear()
                self.stopped.set()


@pytest.fixture
def narrows() -> Iterator[Callable[[str], Narrows]]:
    opened: list[Narrows] = []

    def open_before(target: str) -> Narrows:
        opened.append(Narrows(target))
        return opened[-1]

    yield open_before
    for one in opened:
        one.close()


def test_a_fabric_that_is_gone_at_the_start_comes_goes_and_comes_again(
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    node = start_node()
    home = node.home
    node.kill()
    long = prompt(900, 1)

    engine = start_engine(home)
    (computed,) = engine.ask(long)
    assert computed.cached == 0

    for _ in range(2):

        def is_stored(node: MemoryNode) -> bool:
            engine.forget()
            assert engine.ask(long)[0].tokens == computed.tokens
            return node.shards() >= 28

        node = start_node()
        until(lambda node=node: is_stored(node))
        engine.forget()
        (loaded,) = engine.ask(long)
        assert loaded.cached == 896
        assert loaded.tokens == computed.tokens

        node.kill()
        engine.forget()
        (alone,) = engine.ask(long)
        assert alone.cached == 0
        assert alone.tokens == computed.tokens
    assert "goes on without the fabric" in engine.log.read_text()


def test_a_node_stopped_in_the_middle_of_a_load_and_an_engine_killed_there(
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    narrows: Callable[[str], Narrows],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    node = start_node()
    way = narrows(node.tcp)
    engine = start_engine(
        way.home,
        extra={"load_timeout_s": 2.0},
        max_model_len=4096,
        num_gpu_blocks_override=140,
    )
    long = prompt(3900, 1)  # 122 blocks with its answer, 7.6 MiB
    others = [prompt(600, seed) for seed in (2, 3, 4)]
    (computed,) = engine.ask(long)
    until(lambda: node.shards() == 122)
    computed_others = engine.ask(*others)
    until(lambda: node.shards() == 122 + 3 * 18)

    # The node stands still with an eighth of the load delivered: the engine computes.
    engine.forget()
    way.stop_after(1 << 20)
    engine.begin(long)
    assert way.stopped.wait(30)
    node.signal(signal.SIGSTOP)
    (alone,) = engine.answers()
    assert alone.cached == 0
    assert alone.tokens == computed.tokens

    # The load's blocks serve others. What the node still sends changes none of them.
    engine.forget()
    assert [a.tokens for a in engine.ask(*others)] == [a.tokens for a in computed_others]
    before = engine.digest()
    node.signal(signal.SIGCONT)
    way.flow()
    until(node.is_at_rest)
    assert engine.digest() == before

    # The fabric is used again, and an engine that is killed within a load leaves nothing.
    def loads_again() -> bool:
        engine.forget()
        (answer,) = engine.ask(long)
        assert answer.tokens == computed.tokens
        return answer.cached == 121 * 32

    until(loads_again)
    engine.forget()
    way.stop_after(1 << 20)
    engine.begin(long)
    assert way.stopped.wait(30)
    assert not node.is_at_rest()
    engine.kill()
    way.flow()
    until(node.is_at_rest)
