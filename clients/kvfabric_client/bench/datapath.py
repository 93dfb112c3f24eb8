"""How fast KV goes into the fabric and out: a node in a process of its own, this one its client.

Speeds move whole batches of shards between memory that no cache holds; times are of one
call. Beside each, the limit does the same work without the fabric.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvfabric.errors import DeadlineExceeded
from kvfabric.types import Key
from kvfabric_client.bench.children import Child
from kvfabric_client.bench.lanes import Lane, new_keys
from kvfabric_client.bench.limits import Limits
from kvfabric_client.bench.moves import Moves
from kvfabric_client.bench.peer import Ring, faulted_memory
from kvfabric_client.bench.plan import (
    BATCH,
    MATCH,
    MATCH_KEYS,
    MATCH_SHARD_BYTES,
    NAMES,
    VIEW,
    Plan,
)
from kvfabric_client.bench.report import Report, Row, machine
from kvfabric_client.bench.rounds import Case, Measure, run_rounds
from kvfabric_client.bench.targets import MIB, UNCHECKED, target_of

ROUND_BYTES: Final = 64 * MIB  # moved in one round, so that it lasts some milliseconds
CALLS_PER_ROUND: Final = 50
READY_TIMEOUT_S: Final = 60.0
READY_POLL_S: Final = 0.05
GIGA: Final = 1e9
MICRO: Final = 1e6

Move = Callable[[list[memoryview]], float]


def run(plan: Plan, advance: Callable[[Case], None] = lambda case: None) -> Report:
    """Starts nodes and the limits' peer, measures, and ends them.

    `advance` is called `plan.steps` times, with the case just measured. Broken where the
    fabric gave a wrong answer.
    """
    rows: list[Row] = []
    if len(plan.names) > len(plan.move_names):
        rows += _one_node(plan, advance)
    if plan.move_names:
        memory = Ring(memoryview(faulted_memory(plan.pool_bytes)))
        with contextlib.closing(Moves(memory, plan.moved_bytes, MIB)) as moves:
            rows += run_rounds(moves.cases(plan.move_names), plan.rounds, advance)
    rows.sort(key=lambda row: (NAMES.index(row.name), row.size_bytes))
    return Report(f"kvfabric data path, batches of {BATCH}", rows, machine(["grpcio"]))


def _one_node(plan: Plan, advance: Callable[[Case], None]) -> list[Row]:
    """What clients do with one node."""
    rows: list[Row] = []
    with contextlib.ExitStack() as owned:
        folder = owned.enter_context(tempfile.TemporaryDirectory(prefix="kvfabric-bench-"))
        node = owned.enter_context(_node(plan, folder))
        limits = owned.enter_context(Limits(plan.pool_bytes))
        bench = owned.enter_context(contextlib.closing(Bench(plan.pool_bytes, node, limits)))
        bench.wait_until_ready()
        if MATCH in plan.names:
            rows += run_rounds([bench.match()], plan.rounds, advance)
        for size_bytes in plan.sizes:
            rows += run_rounds(bench.cases(plan.sized_names, size_bytes), plan.rounds, advance)
            bench.erase()
    return rows


def _node(plan: Plan, folder: str) -> Child:
    return Child(
        "kvfabric_nodes",
        *("--node", "bench", "--memory", str(plan.memory_bytes)),
        *("--runtime-dir", folder, "--tcp", "127.0.0.1:0"),
    )


class Bench:
    """The lanes to one node, the limits, and this process's own memory to move."""

    def __init__(self, pool_bytes: int, node: Child, limits: Limits) -> None:
        homes = {
            "shm": f"unix:{node.ready['unix_path']}",
            "tcp": f"tcp:{node.ready['tcp_address']}",
        }
        self._pool_bytes = pool_bytes
        self._limits = limits
        self._memory = Ring(memoryview(faulted_memory(pool_bytes)))
        self._lanes = {
            (path, checksums): Lane(home, checksums=checksums, room_bytes=pool_bytes)
            for path, home in homes.items()
            for checksums in (True, False)
        }
        self._home = self._lanes["shm", True]

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    def wait_until_ready(self) -> None:
        """Until the node has faulted all its memory in."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._home.ready():
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the node's memory is not there after {READY_TIMEOUT_S:g} s; give it less"
                )
            time.sleep(READY_POLL_S)

    def erase(self) -> None:
        """Purges all shards."""
        for lane in self._lanes.values():
            lane.erase()

    def match(self) -> Case:
        """The match of many keys, whose shards are stored here."""
        keys = self._store(MATCH_SHARD_BYTES, MATCH_KEYS // BATCH)
        chain = list(itertools.chain(*keys))
        return self._time_case(MATCH, MATCH_SHARD_BYTES, lambda: self._home.match(chain))

    def cases(self, names: Sequence[str], size_bytes: int) -> list[Case]:
        """One case for each of the names; the shards that they read are stored here."""
        stored = itertools.cycle(self._store(size_bytes, self._pool_bytes // (BATCH * size_bytes)))
        return [
            self._time_case(name, size_bytes, lambda: self._home.view(next(stored)))
            if name == VIEW
            else self._speed_case(name, size_bytes, stored)
            for name in names
        ]

    def _store(self, size_bytes: int, batches: int) -> list[list[Key]]:
        stored = [new_keys(BATCH) for _ in range(batches)]
        for keys in stored:
            self._home.store(keys, self._buffers(size_bytes))
        return stored

    def _buffers(self, size_bytes: int) -> list[memoryview]:
        return [self._memory.take(size_bytes) for _ in range(BATCH)]

    def _time_case(self, name: str, size_bytes: int, call: Measure) -> Case:
        return Case(
            name,
            size_bytes,
            "us",
            lambda: _median_us(call),
            lambda: _median_us(self._limits.ping),
            target_of(name, size_bytes),
        )

    def _speed_case(self, name: str, size_bytes: int, stored: Iterator[list[Key]]) -> Case:
        base = name.removesuffix(UNCHECKED)
        lane = self._lanes[base.partition("_")[0], name == base]
        limit: Move = {
            "shm_put": self._limits.copy_in,
            "shm_get": self._limits.copy_out,
            "tcp_put": self._limits.tcp_put,
            "tcp_get": self._limits.tcp_get,
        }[base]
        move: Move = lane.put if base.endswith("put") else lambda to: lane.get(next(stored), to)
        return Case(
            name,
            size_bytes,
            "GB/s",
            lambda: self._gb_per_s(size_bytes, move),
            lambda: self._gb_per_s(size_bytes, limit),
            target_of(name, size_bytes),
        )

    def _gb_per_s(self, size_bytes: int, move: Move) -> float:
        batches = max(1, ROUND_BYTES // (BATCH * size_bytes))
        taken_s = sum(move(self._buffers(size_bytes)) for _ in range(batches))
        return batches * BATCH * size_bytes / taken_s / GIGA


def _median_us(call: Measure) -> float:
    return statistics.median(call() for _ in range(CALLS_PER_ROUND)) * MICRO
