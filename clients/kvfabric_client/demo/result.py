"""What the demo found: as a table, as JSON, and as an exit status."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from kvfabric_client import files

LOADED_SHARE = 0.95
COLD_OVER_WARM = 25.0
EQUAL_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt: cold in the first engine, warm in the second; times in seconds.

    `example_s` is the warm time with vLLM's own ExampleConnector, None where that does not run.
    """

    cold_s: float
    warm_s: float
    example_s: float | None
    loaded_tokens: int
    equal: bool


@dataclass(frozen=True, slots=True)
class Result:
    """`bytes_moved` is what the nodes sent to the second engine, over all rounds, in `read_s`."""

    engine: str
    engine_version: str
    model: str
    prompt_tokens: int
    greedy_tokens: int
    rounds: tuple[Round, ...]
    bytes_stored: int
    bytes_moved: int
    read_s: float
    machine: dict[str, object]

    @property
    def loaded_tokens(self) -> int:
        """Of the worst round."""
        return min(each.loaded_tokens for each in self.rounds)

    @property
    def ttft_cold_s(self) -> float:
        return median(each.cold_s for each in self.rounds)

    @property
    def ttft_warm_s(self) -> float:
        return median(each.warm_s for each in self.rounds)

    @property
    def ttft_example_s(self) -> float | None:
        times = [each.example_s for each in self.rounds if each.example_s is not None]
        return median(times) if times else None

    @property
    def tokens_equal(self) -> bool:
        return all(each.equal for each in self.rounds)

    @property
    def gigabytes_per_s(self) -> float:
        return self.bytes_moved / self.read_s / 1e9 if self.read_s else 0.0

    @property
    def failure(self) -> str:
        """Why this is no success, or nothing. Speed is shown, but only wrong answers fail."""
        if not self.loaded_tokens:
            return "the second engine loaded nothing from the fabric in at least one round"
        if not self.bytes_moved:
            return "the second engine loaded, but the nodes counted no byte sent"
        if not self.tokens_equal:
            return "the second engine's greedy tokens differ from the first's"
        return ""

    def to_json(self) -> str:
        shape = {
            "engine": self.engine,
            "engine_version": self.engine_version,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "loaded_tokens": self.loaded_tokens,
            "ttft_cold_s": self.ttft_cold_s,
            "ttft_warm_s": self.ttft_warm_s,
            "ttft_example_s": self.ttft_example_s,
            "ttft_ratio": self.ttft_cold_s / self.ttft_warm_s,
            "bytes_stored": self.bytes_stored,
            "bytes_moved": self.bytes_moved,
            "gigabytes_per_s": self.gigabytes_per_s,
            "greedy_tokens": self.greedy_tokens,
            "tokens_equal": self.tokens_equal,
            "rounds": [asdict(each) for each in self.rounds],
            "machine": self.machine,
        }
        return json.dumps(shape, indent=2) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes `to_json`, making the folder. Refused where that cannot be written."""
        files.write(path, self.to_json(), "result")

    def table(self) -> Table:
        count = len(self.rounds)
        table = Table(
            title=f"{self.model} in float32, {self.engine} {self.engine_version}",
            caption=f"times: medians over {count} prompts; tokens: of the worst",
        )
        table.add_column("one fabric, two engine processes")
        table.add_column("value", justify="right")
        table.add_column("target", justify="right")
        table.add_column("met")
        share, ratio = self.loaded_tokens / self.prompt_tokens, self.ttft_cold_s / self.ttft_warm_s
        table.add_row("prompt tokens", f"{self.prompt_tokens:,}")
        table.add_row(
            "loaded from the fabric",
            f"{self.loaded_tokens:,} ({share:.1%})",
            f">= {LOADED_SHARE:.0%}",
            _met(share >= LOADED_SHARE),
        )
        table.add_row("time to first token, cold", f"{self.ttft_cold_s:.3f} s")
        table.add_row("time to first token, warm", f"{self.ttft_warm_s:.3f} s")
        table.add_row(
            "cold / warm",
            f"{ratio:.1f}",
            f">= {COLD_OVER_WARM:.0f}",
            _met(ratio >= COLD_OVER_WARM),
        )
        if self.ttft_example_s is not None:
            table.add_row(
                "warm, vLLM's ExampleConnector",
                f"{self.ttft_example_s:.3f} s",
                ">= ours",
                _met(self.ttft_warm_s <= self.ttft_example_s),
            )
        table.add_row(f"bytes moved for {count} prompts", f"{self.bytes_moved:,}")
        table.add_row("by the nodes' own counters", f"{self.gigabytes_per_s:.2f} GB/s")
        table.add_row(
            f"{self.greedy_tokens} greedy tokens the same",
            "yes" if self.tokens_equal else "NO",
            "yes",
            _met(self.tokens_equal),
        )
        return table


def _met(met: bool) -> str:
    return "[green]yes[/]" if met else "[red]no[/]"
