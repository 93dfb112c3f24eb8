"""What the attention demo saw: the tokens, the engine's memory, the wire, and who attended."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from rich.table import Table

from kvfabric_client import files
from kvfabric_client.demo.lending.result import Holding
from kvfabric_client.texts import size

BUDGET = 1 / 8  # of its context's KV: what the engine may have in its own memory


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model, as far as bytes depend on it."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    item_bytes: int

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def part_bytes(self) -> int:
        """A query row of one layer to a node, and its output and lse back."""
        return self.query_heads * (self.head_dim * (self.item_bytes + 4) + 4)


@dataclass(frozen=True, slots=True)
class Phase:
    """Some tokens that were decoded one after the other."""

    name: str
    seconds: list[float]  # of each token
    tokens: dict[str, int]  # that each node attended, over all layers and steps
    parts: int  # answers of nodes
    wire_bytes: int  # counted at the engine's sockets
    kernel_s: float  # of the node that answered last, over all layers and steps
    network_s: float  # and what its answers took beyond that

    def formula_bytes(self, shape: Shape) -> int:
        """Queries to every node that has a part, partial results back, and the new token's KV."""
        return self.parts * shape.part_bytes + len(self.seconds) * shape.token_bytes


@dataclass(slots=True)
class Result:
    """Filled while the demo runs."""

    shape: Shape
    model: str
    prompt_tokens: int
    chunk_tokens: int
    drained: str  # the node's name
    tokens: list[int] = field(default_factory=list)
    plain_tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0  # by which the engine's resident memory grew
    plain_peak_bytes: int = 0
    held_bytes: int = 0
    prefill_s: float = 0.0
    plain_prefill_s: float = 0.0
    plain_token_s: list[float] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    holdings: dict[str, dict[str, Holding]] = field(default_factory=dict)  # moment -> node
    drained_in_s: float = 0.0
    recomputed: int = 0

    @property
    def kv_bytes(self) -> int:
        """Of the whole context."""
        return (self.prompt_tokens + len(self.tokens)) * self.shape.token_bytes

    @property
    def failure(self) -> str:
        """Why this is no success, or nothing. Speed is shown, but does not fail."""
        if not self.tokens or self.tokens != self.plain_tokens:
            return "the tokens differ from those of the undistributed run"
        if not self._kept_small:
            return (
                f"the engine's memory grew by {size(self.peak_bytes)}, more than "
                f"{BUDGET:.1%} of the context's {size(self.kv_bytes)}"
            )
        last = next(reversed(self.holdings.values()))[self.drained]
        return f"{self.drained} still holds {size(last.held)}" if last.held else ""

    def write_json(self, path: Path) -> None:
        """Writes all of it, making the folder. Refused where that cannot be written."""
        shape = asdict(self) | {
            "kv_bytes": self.kv_bytes,
            "tokens_equal": self.tokens == self.plain_tokens,
            "failure": self.failure,
        }
        for phase, each in zip(shape["phases"], self.phases, strict=True):
            phase["formula_bytes"] = each.formula_bytes(self.shape)
        files.write(path, json.dumps(shape, indent=2) + "\n", "result")

    def who_attends(self) -> Table:
        """A row per node, a column per phase."""
        table = Table(title="who attends, by its share of all tokens, and holds how much")
        table.add_column("node")
        for phase in self.phases:
            table.add_column(phase.name, justify="right")
        for moment in self.holdings:
            table.add_column(f"held, {moment}", justify="right")
        for node in next(iter(self.holdings.values()), {}):
            shares = [_share(phase, node) for phase in self.phases]
            held = [size(moment[node].held) for moment in self.holdings.values()]
            table.add_row(node, *shares, *held)
        return table

    def decoding(self) -> Table:
        """A row per phase: what one token takes."""
        table = Table(title="one token")
        for column in ("", "time", "kernels", "network", "on the wire", "formula", "ratio"):
            table.add_column(column, justify="right" if column else "left")
        for phase in self.phases:
            steps = max(1, len(phase.seconds))
            formula = phase.formula_bytes(self.shape)
            table.add_row(
                phase.name,
                _milliseconds(median(phase.seconds)),
                *(_milliseconds(each / steps) for each in (phase.kernel_s, phase.network_s)),
                *(size(each // steps) for each in (phase.wire_bytes, formula)),
                f"{phase.wire_bytes / formula:.3f}",
            )
        table.add_row("undistributed", _milliseconds(median(self.plain_token_s)))
        return table

    def table(self) -> Table:
        nodes = len(next(iter(self.holdings.values()), {}))
        table = Table(title=f"{self.model} in float32, its KV on {nodes} memory nodes")
        for column in ("", "on the fabric", "undistributed"):
            table.add_column(column, justify="right" if column else "left")
        context = f"{self.prompt_tokens:,} + {len(self.tokens)} tokens"
        table.add_row("context", context, context)
        table.add_row("its KV", size(self.kv_bytes), size(self.kv_bytes))
        table.add_row(
            f"engine's memory grew by (at most {BUDGET:.1%})",
            _mark(self._kept_small, _of(self.peak_bytes, self.kv_bytes)),
            _of(self.plain_peak_bytes, self.kv_bytes),
        )
        table.add_row("KV in it, at most", size(self.held_bytes), "all")
        equal = self.tokens == self.plain_tokens
        table.add_row("greedy tokens the same", _mark(equal, "yes" if equal else "NO"))
        prefill = f"{self.prefill_s:.1f} s", f"{self.plain_prefill_s:.1f} s"
        table.add_row(f"prefill, {self.chunk_tokens} tokens at once", *prefill)
        table.add_row(f"{self.drained} may be deleted after", f"{self.drained_in_s:.1f} s")
        table.add_row("tokens computed again", str(self.recomputed))
        return table

    @property
    def _kept_small(self) -> bool:
        return self.peak_bytes <= self.kv_bytes * BUDGET


def _of(part: int, whole: int) -> str:
    return f"{size(part)}, {part / whole:.1%}"


def _share(phase: Phase, node: str) -> str:
    total = sum(phase.tokens.values())
    return f"{phase.tokens.get(node, 0) / total:.1%}" if total else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _mark(good: bool, text: str) -> str:
    return f"[green]{text}[/]" if good else f"[red]{text}[/]"
