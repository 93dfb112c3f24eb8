"""What to measure of attention, how often, and what the figures are held against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvfabric.errors import Refused
from kvfabric_client.bench.attention.shapes import (
    BLOCK_TOKENS,
    LENGTHS,
    SHAPES,
    SHARD_BYTES,
)
from kvfabric_client.bench.report import AtLeast, AtMost, Reaches, Target, size_text
from kvfabric_client.bench.rounds import MIN_ROUNDS

KERNELS: Final = {
    f"kernel_{shape.text}_{length}": (shape, tokens)
    for shape in SHAPES
    for length, tokens in LENGTHS.items()
}
REMOTE_TOKENS: Final = LENGTHS["16k"]
ADDED: Final = "remote_added_16k"
TOTAL: Final = "remote_total_16k"
REMOTE: Final = (ADDED, TOTAL)
SDK: Final = "sdk_added_16k"
LIMITED: Final = "_10gbit"
RACE: Final = "attend_over_fetch_16k"
CROSSOVER: Final = "crossover"
FETCH: Final = (RACE, CROSSOVER)
FETCH_LIMITED: Final = tuple(name + LIMITED for name in FETCH)
STACKED_REQUESTS: Final = 16
STACKED_TOKENS: Final = 8 << 10
STACKED: Final = ("stacked_16x8k_bf16", "stacked_16x8k_fp32")
WIRE: Final = "wire_bytes"
NAMES: Final = (*KERNELS, *REMOTE, SDK, *FETCH, *FETCH_LIMITED, *STACKED, WIRE)

_FLOORS: Final = {"bfloat16": (0.50, 0.40), "float16": (0.50, 0.40), "float32": (0.70, 0.55)}
_TARGETS: Final[dict[str, Target]] = {
    ADDED: AtMost(1.0),  # of two round trips
    TOTAL: AtMost(1.1),  # of the kernel alone
    RACE: AtLeast(0.9),
    RACE + LIMITED: Reaches(8.0),
    "stacked_16x8k_bf16": AtLeast(4.0),
    "stacked_16x8k_fp32": AtLeast(1.8),
    WIRE: AtMost(1.05),  # the rest is headers
}


@dataclass(frozen=True, slots=True)
class Plan:
    """`memory_bytes` of KV are attended in turn, and as much is read for the limit.

    Refused where it cannot be measured, with what can be.
    """

    names: Sequence[str] = NAMES
    rounds: int = 7
    memory_bytes: int = 3 << 29

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(NAMES))
        if unknown:
            raise Refused(f"no figure is called {unknown[0]!r}; there are {', '.join(NAMES)}")
        if self.rounds < MIN_ROUNDS:
            raise Refused(f"{self.rounds} rounds make no median; give at least {MIN_ROUNDS}")
        if self.shards * BLOCK_TOKENS < self.longest:
            raise Refused(
                f"a context of {self.longest} tokens needs "
                f"{size_text(self.longest // BLOCK_TOKENS * SHARD_BYTES)}; give more memory, or "
                "name shorter ones with --only"
            )

    @property
    def shards(self) -> int:
        return self.memory_bytes // SHARD_BYTES

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return max((KERNELS[name][1] for name in self.named(KERNELS)), default=REMOTE_TOKENS)

    def named(self, names: Iterable[str]) -> list[str]:
        """Those of some names that are asked for, in order."""
        return [name for name in names if name in self.names]

    @property
    def steps(self) -> int:
        """Measurements in all, the warm-up's too: for a progress bar."""
        return len(self.names) * (self.rounds + 1)


def target_of(name: str, *, amx: bool = True) -> Target | None:
    """The target of a row; None where there is none. `amx`: whether this processor multiplies
    matrices of bfloat16, without which stacking them gains little."""
    if name in KERNELS:
        shape, _ = KERNELS[name]
        return AtLeast(_FLOORS[shape.dtype][(shape.head_dim, shape.group) != (128, 4)])
    if name == "stacked_16x8k_bf16" and not amx:
        return None
    return _TARGETS.get(name)
