"""How fast shards move between two nodes, and what that costs those who read meanwhile.

A manager and two nodes in processes of their own. What is moved is copied, so that each
round finds it at its source again; the copies are purged between rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Final

import grpc

from kvfabric.errors import Broken, DeadlineExceeded
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric.types import Key
from kvfabric_client.bench.children import Child
from kvfabric_client.bench.lanes import Lane, new_keys
from kvfabric_client.bench.peer import Ring
from kvfabric_client.bench.plan import BATCH, MOVE_UNTHROTTLED, READERS
from kvfabric_client.bench.rounds import Case
from kvfabric_client.bench.targets import target_of

HEARTBEAT_MS: Final = 10  # a move begins with a heartbeat, and its rate is what is asked for
SILENCE_MS: Final = 10_000
TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.002
THROTTLE: Final = 0.2  # of the wire's rate
TRIES: Final = 5  # of a measurement that something disturbed
BURST_S: Final = 0.05  # what a throttled move may catch up with, at its begin too
READ_PART: Final = 0.6  # of a throttled move's time
PROBES: Final = 5  # of the wire's rate, before it is a throttle
GIGA: Final = 1e9

_ENDED: Final = frozenset(
    {
        control_pb2.MOVE_STATE_DONE,
        control_pb2.MOVE_STATE_FAILED,
        control_pb2.MOVE_STATE_CANCELLED,
    }
)


class Moves:
    """Shards of `size_bytes` at a source, to be copied to a target, and the way to read both.

    `memory` is where this process has its buffers, `moved_bytes` what one move moves.
    """

    def __init__(self, memory: Ring, moved_bytes: int, size_bytes: int) -> None:
        self._memory = memory
        self._moved_bytes = moved_bytes
        self._size_bytes = size_bytes
        self._owned = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._owned.close()

    def cases(self, names: Sequence[str]) -> list[Case]:
        """One case for each of the names."""
        made: dict[str, Callable[[], Case]] = {
            MOVE_UNTHROTTLED: self._unthrottled,
            READERS: self._readers,
        }
        return [made[name]() for name in names]

    def _open(self) -> None:
        folder = self._owned.enter_context(tempfile.TemporaryDirectory(prefix="kvfabric-bench-"))
        manager = self._owned.enter_context(
            Child(
                "kvfabric.manager",
                *("--listen", "127.0.0.1:0", "--runtime-dir", folder),
                *("--heartbeat-ms", str(HEARTBEAT_MS), "--silence-ms", str(SILENCE_MS)),
            )
        )
        address = str(manager.ready["manager"])
        nodes = [
            self._owned.enter_context(
                Child(
                    "kvfabric_nodes",
                    *(
                        "--node",
                        name,
                        "--memory",
                        str(2 * self._moved_bytes),
                        "--runtime-dir",
                        folder,
                    ),
                    *("--tcp", "127.0.0.1:0", "--manager", address),
                )
            )
            for name in ("source", "target")
        ]
        channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        self._owned.callback(channel.close)
        self._manager = control_pb2_grpc.ControlServiceStub(channel)
        self._homes = [self._lane(f"unix:{node.ready['unix_path']}") for node in nodes]
        self._wires = [self._lane(f"tcp:{node.ready['tcp_address']}") for node in nodes]
        _wait(lambda: all(lane.ready() for lane in self._homes), "the nodes' memory is not there")
        self._namespace = self._homes[0].stored
        self._moved = self._store(self._homes[0], self._moved_bytes)
        # Of the target's own: what is moved there comes and goes.
        self._others = self._store(self._homes[1], self._moved_bytes // 4)
        self._await_manager()

    def _lane(self, home: str) -> Lane:
        lane = Lane(home, checksums=True, room_bytes=self._moved_bytes)
        return self._owned.enter_context(contextlib.closing(lane))

    def _store(self, lane: Lane, size_bytes: int) -> list[list[Key]]:
        batches = [new_keys(BATCH) for _ in range(size_bytes // (BATCH * self._size_bytes))]
        for keys in batches:
            lane.store(keys, self._buffers())
        return batches

    def _buffers(self) -> list[memoryview]:
        return [self._memory.take(self._size_bytes) for _ in range(BATCH)]

    # Unthrottled --------------------------------------------------------------------

    def _unthrottled(self) -> Case:
        """A move of all, from the call until the manager has seen every copy; the limit is the
        rate at which a client reads the same from the source."""
        return Case(
            MOVE_UNTHROTTLED,
            self._size_bytes,
            "GB/s",
            self._move,
            lambda: self._read_rate(self._wires[0], self._moved),
            target_of(MOVE_UNTHROTTLED, self._size_bytes),
        )

    def _move(self) -> float:
        start = time.perf_counter()
        move = self._begin_move(0)
        _wait(lambda: self._state(move).state in _ENDED, "a move does not end")
        taken_s = time.perf_counter() - start
        told = self._state(move)
        keys = sum(map(len, self._moved))
        if told.state != control_pb2.MOVE_STATE_DONE or told.copied != keys:
            raise Broken(f"a move of the bench copied {told.copied} of {keys}: {told.why}")
        self._undo()
        return keys * self._size_bytes / taken_s / GIGA

    def _read_rate(self, lane: Lane, batches: Sequence[Sequence[Key]]) -> float:
        taken_s = sum(lane.get(keys, self._buffers()) for keys in batches)
        return len(batches) * BATCH * self._size_bytes / taken_s / GIGA

    # Throttled ----------------------------------------------------------------------

    def _readers(self) -> Case:
        """What clients read from both nodes by TCP, in turn, while a move takes a fifth of the
        wire's rate; the limit is the same without the move."""
        rates = [self._read_rate(self._wires[0], self._moved) for _ in range(PROBES)]
        bytes_per_s = int(THROTTLE * statistics.median(rates) * GIGA)
        read_s = READ_PART * max(self._moved_bytes / bytes_per_s - 2 * BURST_S, BURST_S / 4)
        return Case(
            READERS,
            self._size_bytes,
            "GB/s",
            lambda: self._read_while_moving(bytes_per_s, read_s),
            lambda: self._read_both(read_s),
            target_of(READERS, self._size_bytes),
        )

    def _read_while_moving(self, bytes_per_s: int, read_s: float) -> float:
        for _ in range(TRIES):
            move = self._begin_move(bytes_per_s)
            _wait(self._homes[1].reserved_bytes, "a throttled move does not begin")
            time.sleep(BURST_S)  # what it catches up with at its begin is not its rate
            rate = self._read_both(read_s)
            ended = self._state(move).state in _ENDED  # the machine was busy with something else
            self._manager.CancelMove(control_pb2.CancelMoveRequest(move=move), timeout=TIMEOUT_S)
            self._undo()
            if not ended:
                return rate
        raise Broken("a throttled move of the bench ended before it was measured")

    def _read_both(self, read_s: float) -> float:
        """From either node in turn."""
        pairs = [
            (lane, keys)
            for one, other in zip(self._moved, itertools.cycle(self._others), strict=False)
            for lane, keys in ((self._wires[0], one), (self._wires[1], other))
        ]
        batches, taken_s = 0, 0.0
        end_s = time.perf_counter() + read_s
        for lane, keys in itertools.cycle(pairs):
            taken_s += lane.get(keys, self._buffers())
            batches += 1
            if time.perf_counter() >= end_s:
                break
        return batches * BATCH * self._size_bytes / taken_s / GIGA

    # The manager ----------------------------------------------------------------------

    def _begin_move(self, bytes_per_s: int) -> int:
        request = control_pb2.MigrateRequest(
            namespace_id=self._namespace,
            source="source",
            destination="target",
            bytes_per_s=bytes_per_s,
            copy=True,
            keys=list(itertools.chain(*self._moved)),
        )
        answer: control_pb2.MigrateResponse = self._manager.Migrate(request, timeout=TIMEOUT_S)
        return answer.move

    def _state(self, move: int) -> control_pb2.Move:
        request = control_pb2.ListMovesRequest(move=move)
        answer: control_pb2.ListMovesResponse = self._manager.ListMoves(request, timeout=TIMEOUT_S)
        return answer.moves[0]

    def _undo(self) -> None:
        """The copies go, and the manager knows."""
        keys = list(itertools.chain(*self._moved))
        # A cancelled move's batches that the target has begun come to their end.
        _wait(lambda: not self._homes[1].pulls(), "a move's last batches do not end")
        self._homes[1].forget(keys)
        _wait(lambda: self._holders(keys) == {("source",)}, "a move's copies are not forgotten")

    def _await_manager(self) -> None:
        keys = list(itertools.chain(*self._moved))
        _wait(
            lambda: self._holders(keys) == {("source",)}, "the manager does not learn of the shards"
        )

    def _holders(self, keys: list[Key]) -> set[tuple[str, ...]]:
        """Every set of nodes that holds some of these keys."""
        request = control_pb2.LocateRequest(namespace_id=self._namespace, keys=keys)
        answer: control_pb2.LocateResponse = self._manager.Locate(request, timeout=TIMEOUT_S)
        places = [tuple(place.nodes) for place in answer.places]
        return {places[index] if index < len(places) else () for index in answer.place}


def _wait(condition: Callable[[], object], what: str) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > until_s:
            raise DeadlineExceeded(f"{what}, after {TIMEOUT_S:g} s")
        time.sleep(POLL_S)
