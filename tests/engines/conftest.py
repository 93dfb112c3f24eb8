"""A small model, memory nodes and vLLM engines, each in a process of its own."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvfabric.rpc.v1 import types_pb2
from kvfabric_client import connect

HERE = Path(__file__).parent
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0

ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Child:
    """A process that answers in lines of JSON on its stdout; its stderr goes to `log`."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.log = log
        with log.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                env=os.environ | environment,
                start_new_session=True,  # so that it is killed with what it started
            )

    def read(self, timeout_s: float) -> Any:
        """Its next line; fails with its log where none comes."""
        out = self.process.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], timeout_s)
        line = out.readline() if ready else b""
        if not line:
            tail = self.log.read_text(errors="replace")[-3000:]
            pytest.fail(f"no answer within {timeout_s} s; its log ends:\n{tail}", pytrace=False)
        return json.loads(line)

    def write(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    cached: int  # prompt tokens that were not computed
    transfer: dict[str, Any] | None = None  # kv_transfer_params of the answer
    finish: str = ""  # why it ended
    others: list[list[int]] = field(default_factory=list)  # where several were asked for


class Engine(Child):
    """A vLLM engine with the connector."""

    def ask(
        self, *prompts: list[int], max_tokens: int = 8, salt: str = "", **params: Any
    ) -> list[Answer]:
        """`params`: further ones of vLLM's SamplingParams."""
        self.begin(*prompts, max_tokens=max_tokens, salt=salt, **params)
        return self.answers()

    def hand(self, transfer: dict[str, Any], prompt: list[int], max_tokens: int = 8) -> Answer:
        """Ask with kv_transfer_params, as a proxy between prefill and decode does."""
        self.write({"prompts": [prompt], "max_tokens": max_tokens, "transfer": transfer})
        return self.answers()[0]

    def loaded(self) -> int:
        """Blocks that were loaded from the fabric since the start."""
        self.write({"loaded": True})
        return int(self.read(ANSWER_TIMEOUT_S))

    def begin(
        self, *prompts: list[int], max_tokens: int = 8, salt: str = "", **params: Any
    ) -> None:
        self.write({"prompts": prompts, "max_tokens": max_tokens, "salt": salt, "params": params})

    def abort(self, *prompts: list[int], max_tokens: int, after_steps: int) -> None:
        """Have the engine compute some steps of these, and then abort them."""
        self.write({"prompts": prompts, "max_tokens": max_tokens, "abort": after_steps})
        assert self.read(ANSWER_TIMEOUT_S) is True

    def preempted(self) -> int:
        """Requests since the start; of an engine with `disable_log_stats=False`."""
        self.write({"preempted": True})
        return int(self.read(ANSWER_TIMEOUT_S))

    def answers(self) -> list[Answer]:
        return [Answer(**answer) for answer in self.read(ANSWER_TIMEOUT_S)]

    def forget(self, *, connector: bool = False) -> None:
        """Drop the engine's own prefix cache, and what the connector knows."""
        self.write({"forget": True, "connector": connector})
        assert self.read(ANSWER_TIMEOUT_S) is True

    def keys(self, prompt: list[int]) -> tuple[bytes, list[list[bytes]]]:
        """The engine's fingerprint, and the keys of a prompt's blocks for each part."""
        self.write({"keys": prompt})
        fingerprint, parts = self.read(ANSWER_TIMEOUT_S)
        return bytes.fromhex(fingerprint), [[bytes.fromhex(k) for k in keys] for keys in parts]

    def digest(self) -> str:
        """Of every byte of its KV cache."""
        self.write({"digest": True})
        return str(self.read(ANSWER_TIMEOUT_S))

    def stop(self) -> None:
        """End as a server ends: what is queued is stored first."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(STOP_TIMEOUT_S) == 0


class MemoryNode(Child):
    """A node without Ray; `manager`: host:port of its manager, if it has one."""

    def __init__(
        self,
        log: Path,
        folder: Path,
        memory: str = "256MiB",
        name: str = "n0",
        manager: str = "",
    ) -> None:
        command = ["-m", "kvfabric_nodes", "--node", name, "--memory", memory, "--keeper", "false"]
        command += ["--manager", manager] if manager else []
        super().__init__([*command, "--runtime-dir", str(folder)], log)
        endpoints = self.read(START_TIMEOUT_S)
        self.home = f"unix:{endpoints['unix_path']}"
        self.tcp = endpoints["tcp_address"]

    def stats(self) -> types_pb2.NodeStats:
        with connect(self.home) as fabric:
            return fabric.stats()

    def shards(self) -> int:
        return sum(tier.shards for tier in self.stats().tiers)

    def counter(self, name: str) -> float:
        """The sum of what all labels of one metric have."""
        counters = self.stats().counters
        return sum(each.value for each in counters if each.name.split("{")[0] == name)

    def is_at_rest(self) -> bool:
        """Whether the books balance, and nobody holds or awaits anything."""
        stats = self.stats()
        for tier in stats.tiers:
            used = tier.held_bytes + tier.reserved_bytes + tier.quarantined_bytes
            assert used + tier.free_bytes == tier.capacity_bytes
        return not (
            stats.leases
            or stats.reservations
            or any(tier.reserved_bytes or tier.quarantined_bytes for tier in stats.tiers)
        )

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def _until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with (folder.parent / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, HERE / "tiny_model.py", folder, "1"],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
            check=True,
            timeout=START_TIMEOUT_S,
        )
    return folder


@pytest.fixture(scope="session")
def other_weights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after its weights were changed in one bit."""
    folder = tmp_path_factory.mktemp("other") / tiny_model.name
    shutil.copytree(tiny_model, folder)
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-4, os.SEEK_END)
        low = weights.read(1)[0]
        weights.seek(-4, os.SEEK_END)
        weights.write(bytes([low ^ 1]))
    return folder


