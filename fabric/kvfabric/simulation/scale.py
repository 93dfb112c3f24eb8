"""A directory of millions of shards: what it weighs, how long it pauses, how fast it answers.

The manager's real core and its real messages, parsed from bytes as a node sends them; in a
process of its own, so that its memory is nobody else's: `python -m kvfabric.simulation.scale`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from kvfabric.errors import Broken
from kvfabric.garbage import collect_seldom
from kvfabric.manager import messages
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.events import Heartbeat
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId

T = TypeVar("T")

DELTA_KEYS = 256  # of one heartbeat: two seconds of a busy node
LOCATE_KEYS = 400
LOCATES = 500
SPACE = NamespaceId(b"scale".ljust(DIGEST_BYTES, b"."))
SILENCE_S = 5.0
TICK_S = SILENCE_S / 20
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Memory and CPU time of one measured directory: what else runs here does not count."""

    nodes: int
    keys: int
    shard_us: float  # of a delta, its parsing included
    most_pause_ms: float  # the longest that everything else had to wait...
    most_pause_for: str  # ... and what for
    locate_us_median: float  # of LOCATE_KEYS keys
    memory_bytes: int  # what the directory's process grew by


def measure_apart(nodes: int, keys: int) -> Scale:
    """`measure` in a process of its own. Broken where that fails."""
    command = [sys.executable, "-m", "kvfabric.simulation.scale", str(nodes), str(keys)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if ended.returncode:
        raise Broken(f"the directory could not be measured: {ended.stderr[-2000:]}")
    return Scale(**json.loads(ended.stdout))


def measure(nodes: int, keys: int, seed: int = 1) -> Scale:
    """Fills a directory by deltas of all nodes in turn, then asks it, then loses a node."""
    random = np.random.default_rng(seed)
    stopwatch = _Stopwatch()
    core = ManagerCore(SILENCE_S, 0.0)
    for number in range(nodes):
        core.register(
            messages.register(
                control_pb2.RegisterRequest(
                    min_version=1, max_version=1, node=_name(number), incarnation=1
                )
            ),
            0.0,
        )
    collect_seldom()
    before = _resident_bytes()
    counts, hashes, sequences = [0] * nodes, [0] * nodes, [0] * nodes
    known: list[bytes] = []
    told_s = 0.0
    told = 0
    for turn in range(-(-keys // DELTA_KEYS)):
        number = turn % nodes
        raw = random.bytes(DELTA_KEYS * DIGEST_BYTES)
        heads = np.frombuffer(raw, dtype="<u8")[:: DIGEST_BYTES // 8]
        counts[number] += DELTA_KEYS
        hashes[number] = (hashes[number] + int(heads.sum(dtype=np.uint64))) % (1 << 64)
        sequences[number] += 1
        sent = _heartbeat(
            number, sequences[number], raw, counts[number], hashes[number]
        ).SerializeToString()
        begun_s = time.thread_time()
        stopwatch.time("a heartbeat", lambda sent=sent: _hear(core, sent))  # type: ignore[misc]
        told_s += time.thread_time() - begun_s
        told += DELTA_KEYS
        if turn % 97 == 0:
            known.append(raw)
    memory = _resident_bytes() - before
    locate_s = [_locate(core, stopwatch, known, random) for _ in range(LOCATES)]
    _lose_one(core, stopwatch, nodes)
    return Scale(
        nodes,
        told,
        1e6 * told_s / told,
        1e3 * stopwatch.most_s,
        stopwatch.most_for,
        1e6 * statistics.median(locate_s),
        memory,
    )


class _Stopwatch:
    """The longest of all that was timed."""

    def __init__(self) -> None:
        self.most_s = 0.0
        self.most_for = ""

    def time(self, what: str, call: Callable[[], T]) -> T:
        begun_s = time.thread_time()
        answer = call()
        seconds = time.thread_time() - begun_s
        if seconds > self.most_s:
            self.most_s, self.most_for = seconds, what
        return answer


def _hear(core: ManagerCore, sent: bytes) -> None:
    request = control_pb2.HeartbeatRequest.FromString(sent)
    answer = core.heartbeat(messages.heartbeat(request, 1), 0.0)
    if answer.want_full or answer.want_register:
        raise Broken(f"the core does not believe its own books: {answer}")


def _locate(
    core: ManagerCore, stopwatch: _Stopwatch, known: list[bytes], random: np.random.Generator
) -> float:
    """Keys of several nodes: a long context's, as a match asks for them."""
    raw = b"".join(known[int(i)] for i in random.integers(0, len(known), 2))
    keys = [
        Key(raw[at : at + DIGEST_BYTES])
        for at in range(0, LOCATE_KEYS * DIGEST_BYTES, DIGEST_BYTES)
    ]
    begun_s = time.thread_time()
    stopwatch.time("a locate", lambda: core.locate(SPACE, keys, prefix=True))
    return time.thread_time() - begun_s


def _lose_one(core: ManagerCore, stopwatch: _Stopwatch, nodes: int) -> None:
    """All but the last go on; then time passes until it is swept out."""
    now_s = 0.0
    sequence = 1 << 40  # a new stream numbers anew
    while now_s < 3 * SILENCE_S:
        now_s += TICK_S
        for number in range(nodes - 1):
            core.heartbeat(_alive(number, sequence), now_s)
        sequence += 1
        stopwatch.time("a tick", lambda now_s=now_s: core.tick(now_s))  # type: ignore[misc]


def _alive(number: int, sequence: int) -> Heartbeat:
    request = control_pb2.HeartbeatRequest(
        node=_name(number), incarnation=1, sequence=sequence, more=True
    )
    return messages.heartbeat(request, 2)


def _heartbeat(
    number: int, sequence: int, raw: bytes, count: int, checksum: int
) -> control_pb2.HeartbeatRequest:
    added = control_pb2.Inventory(
        namespace_id=SPACE, tier=types_pb2.TIER_DRAM, keys=raw, size_bytes=[1 << 20]
    )
    return control_pb2.HeartbeatRequest(
        node=_name(number),
        incarnation=1,
        sequence=sequence,
        added=[added],
        inventory_count=count,
        inventory_hash=checksum,
    )


def _name(number: int) -> NodeId:
    return NodeId(f"node-{number:04}")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvfabric.simulation.scale")
    parser.add_argument("nodes", type=int)
    parser.add_argument("keys", type=int)
    given = parser.parse_args()
    sys.stdout.write(json.dumps(asdict(measure(given.nodes, given.keys))) + "\n")


if __name__ == "__main__":
    main()
