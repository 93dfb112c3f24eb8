"""A demo's own fabric: one gManager and memory nodes of unequal size, each a process.

Plain processes instead of Ray's, because the home node is to be much smaller than the others,
and because some of them go on purpose and stay away.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfabric.errors import Broken
from kvfabric_client.children import line_of

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
# A fraction of the usual times, so that a person can watch loans and losses as they happen.
MANAGER_OPTIONS = ("--heartbeat-ms", "100", "--silence-ms", "2000")
NODE_OPTIONS = ("--loan-s", "3", "--recall-s", "3")


class Process:
    """`python -m MODULE`, which says in one line of JSON that it serves; its log is a file."""

    def __init__(self, module: str, options: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.line = self._first_line()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """As kill -9 does it."""
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def end(self) -> None:
        """Asks it to end, and makes it. May be repeated."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _first_line(self) -> dict[str, str]:
        line = line_of(self._process, START_TIMEOUT_S)
        if not line:
            self.end()
            raise Broken(f"a process of the demo did not start; see {self.log}")
        found: dict[str, str] = json.loads(line)
        return found


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where its parts are."""

    manager: str  # host:port
    runtime_dir: Path
    nodes: dict[str, Process]

    def unix(self, node: str) -> str:
        """The address of a node for clients on its host."""
        return f"unix:{self.runtime_dir}/{node}.sock"

    def tcp(self, node: str) -> str:
        """The same for clients on other hosts."""
        return f"tcp:{self.nodes[node].line['tcp_address']}"


@contextlib.contextmanager
def cluster(memory: Mapping[str, int], segment_bytes: int, logs: Path) -> Iterator[Cluster]:
    """`memory`: bytes, by a node's name. Serves until the context is left; then nothing of it
    is."""
    logs.mkdir(parents=True, exist_ok=True)
    runtime_dir = Path(tempfile.mkdtemp(prefix="kvfabric-demo-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, runtime_dir, ignore_errors=True)
        manager = Process(
            "kvfabric.manager",
            [
                *("--listen", "127.0.0.1:0", "--runtime-dir", str(runtime_dir)),
                *MANAGER_OPTIONS,
            ],
            logs / "manager.log",
        )
        stack.callback(manager.end)
        nodes: dict[str, Process] = {}
        for name, memory_bytes in memory.items():
            nodes[name] = Process(
                "kvfabric_nodes",
                [
                    *("--node", name, "--memory", str(memory_bytes)),
                    *("--segment", str(segment_bytes)),
                    *("--runtime-dir", str(runtime_dir), "--manager", manager.line["manager"]),
                    *NODE_OPTIONS,
                    *("--keeper", "false"),  # what is killed here is to stay dead
                ],
                logs / f"{name}.log",
            )
            stack.callback(nodes[name].end)
        yield Cluster(manager.line["manager"], runtime_dir, nodes)
