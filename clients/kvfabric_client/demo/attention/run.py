"""The story: a prompt's KV leaves the engine layer by layer, the model decodes over three nodes,
one of which is drained meanwhile; another process does the same with all KV in its own memory."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfabric.errors import DeadlineExceeded
from kvfabric_client import models
from kvfabric_client.deadline import Deadline
from kvfabric_client.demo.attention.child import Child, engine
from kvfabric_client.demo.attention.protocol import Order, Report, Spec
from kvfabric_client.demo.attention.result import Phase, Result, Shape
from kvfabric_client.demo.cluster import cluster
from kvfabric_client.demo.lending.result import Holding
from kvfabric_client.demo.lending.watch import Watch
from kvfabric_client.demo.steps import Steps
from kvfabric_client.manager import Manager

HOME, LENDERS = "home", ("east", "west")
DRAINED = LENDERS[0]
CHUNK_TOKENS = 64
BLOCK_TOKENS = 64
ITEM_BYTES = 4  # float32
# The home has room for a quarter of the KV; what a lender may lend is half of its memory, and one
# of them is to take the other's part too.
HOME_SHARE, LENDER_SHARE = 0.25, 2.0
DECODE_AT_ONCE = 2  # while a node is drained
CALL_S = 5.0
DRAIN_S = 120.0


def run(prompt_tokens: int, new_tokens: int, out: Path, steps: Steps) -> Result:
    """Runs the demo: `new_tokens` before the drain and as many after it. Its processes are gone
    on return."""
    with steps.step("the model and the text") as step:
        model = models.prepare(out / "model.log")
        (prompt,) = models.long_prompts(model, 1, prompt_tokens)
        result = Result(_shape(model), models.MODEL, prompt_tokens, CHUNK_TOKENS, DRAINED)
        step.result = f"{models.MODEL}, {prompt_tokens:,} tokens"
    with contextlib.ExitStack() as stack:
        story = _Story(stack, result, model, out, steps)
        story.prefill(prompt)
        story.decode("on three nodes", new_tokens)
        story.drain()
        story.decode(f"{DRAINED} empty", new_tokens)
    _undistributed(result, model, prompt, out, steps)
    return result


class _Story:
    def __init__(
        self, stack: contextlib.ExitStack, result: Result, model: Path, out: Path, steps: Steps
    ) -> None:
        self._result = result
        self._steps = steps
        block_bytes = BLOCK_TOKENS * result.shape.token_bytes
        with steps.step("a gManager and three memory nodes, each a process"):
            fabric = stack.enter_context(
                cluster(_memory(result, block_bytes), block_bytes, out / "attention-logs")
            )
        self._manager = stack.enter_context(Manager(fabric.manager))
        with steps.step("the engine's process, as if on another host"):
            spec = Spec(str(model), fabric.tcp(HOME), CHUNK_TOKENS, BLOCK_TOKENS)
            started = engine(spec, out / "attention-logs" / "engine.log")
            self._engine: Child = stack.enter_context(started)
        stack.enter_context(Watch(self._manager, steps.note))
        self._totals: dict[str, Any] = self._engine.ready.totals

    def prefill(self, prompt: list[int]) -> None:
        with self._steps.step("the prompt's KV leaves the engine layer by layer") as step:
            report = self._engine.obey(Order(prompt, 1))
            self._note(report)
            self._result.prefill_s = report.seconds[0]
            step.result = f"its memory grew by {report.peak_bytes / 2**20:.1f} MiB"
        self._see("grown")

    def decode(self, name: str, count: int) -> None:
        with self._steps.step(f"{count} tokens, {name}"):
            self._phase(name, [self._engine.obey(Order(decode=count))])

    def drain(self) -> None:
        """Tokens are decoded until the node is empty."""
        reports = []
        with self._steps.step(f"{DRAINED} is drained while tokens are decoded") as step:
            began_s = time.monotonic()
            while not (answer := self._manager.drain(DRAINED, Deadline.after(CALL_S))).empty:
                if time.monotonic() - began_s > DRAIN_S:
                    raise DeadlineExceeded(
                        f"{DRAINED} is not empty after {DRAIN_S:g} s: it waits for {answer.waiting}"
                    )
                reports.append(self._engine.obey(Order(decode=DECODE_AT_ONCE)))
            self._result.drained_in_s = time.monotonic() - began_s
            step.result = "it may be deleted"
        self._phase(f"{DRAINED} drained meanwhile", reports)
        self._see(f"{DRAINED} empty")

    def _phase(self, name: str, reports: list[Report]) -> None:
        before = self._totals
        for report in reports:
            self._note(report)
        now = self._totals
        nodes = {
            node: tokens - before["tokens"].get(node, 0) for node, tokens in now["tokens"].items()
        }
        seconds = [each for report in reports for each in report.seconds]
        counts = ("parts", "wire_bytes", "kernel_s", "network_s")
        grown = {key: now[key] - before[key] for key in counts}
        self._result.phases.append(Phase(name, seconds, nodes, **grown))

    def _note(self, report: Report) -> None:
        self._result.tokens += report.tokens
        self._result.peak_bytes = report.peak_bytes
        self._result.held_bytes = report.held_bytes
        self._totals = report.totals
        self._result.recomputed = report.totals["recomputed"]

    def _see(self, moment: str) -> None:
        infos = self._manager.nodes(Deadline.after(CALL_S))
        holdings = {info.node: Holding.of(info) for info in infos}
        self._result.holdings[moment] = {name: holdings[name] for name in (HOME, *LENDERS)}


def _undistributed(result: Result, model: Path, prompt: list[int], out: Path, steps: Steps) -> None:
    spec = Spec(str(model), "", CHUNK_TOKENS, BLOCK_TOKENS)
    with (
        steps.step("the same with all KV in an engine's own memory"),
        engine(spec, out / "attention-logs" / "plain.log") as plain,
    ):
        first = plain.obey(Order(prompt, 1))
        rest = plain.obey(Order(decode=len(result.tokens) - 1))
        result.plain_tokens = first.tokens + rest.tokens
        result.plain_prefill_s, result.plain_token_s = first.seconds[0], rest.seconds
        result.plain_peak_bytes = rest.peak_bytes


def _memory(result: Result, block_bytes: int) -> Mapping[str, int]:
    whole = result.prompt_tokens * result.shape.token_bytes
    shares = {HOME: HOME_SHARE} | dict.fromkeys(LENDERS, LENDER_SHARE)
    return {name: int(whole * share) // block_bytes * block_bytes for name, share in shares.items()}


def _shape(model: Path) -> Shape:
    config = json.loads((model / "config.json").read_text())
    heads = int(config["num_attention_heads"])
    return Shape(
        layers=int(config["num_hidden_layers"]),
        query_heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        item_bytes=ITEM_BYTES,
    )
