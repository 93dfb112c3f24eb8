"""What to measure on the data path: which figures, at which sizes, how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvfabric.errors import Refused
from kvfabric_client.bench.report import size_text
from kvfabric_client.bench.rounds import MIN_ROUNDS
from kvfabric_client.bench.targets import KIB, MIB, UNCHECKED

BATCH: Final = 16
SIZES: Final = (256 * KIB, MIB, 4 * MIB)
MATCH_KEYS: Final = 400
MATCH_SHARD_BYTES: Final = 4 * KIB
POOLS_IN_MEMORY: Final = 8  # one to read, one per lane to write, and room to spare

SPEEDS: Final = tuple(
    f"{path}_{way}{checks}"
    for path in ("shm", "tcp")
    for way in ("put", "get")
    for checks in ("", UNCHECKED)
)
VIEW: Final = "shm_view"
MATCH: Final = f"match_{MATCH_KEYS}"
MOVE_UNTHROTTLED: Final = "move_unthrottled"
READERS: Final = "readers_during_throttled_move"
MOVES: Final = (MOVE_UNTHROTTLED, READERS)
MOVED_BYTES: Final = (64 * MIB, 256 * MIB)  # in one round: at least, and at most
NAMES: Final = (*SPEEDS, VIEW, MATCH, *MOVES)


@dataclass(frozen=True, slots=True)
class Plan:
    """`memory_bytes` is the node's; the bench itself takes three eighths as much.

    Refused where it cannot be measured, with what can be.
    """

    names: Sequence[str] = NAMES
    sizes: Sequence[int] = SIZES
    rounds: int = 15
    memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(NAMES))
        if unknown:
            raise Refused(f"no figure is called {unknown[0]!r}; there are {', '.join(NAMES)}")
        if not self.sizes or min(self.sizes) <= 0:
            raise Refused("give at least one size of a shard, above zero")
        if self.rounds < MIN_ROUNDS:
            raise Refused(f"{self.rounds} rounds make no median; give at least {MIN_ROUNDS}")
        least = 2 * BATCH * max(self.sizes)
        if self.pool_bytes < least:
            raise Refused(
                f"shards of {size_text(max(self.sizes))} need a node of at least "
                f"{size_text(least * POOLS_IN_MEMORY)}; give more memory or smaller sizes"
            )

    @property
    def pool_bytes(self) -> int:
        """Memory that one side of a transfer goes round in: far more than caches hold."""
        return self.memory_bytes // POOLS_IN_MEMORY

    @property
    def moved_bytes(self) -> int:
        """What one move between two nodes moves."""
        least, most = MOVED_BYTES
        return max(least, min(most, self.pool_bytes))

    @property
    def sized_names(self) -> list[str]:
        """The figures that are taken at every size, in order."""
        return [name for name in NAMES if name in self.names and name not in (MATCH, *MOVES)]

    @property
    def move_names(self) -> list[str]:
        """The figures of moves between nodes, taken with shards of MIB."""
        return [name for name in MOVES if name in self.names]

    @property
    def steps(self) -> int:
        """Measurements in all, the warm-up's too: for a progress bar."""
        cases = len(self.sized_names) * len(self.sizes) + (MATCH in self.names)
        cases += len(self.move_names)
        return cases * (self.rounds + 1)
