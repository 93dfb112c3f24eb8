"""What the lending demo saw: who held what before and after, and whether every byte was right."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from kvfabric.rpc.v1 import control_pb2
from kvfabric_client import files
from kvfabric_client.texts import size


@dataclass(frozen=True, slots=True)
class Holding:
    """One node's memory at one moment, in bytes."""

    capacity: int
    held: int
    lent: int  # for others
    borrowed: int  # of others
    state: str

    @staticmethod
    def of(info: control_pb2.NodeInfo) -> Holding:
        tier = info.stats.tiers[0]
        state = "lost" if not info.alive else "drained" if info.draining else "serves"
        return Holding(
            capacity=tier.capacity_bytes,
            held=tier.held_bytes if info.alive else 0,
            lent=info.lent_bytes,
            borrowed=info.borrowed_bytes,
            state=state,
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """The whole sequence read back and compared at one moment."""

    when: str
    tokens: int  # right ones
    wrong: int
    missing: int
    seconds: float
    size_bytes: int

    @property
    def gigabytes_per_s(self) -> float:
        return self.size_bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(slots=True)
class Result:
    """Filled while the demo runs."""

    sequence_bytes: int = 0
    home_bytes: int = 0
    tokens: int = 0
    append_s: float = 0.0
    readings: list[Reading] = field(default_factory=list)
    holdings: dict[str, dict[str, Holding]] = field(default_factory=dict)  # moment -> node
    drained_in_s: float = 0.0
    books: tuple[int, int] = (0, 0)  # lent, borrowed at the end

    @property
    def times_home(self) -> float:
        return self.sequence_bytes / self.home_bytes if self.home_bytes else 0.0

    @property
    def failure(self) -> str:
        """Why this is no success, or nothing."""
        for reading in self.readings:
            if reading.wrong or reading.missing:
                return (
                    f"{reading.when}: {reading.wrong} tokens were wrong, {reading.missing} missing"
                )
        if self.books[0] != self.books[1]:
            return f"the books differ: {self.books[0]} bytes lent, {self.books[1]} borrowed"
        return "" if self.readings else "nothing was read back"

    def write_json(self, path: Path) -> None:
        """Writes all of it, making the folder. Refused where that cannot be written."""
        shape = asdict(self) | {
            "times_home": self.times_home,
            "append_gigabytes_per_s": self._append_rate(),
            "failure": self.failure,
        }
        for reading, each in zip(shape["readings"], self.readings, strict=True):
            reading["gigabytes_per_s"] = each.gigabytes_per_s
        files.write(path, json.dumps(shape, indent=2) + "\n", "result")

    def who_holds_what(self) -> Table:
        """A row per node, a column per moment."""
        table = Table(title="who holds what (of which for others)")
        table.add_column("node")
        table.add_column("memory", justify="right")
        for moment in self.holdings:
            table.add_column(moment, justify="right")
        for node in next(iter(self.holdings.values()), {}):
            cells = [_cell(moment[node]) for moment in self.holdings.values()]
            capacity = next(iter(self.holdings.values()))[node].capacity
            table.add_row(node, size(capacity), *cells)
        return table

    def table(self) -> Table:
        table = Table(title="a sequence that outgrows its home")
        table.add_column("")
        table.add_column("value", justify="right")
        table.add_row("sequence", f"{size(self.sequence_bytes)}, {self.tokens:,} tokens")
        table.add_row("its home node's memory", size(self.home_bytes))
        table.add_row("times its home", f"{self.times_home:.1f}")
        table.add_row("grown at", f"{self._append_rate():.2f} GB/s")
        for reading in self.readings:
            right = "every byte right" if not (reading.wrong or reading.missing) else "[red]NOT[/]"
            table.add_row(
                f"read back {reading.when}", f"{reading.gigabytes_per_s:.2f} GB/s, {right}"
            )
        table.add_row("drained and safe to delete after", f"{self.drained_in_s:.1f} s")
        table.add_row("lent / borrowed over the cluster", " / ".join(map(size, self.books)))
        return table

    def _append_rate(self) -> float:
        return self.sequence_bytes / self.append_s / 1e9 if self.append_s else 0.0


def _cell(holding: Holding) -> str:
    if holding.state == "lost":
        return "[red]lost[/]"
    text = size(holding.held)
    if holding.lent:
        text += f" ({size(holding.lent)})"
    if holding.borrowed:
        text += f", owes {size(holding.borrowed)}"
    return text if holding.state == "serves" else f"{text} [yellow]{holding.state}[/]"