@pytest.fixture
def until() -> Callable[..., None]:
    """until(condition, timeout_s=30): returns once it holds, fails at the deadline."""
    return _until


@pytest.fixture(scope="session")
def prompt() -> Callable[[int, int], list[int]]:
    """prompt(tokens, seed): token ids; other seeds share no block."""
    return lambda tokens, seed: random.Random(seed).choices(range(2, 300), k=tokens)


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., MemoryNode]]:
    """start_node(memory="256MiB", name="n0", manager=""): always under the same path."""
    yield from node_starter(tmp_path)


def node_starter(tmp_path: Path) -> Iterator[Callable[..., MemoryNode]]:
    """What the fixture gives, for fixtures of another scope."""
    nodes: list[MemoryNode] = []
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)

    def start(memory: str = "256MiB", name: str = "n0", manager: str = "") -> MemoryNode:
        log = tmp_path / f"node{len(nodes)}.log"
        nodes.append(MemoryNode(log, folder, memory, name, manager))
        return nodes[-1]

    yield start
    for node in nodes:
        node.kill()


@pytest.fixture
def start_engine(
    tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Engine]]:
    """start_engine(home, extra={...}, **arguments of vllm.LLM)."""
    yield from engine_starter(tiny_model, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def engine_starter(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> Iterator[Callable[..., Engine]]:
    """What the fixture gives, for fixtures of another scope."""
    engines: list[Engine] = []

    def start(
        home: str, model: Path = tiny_model, extra: dict[str, Any] | None = None, **given: Any
    ) -> Engine:
        arguments = {
            "model": str(model),
            "dtype": "float32",  # only there are tokens equal to the last bit
            "block_size": 32,
            "max_model_len": 2048,
            "enforce_eager": True,
            "seed": 0,
            "kv_transfer_config": {
                "kv_connector": "KVFabricConnector",
                "kv_connector_module_path": "kvfabric_client.integrations.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"home": home, **(extra or {})},
            },
        } | given
        log = tmp_path / f"engine{len(engines)}.log"
        command = [str(HERE / "vllm_child.py"), json.dumps(arguments)]
        environment = ENGINE_ENVIRONMENT | {"XDG_CACHE_HOME": str(cache)}
        if ranks := given.get("tensor_parallel_size"):
            cores = sorted(os.sched_getaffinity(0))  # vLLM wants each rank bound to its own
            bound = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
            environment["VLLM_CPU_OMP_THREADS_BIND"] = bound
        engine = Engine(command, log, **environment)
        engines.append(engine)
        assert engine.read(START_TIMEOUT_S) == "ready"
        return engine

    yield start
    for engine in engines:
        engine.kill()
