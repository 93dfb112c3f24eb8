"""The demo's own fabric: two memory nodes on this machine, started as `kvfabric up` starts them.

It has a runtime directory of its own, so that a fabric which already runs here is left alone.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kvfabric_client
from kvfabric.cluster import deploy
from kvfabric.errors import Broken

NODES = 2
READ_BYTES = "kvfabric_node_read_bytes_total"
READ_SECONDS = "kvfabric_node_read_seconds_total"
WRITTEN_BYTES = "kvfabric_node_written_bytes_total"


@dataclass(frozen=True, slots=True)
class Moved:
    """What the nodes counted, since their start, over all nodes and transports."""

    read_bytes: float
    read_s: float
    written_bytes: float

    def __sub__(self, other: Moved) -> Moved:
        return Moved(
            self.read_bytes - other.read_bytes,
            self.read_s - other.read_s,
            self.written_bytes - other.written_bytes,
        )


@dataclass(frozen=True, slots=True)
class LocalFabric:
    """The addresses of its nodes: an engine has one of them as its home."""

    homes: tuple[str, ...]

    def moved(self) -> Moved:
        totals: dict[str, float] = {}
        for home in self.homes:
            with kvfabric_client.connect(home=home) as node:
                for counter in node.stats().counters:
                    name = counter.name.partition("{")[0]
                    totals[name] = totals.get(name, 0.0) + counter.value
        read, seconds, written = (
            totals.get(name, 0.0) for name in (READ_BYTES, READ_SECONDS, WRITTEN_BYTES)
        )
        return Moved(read, seconds, written)


@contextmanager
def local_fabric(
    memory_bytes: int, log: Path, report: Callable[[str], None]
) -> Iterator[LocalFabric]:
    """Two nodes of `memory_bytes` each, which end with the context or with this process.

    What starting them said is left in `log`.
    """
    runtime_dir = Path(tempfile.mkdtemp(prefix="kvfabric-demo-", dir="/tmp"))
    try:
        up = deploy.up_local(
            runtime_dir, nodes=NODES, memory_bytes=memory_bytes, attached=True, report=report
        )
        homes = tuple(f"unix:{runtime_dir / name}.sock" for name in sorted(up.fabric.nodes))
        if len(homes) != NODES:
            raise Broken(f"{len(homes)} nodes came up, not {NODES}; see {log}")
        yield LocalFabric(homes)
    finally:
        deploy.down(runtime_dir, report)
        if (runtime_dir / deploy.LOG_NAME).exists():
            shutil.copyfile(runtime_dir / deploy.LOG_NAME, log)
        shutil.rmtree(runtime_dir, ignore_errors=True)
